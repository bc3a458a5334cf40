"""Where remote shards come from: the names that a pattern stands for, and the request that fetches one of them.

Credentials are the clients' own: the hub's token, the AWS chain, ``netrc``.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import itertools
import json
import logging
import netrc
import re
import urllib.request
from base64 import b64encode
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ...errors import UserError, extra, nearest
from ...files import write_json
from ..shards.patterns import braces, without_secrets

log = logging.getLogger("mixreorg_fast")
# Parameters of signed URLs: of S3, of Google's and Azure's storage, of CloudFront, and of others.
_SIGNATURE = re.compile(
    r"(?:X-(?:Amz|Goog)-[\w-]+|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Key-Pair-Id|Policy|token"
    r"|sig|s[eprtv]|spr|sk[estv]|sktid|skoid)=",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RemoteShard:
    """A shard at its source."""

    url: str  # such as hf://datasets/OWNER/NAME@COMMIT/PATH, s3://BUCKET/KEY or https://HOST/PATH
    size: int | None = None  # in bytes; None: its server tells when it is fetched
    checksum: str | None = None  # sha256:… or md5:… of its content; None: the source has none
    version: str = ""  # changes when the content does; empty: the source has none

    @property
    def place(self) -> Path:
        """Its path in a cache: that of the URL, and a mark of the version. It leaves out the commit of a hub's set,
        so that unchanged shards of a new commit are not fetched again."""
        scheme, _, path = self.url.partition("://")
        path = re.sub(r"^(datasets/[^/]+/[^/@]+)@[^/]+", r"\1", path) if scheme == "hf" else path
        path = re.sub(r"[^\w./+=-]", "_", path.split("?")[0]).replace("..", "_")
        named = Path(scheme, path)
        mark = hashlib.sha256((self.version or _unsigned(self.url)).encode()).hexdigest()[:8]
        return named.with_name(f"{named.name.removesuffix('.tar')}-{mark}.tar")

    def __str__(self) -> str:
        return without_secrets(self.url)


def _unsigned(url: str) -> str:
    """A URL without the parameters by which a server knows who asks and until when: they change with every signing."""
    address, _, query = url.partition("?")
    kept = [part for part in query.split("&") if not _SIGNATURE.match(part)]
    return "?".join(filter(None, (address, "&".join(kept))))


def is_remote(pattern: str) -> bool:
    """Whether a pattern names shards of a server."""
    return pattern.startswith(("hf://", "s3://", "https://", "http://"))


def list_shards(pattern: str, listings: Path) -> list[RemoteShard]:
    """The shards that a pattern stands for, in the order of the pattern; a glob's matches in alphabetical order.

    The source is asked once. Its answer is kept in the folder `listings`, for when the source cannot be reached.

    Args:
        pattern: ``hf://datasets/OWNER/NAME/PATTERN[@REVISION]``, ``s3://BUCKET/PATTERN`` or ``https://…``, with braces
            or, of the first two, globs.

    Raises:
        UserError: nothing matches; a named shard is missing; the source refuses, or cannot be reached and never was.
    """
    try:
        return _listed(pattern, listings)
    except UserError as error:
        raise UserError(without_secrets(str(error))) from None


def _listed(pattern: str, listings: Path) -> list[RemoteShard]:
    if pattern.startswith(("https://", "http://")):
        if re.search(r"[*\[]", pattern):
            raise UserError(f"{pattern}: a web server lists no files; name them, such as …/train-{{00000..00123}}.tar")
        if "@" in urlsplit(pattern).netloc:
            scheme = pattern.partition("://")[0]
            raise UserError(f"{scheme}://…: user and password belong in ~/.netrc, not in a pattern")
        return [RemoteShard(url) for url in dict.fromkeys(braces(pattern))]
    kept = listings / f"{hashlib.sha256(pattern.encode()).hexdigest()[:24]}.json"
    try:
        shards = (_hub if pattern.startswith("hf://") else _s3)(pattern)
    except ConnectionError as failure:
        with contextlib.suppress(OSError, ValueError, TypeError):
            shards = [RemoteShard(**entry) for entry in json.loads(kept.read_bytes())["shards"]]
            log.warning(
                without_secrets(f"{pattern} cannot be listed ({failure}); the list stored at its last use is read")
            )
            return shards
        raise UserError(f"{pattern} cannot be listed: {failure}") from None
    with contextlib.suppress(OSError):  # it is only for times without the source
        write_json(kept, {"pattern": pattern, "shards": [asdict(shard) for shard in shards]})
    return shards


def request(shard: RemoteShard) -> urllib.request.Request:
    """The HTTP request of a shard's content, with credentials. A redirection to another host does not get them.

    Raises:
        UserError: the shard is the hub's, and ``HF_HUB_OFFLINE`` is set.
    """
    if shard.url.startswith("hf://"):
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{shard}: it is not in the cache, and HF_HUB_OFFLINE is set")
        repository, path, revision = _hub_path(shard.url)
        url = hf_hub_url(repository, path, repo_type="dataset", revision=revision)
        headers = build_hf_headers(library_name="mixreorg_fast")
    elif shard.url.startswith("s3://"):
        url, headers = _s3_call("sign", shard.url, expiration=3600), {}  # seconds
    else:
        url, headers = quote(shard.url, safe=":/?&=%+,;@~#[]!$'()*"), _netrc(shard.url)
    asked = urllib.request.Request(url, headers={"User-Agent": headers.pop("user-agent", "mixreorg_fast")})
    for name, value in headers.items():
        asked.add_unredirected_header(name, value)
    return asked


def login_hint(url: str) -> str:
    """What to do when the source refuses a shard."""
    if url.startswith("hf://"):
        return "; `hf auth login`, and accept the set's terms on its page"
    return "; check AWS's credentials (`aws sts get-caller-identity`)" if url.startswith("s3://") else ""


def _hub_path(url: str) -> tuple[str, str, str | None]:
    """OWNER/NAME, PATTERN, REVISION of ``hf://datasets/OWNER/NAME/PATTERN@REVISION`` or ``…/NAME@REVISION/PATTERN``."""
    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/([^@]+)(?:@(.+))?", url)
    if not found or (found[2] and found[4]):
        raise UserError(f"{url}: expected hf://datasets/OWNER/NAME/PATTERN[@REVISION], such as …/train-*.tar")
    return found[1], found[3], found[2] or found[4]


def _hub(pattern: str) -> list[RemoteShard]:
    from huggingface_hub import HfApi, errors
    from huggingface_hub.hf_api import RepoFile

    repository, names, revision = _hub_path(pattern)
    api = HfApi(library_name="mixreorg_fast")
    folder, deep = _base(names)
    try:
        commit = api.dataset_info(repository, revision=revision).sha
        tree = api.list_repo_tree(repository, folder or None, recursive=deep, revision=commit, repo_type="dataset")
        found = {}
        for entry in tree:
            if isinstance(entry, RepoFile):
                url = f"hf://datasets/{repository}@{commit}/{entry.path}"
                checksum = f"sha256:{entry.lfs.sha256}" if entry.lfs else None
                version = entry.lfs.sha256 if entry.lfs else entry.blob_id
                found[entry.path] = RemoteShard(url, entry.size, checksum, version)
    except errors.GatedRepoError:
        raise UserError(f"{pattern}: gated{login_hint(pattern)}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{pattern}: the hub has no dataset {repository}, or it is private (`hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{pattern}: {repository} has no revision {revision}") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{pattern}: {repository} has no folder {folder}") from None
    except Exception as error:  # of the HTTP client that the hub's client happens to use
        raise ConnectionError(_one_line(error)) from None
    return _matches(pattern, names, found)


def _s3_call(method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of s3fs; without any credentials as an anonymous user, whom public buckets admit."""
    try:
        from botocore.exceptions import NoCredentialsError
        from s3fs import S3FileSystem
    except ImportError:
        raise UserError(f"s3:// needs s3fs: {extra('s3')}") from None
    try:
        return getattr(S3FileSystem(), method)(*arguments, **options)
    except NoCredentialsError:
        return getattr(S3FileSystem(anon=True), method)(*arguments, **options)


def _s3(pattern: str) -> list[RemoteShard]:
    path = pattern.removeprefix("s3://")
    folder, deep = _base(path)
    if not folder:
        raise UserError(f"{pattern}: expected s3://BUCKET/PATTERN")
    try:
        entries = _s3_call("find" if deep else "ls", folder, detail=True, refresh=True)
    except FileNotFoundError:
        raise UserError(f"{pattern}: there is no {folder}") from None
    except PermissionError as error:
        raise UserError(f"{pattern}: {_one_line(error)}{login_hint(pattern)}") from None
    except UserError:
        raise
    except Exception as error:  # of botocore
        raise ConnectionError(_one_line(error)) from None
    found = {}
    for entry in entries.values() if deep else entries:
        if entry["type"] == "file":
            tag = str(entry.get("ETag", "")).strip('"')
            whole = f"md5:{tag}" if re.fullmatch(r"[0-9a-f]{32}", tag) else None  # of an upload in one part
            found[entry["name"]] = RemoteShard(f"s3://{entry['name']}", entry["size"], whole, tag)
    return _matches(pattern, path, found)


def _base(pattern: str) -> tuple[str, bool]:
    """The folder that holds all that `pattern` stands for, and whether its subfolders do too."""
    folders = pattern.split("/")[:-1]
    fixed = list(itertools.takewhile(lambda part: not re.search(r"[*?\[{]", part), folders))
    return "/".join(fixed), len(fixed) < len(folders)


def _matches(pattern: str, names: str, found: dict[str, RemoteShard]) -> list[RemoteShard]:
    """The shards that the braces and globs of `names` stand for."""
    shards: dict[str, RemoteShard] = {}
    missing = []
    for name in braces(names):
        matches = [name] if name in found else []
        if glob.has_magic(name):
            some = (path for path in fnmatch.filter(found, name) if "**" in name or path.count("/") == name.count("/"))
            matches = sorted(path for path in some if Path(path).suffix in {".tar", Path(name).suffix} - {""})
        missing += [] if matches else [name]
        shards.update((path, found[path]) for path in matches)
    if missing:
        tars = sorted(path for path in found if path.endswith(".tar"))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{pattern}: no shard {missing[0]}{more}{nearest(missing[0], tars[:1] + tars[-1:])}")
    return list(shards.values())


def _netrc(url: str) -> dict[str, str]:
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if known := netrc.netrc().authenticators(urlsplit(url).hostname or ""):
            return {"Authorization": f"Basic {b64encode(f'{known[0]}:{known[2]}'.encode()).decode()}"}
    return {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
