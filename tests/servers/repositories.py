"""What the hub's server holds: repositories with their commits, users, and the faults that tests ask for."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKEN, USER = "hf_test", "owner"
DATE = "2026-01-01T00:00:00.000Z"
# Stored as LFS objects whatever their size, as the hub's .gitattributes has it; other files only from 10 MB.
LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".parquet", ".zip")
LFS_SIZE = 10_000_000

Files = Mapping[str, bytes]


@dataclasses.dataclass
class Fault:
    """What goes wrong with the requests whose path fits `path` (as of fnmatch), `times` times.

    Attributes:
        path: of the URL, decoded; of an LFS object ``/objects/OWNER/NAME/SHA256/PATH``, so that ``*/PATH`` fits both.
        methods: the methods it concerns.
        status, headers: an answer in place of the file, such as 429 with Retry-After.
        cut: bytes of the body after which the connection ends.
        truncate: bytes of the body that are sent as if they were all.
        content: the body in place of the true one.
        delay: seconds before the answer. rate: bytes per second.
        times: requests that it concerns, then it is over; None: every one.
    """

    path: str
    methods: tuple[str, ...] = ("GET",)
    status: int | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cut: int | None = None
    truncate: int | None = None
    content: bytes | None = None
    delay: float = 0.0
    rate: float | None = None
    times: int | None = 1


class Repo:
    """A repository: its commits (oid to files), and its branches and tags (name to oid)."""

    def __init__(self, kind: str, name: str, private: bool, gated: bool):
        self.kind, self.name, self.private, self.gated = kind, name, private, gated
        self.commits: dict[str, dict[str, bytes]] = {}
        self.titles: dict[str, str] = {}
        self.refs: dict[str, str] = {}
        self.commit({}, "initial commit")

    def commit(self, files: Files, title: str = "a commit", branch: str = "main") -> str:
        """Make `files` all that `branch` holds; returns the commit's oid."""
        parent = self.refs.get(branch, "")
        digest = hashlib.sha1(f"{self.kind} {self.name} {parent} {title}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        oid = digest.hexdigest()
        self.commits[oid], self.titles[oid], self.refs[branch] = dict(files), title, oid
        return oid

    def tag(self, name: str, revision: str = "main") -> None:
        self.refs[name] = self.refs.get(revision, revision)

    @property
    def files(self) -> dict[str, bytes]:
        """What the main branch holds."""
        return self.commits[self.refs["main"]]


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE


def blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree lists it."""
    if not is_lfs(path, len(content)):
        return {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}
    sha = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()
    lfs = {"oid": sha, "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(content), "oid": blob_oid(pointer), "lfs": lfs}


class Hub:
    """The server's state.

    Attributes:
        url: of the server. repos: by kind ("model", "dataset") and name.
        tokens: users by token. granted: (user, repository) with access to a gated repository.
        faults: see :class:`Fault`; the first that fits a request is taken.
        requests: ``"METHOD /path"`` of every request so far. page: entries of a tree per answer.
        pauses: seconds that this process's client would have waited between retries.
    """

    def __init__(self, port: int):
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {TOKEN: USER}
        self.granted: set[tuple[str, str]] = set()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.page = 1000
        self.pauses: list[float] = []
        self.lock = threading.RLock()

    def add(
        self,
        name: str,
        files: Files | Path = {},  # noqa: B006 - not changed
        *,
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """A repository with one commit of `files`: bytes by path, or a folder to read."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        with self.lock:
            repo = self.repos[kind, name] = Repo(kind, name, private, gated)
            if files:
                repo.commit(files)
        return repo

    def fail(self, path: str, **fault: Any) -> Fault:
        """Add a fault (see :class:`Fault`); returns it."""
        self.faults.append(Fault(path, **fault))
        return self.faults[-1]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if method in fault.methods and fnmatch.fnmatchcase(path, fault.path) and fault.times != 0:
                    fault.times = fault.times and fault.times - 1
                    return fault
        return None

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables that send a process here, with its cache in `home`."""
        values = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**values, "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}
