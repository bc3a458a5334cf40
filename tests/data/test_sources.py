"""Shards from Parquet files and from img2dataset's output; builds in parallel, interrupted, and gone on with."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from mixreorg_fast import cli
from mixreorg_fast.data.shards.build import build
from mixreorg_fast.data.shards.shard_set import ShardSet, open_shards
from mixreorg_fast.errors import UserError

from .conftest import pairs, photo

pa = pytest.importorskip("pyarrow", reason="Parquet files are read with pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def contents(shards: list[Path]) -> dict[str, tuple[bytes, list[str], list[str]]]:
    """Photo, captions and nouns by key."""
    opened: ShardSet = open_shards([str(path) for path in shards])
    opened.open_for(range(len(opened)))
    samples = [opened.read(number) for number in range(len(opened))]
    opened.close()
    return {sample.key: (sample.image, sample.captions, sample.nouns) for sample in samples}


def table(path: Path, columns: dict, rows_per_group: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def out(folder: Path, name: str = "t") -> str:
    return f"{folder}/{name}-{{0000..}}.tar"


class TestParquet:
    @pytest.mark.parametrize(
        ("image", "caption"), [("image", "caption"), ("jpg", "TEXT"), ("bytes", "text"), ("image.bytes", "txt")]
    )
    def test_usual_columns(self, tmp_path, image, caption):
        photos = [photo(number) for number in range(12)]
        path = table(
            tmp_path / "a.b.parquet", {image: photos, caption: [f"thing {n}" for n in range(12)], "id": photos}
        )
        built = build(path, out(tmp_path), samples_per_shard=5, progress=False)
        assert [path.name for path in built.shards] == ["t-0000.tar", "t-0001.tar", "t-0002.tar"]
        found = contents(built.shards)
        assert list(found) == [f"a_b-{row:08d}" for row in range(12)]
        assert [(image, texts) for image, texts, _ in found.values()] == [
            (each, [f"thing {n}"]) for n, each in enumerate(photos)
        ]

    def test_hugging_face_images_lists_of_captions_and_unusable_rows(self, tmp_path):
        images = [
            {"bytes": photo(0), "path": None},
            {"bytes": photo(1, format="PNG"), "path": "1.png"},
            {"bytes": None, "path": "/etc/passwd"},
            {"bytes": b"<html>", "path": None},
            None,
            {"bytes": photo(5, format="WEBP"), "path": None},
            {"bytes": photo(6), "path": None},
        ]
        captions = [["a\tred\nthing", "", "two"], ["one"], ["x"], ["x"], ["x"], ["x"], []]
        path = table(tmp_path / "in" / "part.parquet", {"image": images, "captions": captions}, 2)
        (tmp_path / "nouns").write_text("thing\n")
        built = build(path.parent, out(tmp_path), nouns=tmp_path / "nouns", samples_per_shard=3, progress=False)
        assert contents(built.shards) == {
            "part-00000000": (photo(0), ["a red thing", "two"], ["thing"]),
            "part-00000001": (photo(1, format="PNG"), ["one"], []),
            "part-00000005": (photo(5, format="WEBP"), ["x"], []),
        }
        assert {bad.key[-1]: bad.reason for bad in built.skipped} == {
            "2": "the table holds the path of a photo, not the photo",
            "3": "not a JPEG, PNG or WebP image",
            "4": "no image",
            "6": "empty caption",
        }
        assert (tmp_path / "t.skipped.tsv").read_text().count("\n") == 4

    def test_columns_are_named(self, tmp_path, capsys):
        path = table(tmp_path / "a.parquet", {"picture": [photo(0)], "alt": ["a thing"], "n": [1]})
        command = ["shards", "build", str(path), "--out", out(tmp_path), "--workers", "1"]
        assert cli.main(command) == 2
        assert "which column is the image? name it with --image-column (there are: picture, alt, n)" in (
            capsys.readouterr().err
        )
        assert cli.main([*command, "--image-column", "pictur", "--caption-column", "alt"]) == 2
        assert "did you mean 'picture'" in capsys.readouterr().err
        assert cli.main([*command, "--image-column", "picture", "--caption-column", "alt"]) == 0
        assert "wrote 1 samples" in capsys.readouterr().out

    def test_splits_of_a_folder(self, tmp_path):
        columns = {"image": [photo(0), photo(1)], "caption": ["a", "b"]}
        for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
            table(tmp_path / "in" / f"{name}.parquet", columns)
        built = build(tmp_path / "in", out(tmp_path), split="train", progress=False)
        assert built.samples == 4 and all(key.startswith("train-0000") for key in contents(built.shards))
        assert build(tmp_path / "in", out(tmp_path, "all"), progress=False).samples == 6
        with pytest.raises(UserError, match=r"no Parquet files of split 'trian' \(did you mean 'train'\?\)"):
            build(tmp_path / "in", out(tmp_path, "x"), split="trian", progress=False)

    def test_nothing_to_use(self, tmp_path):
        path = table(tmp_path / "a.parquet", {"image": [b"no"], "caption": ["x"]})
        with pytest.raises(UserError, match="none of 1 samples can be used: not a JPEG"):
            build(path, out(tmp_path), progress=False)
        assert os.listdir(tmp_path) == ["a.parquet"]
        table(path, {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
        with pytest.raises(UserError, match=r"a\.parquet: no samples$"):
            build(path, out(tmp_path), progress=False)
        path.write_bytes(b"PAR1 no")
        with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
            build(path, out(tmp_path), progress=False)


@pytest.fixture
def downloaded(tmp_path) -> Path:
    """What img2dataset leaves: two finished shards of 6 samples (two unusable) and an unfinished shard."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for number in range(3):
        rows = []
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for place, pair in enumerate(pairs(6, 6 * number)):
                key = f"{number:05d}{place:04d}"
                status = "failed_to_resize" if (number, place) == (1, 2) else "success"
                rows.append({"key": key, "status": status, "caption": pair.captions[0]})
                members = {"jpg": pair.image, "txt": pair.captions[0].encode(), "json": json.dumps(rows[-1]).encode()}
                if (number, place) == (1, 4):
                    del members["txt"]
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
        if number < 2:
            stats = {"count": 8, "successes": 6, "failed_to_download": 2}
            (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))
    return folder


class TestImg2dataset:
    def test_finished_shards_and_successes(self, downloaded, tmp_path, capsys):
        command = ["shards", "build", str(downloaded), "--out", out(tmp_path), "--samples-per-shard", "5"]
        assert cli.main([*command, "--workers", "1"]) == 0
        said = capsys.readouterr().out
        assert "wrote 10 samples" in said and "t-0002.tar, 3 shards" in said
        assert "skipped 1: status failed_to_resize" in said and "skipped 1: no caption (.txt)" in said
        assert "skipped 1: img2dataset did not finish this tar" in said
        found = contents(sorted(tmp_path.glob("t-*.tar")))
        expected = pairs(12)
        assert list(found) == [f"0000{n // 6}000{n % 6}" for n in range(12) if n not in (8, 10)]
        assert found["000010005"] == (expected[11].image, expected[11].captions[:1], [])

    def test_other_tars_are_told_from_them(self, downloaded, tmp_path):
        for path in downloaded.glob("*_stats.json"):
            path.unlink()
        with pytest.raises(UserError, match=r"00000\.tar has no 00000_stats\.json; .*trained on as they are"):
            build(downloaded, out(tmp_path), progress=False)

    def test_options_of_other_sources(self, downloaded, tmp_path):
        with pytest.raises(UserError, match="--split x: not for "):
            build(downloaded, out(tmp_path), split="x", progress=False)
        with pytest.raises(UserError, match="--image-column x: not for .*, which is a folder of tars"):
            build(downloaded, out(tmp_path), image_column="x", progress=False)
        with pytest.raises(UserError, match=r"no .*downloade.* \(did you mean '.*downloaded'\?\)"):
            build(tmp_path / "downloade", out(tmp_path), progress=False)


def test_any_number_of_workers_writes_the_same_bytes(photos, tmp_path):
    one, two = (
        build(photos, out(tmp_path / str(workers)), samples_per_shard=7, workers=workers, progress=False).shards
        for workers in (1, 2)
    )
    assert [path.name for path in two] == [path.name for path in one]
    assert [path.read_bytes() for path in two] == [path.read_bytes() for path in one]


# Reads a photo at a time, slowly, so that there is a middle to be killed in.
SLOW = """
import sys, time
from pathlib import Path
from mixreorg_fast import cli
read = Path.read_bytes
Path.read_bytes = lambda path: time.sleep(0.05) or read(path)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.launch
def test_a_killed_build_goes_on_and_ends_the_same(photos, tmp_path, capsys):
    whole = build(photos, out(tmp_path / "whole"), samples_per_shard=4, progress=False).shards
    command = ["shards", "build", str(photos), "--out", out(tmp_path / "cut"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command, "--samples-per-shard", "4"], stderr=subprocess.PIPE
    )
    hidden = tmp_path / "cut" / ".t.building"
    until = time.monotonic() + 120
    while not (hidden / "00000002.json").is_file() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert os.listdir(tmp_path / "cut") == [".t.building"]  # nothing that a reader would take for whole
    kept = {path.name: path.stat().st_mtime_ns for path in hidden.glob("0*.tar")}
    assert 3 <= len(kept) < 8

    assert cli.main([*command, "--samples-per-shard", "5"]) == 2
    error = capsys.readouterr().err
    assert "unfinished build with other arguments (it had samples_per_shard 4)" in error

    times = {}
    publish = os.replace

    def replace(source, target):
        if Path(source).parent == hidden and Path(source).name in kept:
            times[Path(source).name] = Path(source).stat().st_mtime_ns
        publish(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert cli.main([*command, "--samples-per-shard", "4"]) == 0
    assert times == kept  # they were not written again
    cut = sorted((tmp_path / "cut").iterdir())
    assert [path.name for path in cut] == [path.name for path in whole]
    assert [path.read_bytes() for path in cut] == [path.read_bytes() for path in whole]


def test_killed_while_the_shards_get_their_names(photos, tmp_path, monkeypatch):
    whole = build(photos, out(tmp_path / "whole"), samples_per_shard=4, progress=False).shards
    build(photos, out(tmp_path / "cut"), split="val", samples_per_shard=1, progress=False)  # more, to be replaced
    publish = os.replace
    left = 3

    def replace(source, target):
        nonlocal left
        if Path(target).name.startswith("t-"):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        publish(source, target)

    arguments = {"samples_per_shard": 4, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            build(photos, out(tmp_path / "cut"), overwrite=True, **arguments)
    built = build(photos, out(tmp_path / "cut"), **arguments)
    assert sorted((tmp_path / "cut").iterdir()) == built.shards and built.samples == 30
    assert [path.read_bytes() for path in built.shards] == [path.read_bytes() for path in whole]


def test_a_source_that_has_changed_is_told(photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mixreorg_fast.data.shards.build.Target.publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(photos, out(tmp_path), progress=False)
    os.utime(photos / "captions.tsv")
    with pytest.raises(UserError, match="the source has changed since"):
        build(photos, out(tmp_path), progress=False)


def test_parts_without_a_record_are_not_taken_for_finished(photos, tmp_path):
    hidden = tmp_path / ".t.building"
    hidden.mkdir()
    (hidden / "00000000.tar").write_bytes(b"old")
    (hidden / "00000000.json").write_text('{"samples": 1, "bytes": 3, "skipped": []}')
    assert build(photos, out(tmp_path), progress=False).samples == 30


def test_two_builds_of_the_same_shards(photos, tmp_path):
    import fcntl

    (tmp_path / ".t.building").mkdir()
    with open(tmp_path / ".t.building" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is building"):
            build(photos, out(tmp_path), progress=False)
