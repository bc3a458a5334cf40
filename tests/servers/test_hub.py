"""The hub's server answers as the installed ``huggingface_hub`` expects, with and without faults."""

from __future__ import annotations

import hashlib

import pytest

from .repositories import TOKEN, USER, blob_oid

hf = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": bytes(range(256)) * 40,
    "data/train 1.tar": b"tar" * 100,
    "data/deep/x.txt": b"x",
}


def test_downloads_with_revisions_and_a_cache(hub, tmp_path):
    repo = hub.add("owner/model", FILES)
    first = repo.refs["main"]
    repo.tag("v1")
    repo.commit({**FILES, "config.json": b'{"a": 2}'})
    folder = tmp_path / "home" / "hub" / "models--owner--model" / "snapshots"
    path = hf.hf_hub_download("owner/model", "model.safetensors")
    assert path == str(folder / repo.refs["main"] / "model.safetensors")
    with open(path, "rb") as file:
        assert file.read() == FILES["model.safetensors"]
    old = hf.snapshot_download("owner/model", revision="v1")
    assert old == str(folder / first)
    assert {str(p.relative_to(old)): p.read_bytes() for p in (folder / first).rglob("*") if p.is_file()} == FILES
    before = len(hub.requests)
    assert hf.snapshot_download("owner/model", revision=first) == old
    assert not [each for each in hub.requests[before:] if "resolve" in each or "objects" in each]

    api = hf.HfApi()
    assert (
        api.model_info("owner/model").sha == repo.refs["main"]
        and api.repo_info("owner/model", revision="v1").sha == first
    )
    siblings = api.model_info("owner/model", files_metadata=True).siblings
    assert {each.rfilename: each.size for each in siblings} == {path: len(content) for path, content in FILES.items()}
    hub.page = 2
    tree = {each.path: each for each in api.list_repo_tree("owner/model", recursive=True, expand=True)}
    assert tree.keys() == {*FILES, "data", "data/deep"} and tree["config.json"].blob_id == blob_oid(b'{"a": 2}')
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert [each.path for each in api.list_repo_tree("owner/model", "data")] == ["data/deep", "data/train 1.tar"]
    for call, error in (
        (lambda: hf.hf_hub_download("owner/no", "config.json"), errors.RepositoryNotFoundError),
        (lambda: hf.snapshot_download("owner/model", revision="v9"), errors.RevisionNotFoundError),
        (lambda: hf.hf_hub_download("owner/model", "no.json"), errors.RemoteEntryNotFoundError),
    ):
        with pytest.raises(error):
            call()


def test_datasets_as_a_file_system(hub):
    hub.add("owner/shards", FILES, kind="dataset")
    assert hf.HfApi().dataset_info("owner/shards").id == "owner/shards"
    files = hf.HfFileSystem()
    assert files.glob("datasets/owner/shards/data/*.tar") == ["datasets/owner/shards/data/train 1.tar"]
    info = files.info("datasets/owner/shards/data/train 1.tar")
    assert info["size"] == 300 and info["lfs"].sha256 == hashlib.sha256(b"tar" * 100).hexdigest()
    with files.open("datasets/owner/shards/data/train 1.tar", "rb", block_size=64) as file:
        file.seek(100)
        assert file.read(7) == (b"tar" * 100)[100:107]
    assert (
        files.cat_file("datasets/owner/shards/model.safetensors", start=300, end=310)
        == FILES["model.safetensors"][300:310]
    )


def test_who_may_read_and_write(hub):
    hub.add("owner/gated", FILES, gated=True)
    hub.add("owner/private", FILES, private=True)
    hub.tokens["other"] = "guest"
    for token in (False, "other"):
        with pytest.raises(errors.GatedRepoError):
            hf.hf_hub_download("owner/gated", "model.safetensors", token=token)
        with pytest.raises(errors.RepositoryNotFoundError):
            hf.hf_hub_download("owner/private", "model.safetensors", token=token)
    hub.granted.add(("guest", "owner/gated"))
    assert hf.hf_hub_download("owner/gated", "model.safetensors", token="other")
    assert hf.hf_hub_download("owner/private", "model.safetensors", token=TOKEN)
    assert hf.HfApi(token=TOKEN).whoami()["name"] == USER
    for token, name in ((False, "owner/new"), ("other", "owner/new"), ("wrong", "owner/new")):
        with pytest.raises(errors.HfHubHTTPError):
            hf.HfApi(token=token).create_repo(name)


def test_uploads(hub, tmp_path):
    folder = tmp_path / "folder"
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Weights\n")
    api = hf.HfApi(token=TOKEN)
    assert api.create_repo("owner/new", private=True).repo_id == "owner/new"
    commit = api.upload_folder(repo_id="owner/new", folder_path=folder, commit_message="Upload")
    repo = hub.repos["model", "owner/new"]
    assert repo.private and repo.refs["main"] == commit.oid
    assert repo.files == {**FILES, "README.md": (folder / "README.md").read_bytes()}
    api.create_repo("owner/new", exist_ok=True)
    (folder / "config.json").write_bytes(b"{}")
    before = len(hub.requests)
    api.upload_folder(repo_id="owner/new", folder_path=folder, delete_patterns="data/*")
    assert repo.files["config.json"] == b"{}" and "data/deep/x.txt" in repo.files
    assert not [each for each in hub.requests[before:] if each.startswith("PUT")], "LFS objects that the hub has"


def test_faults(hub, tmp_path):
    hub.add("owner/model", FILES)

    def download(**options) -> bytes:
        with open(hf.hf_hub_download("owner/model", "model.safetensors", force_download=True, **options), "rb") as file:
            return file.read()

    content = FILES["model.safetensors"]
    hub.fail("*/model.safetensors", cut=100, times=2)
    assert download() == content and len(hub.pauses) == 2
    assert hub.requests.count(hub.requests[-1]) == 3
    hub.fail("*/model.safetensors", status=429, headers={"Retry-After": "7"})
    assert download() == content and hub.pauses[2:] == [8]
    hub.fail("*/model.safetensors", status=503)
    with pytest.raises(errors.HfHubHTTPError, match="503"):
        download()
    hub.fail("*/model.safetensors", truncate=100)
    with pytest.raises(OSError, match="Consistency check"):
        download()
    hub.fail("*/model.safetensors", content=content[::-1], delay=0.05, rate=100_000)
    assert download() == content[::-1], "the client compares sizes only"
    hub.fail("*/model.safetensors", methods=("HEAD",), status=500, times=None)
    with pytest.raises(Exception):  # noqa: B017 - of several kinds, by the client's version
        download()
