"""Publish weights on the Hugging Face hub. Every command takes them from there by their name, owner/name."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..config import are_scenes
from ..data.shards.patterns import without_secrets
from ..errors import UserError, nearest
from ..files import checksum, json_or_empty
from ..models.weights import DESCRIPTION, TOKENIZER, WEIGHTS

if TYPE_CHECKING:
    from .model import Model

Format = Literal["ours", "hf"]
Kind = Literal["weights", "clipseg", "tokenizer"]

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# Where a path of this machine begins in a value of a configuration.
_LOCAL = re.compile(r"(?:^|[\s,{])(?:[/~]|\.\./)")
_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>.+))?", re.ASCII)
# The files that a repository needs, the preferred ones first. The last of each is fetched last.
_NEEDED: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "weights": ((WEIGHTS, DESCRIPTION), (WEIGHTS, "config.json"), ("pytorch_model.bin", "config.json")),
    "clipseg": ((WEIGHTS, "config.json"), ("pytorch_model.bin", "config.json")),
    "tokenizer": ((TOKENIZER,), ("vocab.json", "merges.txt")),
}
_MISSING: dict[Kind, str] = {
    "weights": "no file or folder {}; expected weights: a folder, a run's folder, a .pth file",
    "clipseg": "no folder {}; expected a CLIPSeg: a folder",
    "tokenizer": "no tokenizer {}; expected a tokenizer.json, a folder with one",
}
_WANTED: dict[Kind, str] = {
    "weights": f"weights of a GroupViT: expected {WEIGHTS} with {DESCRIPTION}, or config.json",
    "clipseg": f"weights of a CLIPSeg: expected {WEIGHTS} with config.json",
    "tokenizer": f"tokenizer: expected {TOKENIZER}, or vocab.json with merges.txt",
}
# Every file of either format. A push deletes those that it does not write, so that a repository has one format.
_FILES = {file for each in _NEEDED.values() for files in each for file in files}
_FILES |= {"preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json"}


# ---------------------------------------------------------------------- fetching


def locate(source: str | Path, kind: Kind = "weights") -> Path:
    """The file or folder `source`; where there is none, the cached folder of the repository ``owner/name[@revision]``.

    Args:
        kind: what `source` must have. Of a repository, only the files of this kind are fetched.
    Raises:
        UserError: there is neither; the hub cannot be reached, or refuses the repository; a file is damaged.
    """
    if Path(source).exists():
        return Path(source)
    if (found := _parsed(source)) is None:
        raise UserError(f"{_MISSING[kind].format(source)}, or owner/name[@revision] on the Hugging Face hub")
    from huggingface_hub import constants, try_to_load_from_cache

    name, revision = found
    try:
        with _in_one_line(name, revision, f"no folder {name}, and "):
            return _download(name, revision, kind)
    except UserError as error:
        for files in _NEEDED[kind]:
            copies = [try_to_load_from_cache(name, file, revision=revision) for file in files]
            if all(isinstance(path, str) for path in copies):
                if not constants.HF_HUB_OFFLINE:
                    print(f"{error}; the copy in the cache is used", file=sys.stderr, flush=True)
                return Path(str(copies[-1])).parent
        raise


def model_type(source: str | Path) -> str | None:
    """The ``model_type`` in the config.json of a folder or of a repository ``owner/name[@revision]``.

    None where there is no such file, or the hub cannot be asked and the cache has no copy; :func:`locate` says why.
    """
    path = Path(source) / "config.json"
    if not Path(source).exists() and (found := _parsed(source)):
        import huggingface_hub as hub

        name, revision = found
        with contextlib.suppress(UserError), _in_one_line(name, revision):
            about = hub.HfApi().model_info(name, revision=revision, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
            return (about.config or {}).get("model_type")
        path = Path(str(hub.try_to_load_from_cache(name, path.name, revision=revision)))
    return json_or_empty(path).get("model_type")


def _parsed(source: str | Path) -> tuple[str, str] | None:
    """Name and revision of a repository; None: `source` cannot name a repository."""
    found = _NAME.fullmatch(str(source))
    if found is None or str(source).endswith((".json", ".pth")):
        return None
    return found["name"], found["revision"] or "main"


def pinned(source: str | Path) -> str:
    """`source`; a repository is fetched and named by its commit, so that every process reads the same weights.

    Raises:
        UserError: as :func:`locate`.
    """
    folder = locate(source)
    return str(source) if Path(source).exists() else f"{str(source).partition('@')[0]}@{folder.name}"


def _download(name: str, revision: str, kind: Kind) -> Path:
    import huggingface_hub as hub

    timeout = hub.constants.HF_HUB_ETAG_TIMEOUT
    about = hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=timeout)
    there = {each.rfilename: each for each in about.siblings or ()}
    *files, last = next((files for files in _NEEDED[kind] if there.keys() >= set(files)), ("",))
    type = (about.config or {}).get("model_type", "groupvit")
    if not last or (kind == "weights" and last != DESCRIPTION and type != "groupvit"):
        raise UserError(f"{name} holds no {_WANTED[kind]}")
    if kind == "clipseg":
        files += [file for file in there if file not in (*files, last) and Path(file).suffix in (".json", ".txt")]
    elif kind == "weights":
        texts = (TOKENIZER,) if TOKENIZER in there else ("vocab.json", "merges.txt")
        files += [file for file in (*texts, "preprocessor_config.json") if file in there]
    path = Path()
    # The cache holds the last file only if it holds the others. The last file is fetched by the revision's name, so
    # that the cache can resolve this name without the hub.
    for file in (*files, last):
        known = isinstance(hub.try_to_load_from_cache(name, file, revision=about.sha), str)
        path = Path(hub.hf_hub_download(name, file, revision=revision if file == last else about.sha))
        if not known:
            _check(path, there[file], name)
    moved = path.parent.name != about.sha  # to another commit, since the first request
    return _download(name, path.parent.name, kind) if moved else path.parent


def _check(path: Path, about: Any, name: str) -> None:
    """Compare a file's checksum with the hub's; the client compares sizes only."""
    if about.lfs is not None:
        wanted, found = about.lfs.sha256, checksum(path)
    else:
        content = path.read_bytes()
        wanted, found = about.blob_id, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != wanted:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise UserError(f"{name}: {path.name} arrived damaged (its checksum is {found}, expected {wanted}); try again")


@contextlib.contextmanager
def _in_one_line(name: str, revision: str = "main", before: str = "") -> Iterator[None]:
    """Raise errors of the hub's client as a :class:`UserError`; `before` begins the message if the repository is
    missing or the hub cannot be reached."""
    from huggingface_hub import HfApi, constants, errors

    place = constants.ENDPOINT
    try:
        yield
        return
    except errors.GatedRepoError:
        message = f"{name} is gated: accept its conditions on {place}/{name}, then {LOG_IN}"
    except errors.RevisionNotFoundError:
        known: list[str] = []
        with contextlib.suppress(Exception):
            refs = HfApi().list_repo_refs(name)
            known = [each.name for each in (*refs.branches, *refs.tags)]
        message = f"{name} has no revision '{revision}' on {place}{nearest(revision, known)}"
    except errors.RepositoryNotFoundError:
        message = f"{before}no repository {name} on {place}; if it is private, {LOG_IN}"
    except errors.OfflineModeIsEnabled:
        message = f"{before}HF_HUB_OFFLINE is set, so {place} is not asked for {name}"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or error.response.reason_phrase
        message = f"{place} answers {status} for {name} ({reason}){f'; {LOG_IN}' if status in (401, 403) else ''}"
    except OSError as error:
        if error.strerror is not None:
            message = f"{error.filename or constants.HF_HUB_CACHE}: cannot be written ({error.strerror})"
        else:  # the client's own, such as a body that ends early
            message = f"{name} cannot be fetched from {place}: {str(error.__cause__ or error).splitlines()[0]}"
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        message = f"{before}{place} cannot be reached ({error or type(error).__name__})"
    raise UserError(message)


# ---------------------------------------------------------------------- publishing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="DIR", help="weights of any format, or a run's folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository; it is created where it does not exist")
    parser.add_argument("--format", choices=get_args(Format), default="ours", help="files to write (default: ours)")
    parser.add_argument("--private", action="store_true", help="only you may see the repository, if it is created")
    parser.add_argument("--license", metavar="ID", help="of the weights, as the hub names it, such as apache-2.0")


def main(args: argparse.Namespace) -> None:
    from .model import load

    print(push(load(args.weights), args.name, args.format, private=args.private, license=args.license))


def push(model: Model, name: str, format: Format = "ours", *, private: bool = False, license: str | None = None) -> str:
    """Publish a model as the repository ``owner/name``, in one commit, with a model card; returns the commit's address.

    Args:
        format: files of this project, or those of Hugging Face's GroupViT. private: of a repository that is created.
        license: the weights' licence as the hub names it, such as "apache-2.0".
    Raises:
        UserError: not logged in, no right to write there, no connection; with "hf", soft assignment.
    """
    import huggingface_hub as hub

    from .formats import save_huggingface

    if not (found := _NAME.fullmatch(name)) or found["revision"]:
        raise UserError(f"'{name}' is not the name of a repository; expected owner/name")
    if hub.get_token() is None:
        raise UserError(f"publishing needs an account on {hub.constants.ENDPOINT}: {LOG_IN}")
    with _in_one_line(name), tempfile.TemporaryDirectory(prefix="mixreorg-push-") as temporary:
        folder = Path(temporary) / "weights"
        if format == "hf":
            state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
            save_huggingface(model, folder, state | {"logit_scale": state["logit_scale"].reshape(())})
        else:
            model.save(folder)
        (folder / "README.md").write_text(str(card(model, name, format, license)), encoding="utf-8")
        api = hub.HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)  # None: as the owner's settings say
        others = sorted(_FILES - {path.name for path in folder.iterdir()})
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload weights", delete_patterns=others
        )
    return str(commit.commit_url)


def card(model: Model, name: str, format: Format, license: str | None) -> Any:
    """The model card: use, data, steps, scores and configuration, as far as the model's folder tells them."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    title, config = name.split("/")[1], model.config
    about, scores, step = _run_of(model.source)
    method = "MixReorg" if about and about["model"]["method"] == "mixreorg" else "GroupViT"
    data = ModelCardData(
        license=license,
        library_name="transformers" if format == "hf" else "mixreorg_fast",
        pipeline_tag="image-segmentation",
        tags=["open-vocabulary-segmentation", "zero-shot", "groupvit", *({method.lower()} - {"groupvit"})],
        model_name=title if scores else None,
        eval_results=[
            EvalResult("image-segmentation", each, each, "mIoU", values["mIoU"], metric_name="zero-shot mIoU (%)")
            for each, values in scores.items()
        ]
        or None,
    )
    size = sum(value.numel() for value in model.parameters()) / 1e6
    trained = table = "Not recorded."
    if about:
        shards, folder = about["data"]["shards"], about["data"].get("scenes", {}).get("folder", "")
        drawn = are_scenes(shards, folder)
        shown = "The drawn scenes of mixreorg_fast" if drawn else f"`{json.dumps(_public(shards))}`"
        trained = f"{shown}; {step} steps."
    if scores:
        rows = [f"| {each} | {values['mIoU']:.2f} | {values.get('images', '')} |" for each, values in scores.items()]
        table = "\n".join(["| dataset | zero-shot mIoU (%) | photos |", "|---|---|---|", *rows])
    settings = json.dumps(_public(about or config.model_dump(mode="json")), indent=2)
    return ModelCard(f"""---
{data.to_yaml()}
---

# {title}
{method}: open-vocabulary segmentation learned from image-text pairs, without masks.
{size:.1f} million parameters, images of {config.image_size} px, {config.groups[1]} segments.

## Use
```python
import mixreorg_fast

model = mixreorg_fast.load("{name}")
result = model.segment("photo.jpg", "cat, dog, sofa")
```

## Data and training
{trained}

## Scores
{table}

## Configuration
```json
{settings}
```

## Licence
{license or "Not stated."}
""")


def _run_of(source: Path | None) -> tuple[dict[str, Any], dict[str, Any], int | str]:
    """Configuration, scores by dataset, and step of the run that weights are of, as far as they are there."""
    if source is not None:
        for run in (source, *source.absolute().parents[:2]):  # RUN/checkpoints/step_*, or RUN/best
            if "train" in (about := json_or_empty(run / "config.json")):
                found = json_or_empty(run / "eval.json")
                scores = {key: each for key, each in found.items() if isinstance(each, dict) and "mIoU" in each}
                return about, scores, json_or_empty(source / "state.json").get("step", "an unknown number of")
    return {}, {}, ""


def _public(value: Any) -> Any:
    """A configuration's value without the folders of this machine, and without signatures and passwords in URLs."""
    if isinstance(value, Mapping):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_public(each) for each in value]
    if not isinstance(value, str):
        return value
    parts = re.split(r",\s*(?=[/~]|\w+://)", without_secrets(value))
    return ",".join(part.rsplit("/", 1)[-1] if _LOCAL.search(part) else part for part in parts)
