"""Indexes of shards: what they hold, when they are made anew, and what damaged tars leave."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mixreorg_fast.data.shards import index
from mixreorg_fast.data.shards.index import index_places, open_shard, report_places
from mixreorg_fast.data.shards.pair import write_shard
from mixreorg_fast.data.shards.scan import scan
from mixreorg_fast.data.shards.shard_set import open_shards
from mixreorg_fast.errors import UserError

from .conftest import pairs


class TestIndex:
    def test_samples_read_back(self, shards):
        opened = open_shards(shards)
        assert len(opened) == 30 and opened.sizes.tolist() == [13, 10, 7]
        expected = pairs(30)
        opened.open_for(np.arange(30))
        for number, pair in enumerate(expected):
            sample = opened.read(number)
            assert (sample.key, sample.image, sample.captions) == (pair.key, pair.image, pair.captions)
            assert sample.nouns == (pair.fields or {"nouns": []})["nouns"]
            assert opened.bad_sample(number, "").key == pair.key
        assert list(opened.captions()) == [caption for pair in expected for caption in pair.captions]
        assert 8 <= len(list(opened.captions(limit=5))) <= 16
        opened.close()

    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_all_tar_formats_and_long_names(self, tmp_path, format):
        path = tmp_path / "a.tar"
        folder = "f" * 90 if format == tarfile.USTAR_FORMAT else "f" * 150 + "/ö"
        with tarfile.open(path, "w", format=format) as tar:
            directory = tarfile.TarInfo("some")
            directory.type = tarfile.DIRTYPE
            tar.addfile(directory)
            for pair in pairs(3):
                for extension, data in (("JPG", pair.image), ("txt", b"hello"), ("cls", b"1")):
                    info = tarfile.TarInfo(f"{folder}/{'k' * 40}{pair.key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        shard = open_shard(path)
        assert [key.decode() for key in shard.samples["key"]] == [f"{folder}/{'k' * 40}{p.key}" for p in pairs(3)]
        with tarfile.open(path) as tar:
            offsets = [member.offset_data for member in tar if member.name.endswith("JPG")]
        assert (shard.samples["start"] + shard.samples["image_at"]).tolist() == offsets

    def test_index_is_kept_and_rebuilt_when_the_tar_changes(self, tmp_path, monkeypatch):
        path = tmp_path / "a.tar"
        write_shard(path, pairs(3))
        assert len(open_shard(path).samples) == 3 and index_places(path)[0].is_file()
        with monkeypatch.context() as patch:
            patch.setattr(index, "scan", lambda path: pytest.fail("scanned again"))
            assert len(open_shard(path).samples) == 3
        write_shard(path, pairs(5))
        assert len(open_shard(path).samples) == 5
        index_places(path)[0].write_bytes(b"\x00garbage")
        assert len(open_shard(path).samples) == 5

    def test_index_goes_to_the_cache_when_the_folder_is_read_only(self, tmp_path, monkeypatch):
        path = tmp_path / "a.tar"
        write_shard(path, pairs(3))
        beside, cached = index_places(path)
        # Root may write anywhere, so the refusal is staged.
        write = index.atomic_path

        def refuse(target):
            if target == beside:
                raise PermissionError
            return write(target)

        monkeypatch.setattr(index, "atomic_path", refuse)
        assert len(open_shard(path).samples) == 3
        assert not beside.exists() and cached.is_file()

    @pytest.mark.parametrize("part", ["header", "image"])
    def test_a_cut_tar_is_used_up_to_the_cut(self, tmp_path, caplog, part):
        path = tmp_path / "a.tar"
        write_shard(path, pairs(6))
        with tarfile.open(path) as tar:
            image = tar.getmember("0004.jpg")
        os.truncate(path, {"header": image.offset + 100, "image": image.offset_data + 100}[part])
        opened = open_shards(str(path))
        assert len(opened) == 4 and opened.lost == 1 and opened.bad == [(str(path), "", "cut short")]
        assert report_places(path)[0].read_text() == "\tcut short\n"
        assert len(caplog.records) == 1 and f"{path}: cut short; its 4 whole samples are used" in caplog.text
        assert open_shards(str(path)).lost == 1  # from the kept index

    @pytest.mark.parametrize("filling", [b"\0", b"\xff"], ids=["zeros", "noise"])
    def test_a_damaged_stretch_is_reported_and_the_rest_is_used(self, tmp_path, caplog, filling):
        """Of 50 samples, 20 lie in a stretch from the middle of one photo to the middle of another."""
        path = tmp_path / "a.tar"
        write_shard(path, pairs(50))
        with tarfile.open(path) as tar:
            start, stop = (tar.getmember(f"{key}.jpg").offset_data + 100 for key in ("0010", "0030"))
            first, following = tar.getmember("0010.txt").offset, tar.getmember("0030.txt").offset
        content = bytearray(path.read_bytes())
        content[start:stop] = filling * (stop - start)
        path.write_bytes(content)
        for _ in range(2):  # scanned, then from the index
            opened = open_shards(str(path))
            keys = [f"{number:04d}".encode() for number in (*range(10), *range(31, 50))]
            assert opened.shards[0].samples["key"].tolist() == keys
            assert opened.bad == [
                (str(path), "0010", "no caption (.txt)"),
                (str(path), "0030", "no image (.jpg, .jpeg, .png, .webp)"),
                (str(path), "", f"{following - first} bytes at byte {first} cannot be read"),
            ]
            assert abs(opened.lost - 21) <= 2  # estimated by the bytes
            assert f"a.tar: {following - first} bytes at byte {first} cannot be read; its 29 whole" in caplog.text
            caplog.clear()
        assert len(report_places(path)[0].read_text().splitlines()) == 3

    def test_what_lies_behind_the_end_marker(self, tmp_path):
        path = tmp_path / "a.tar"

        def lost(content: bytes) -> tuple[int, list[tuple[str, int]]]:
            path.write_bytes(content)
            samples, left_out = scan(path)
            return len(samples), [entry[1:] for entry in left_out]

        write_shard(path, pairs(6))
        whole = path.read_bytes()
        with tarfile.open(path) as tar:
            at = max(member.offset_data for member in tar) + 512
        assert lost(whole) == (6, [])
        joined = f"another tar begins at byte {len(whole)}; its samples are used"
        assert lost(whole + whole) == (12, [(joined, 1)])
        assert lost(whole + b"x" * 700) == (6, [(f"700 bytes behind the end marker at byte {at} cannot be read", 1)])
        zeros = len(whole) - at + 20480  # a download that was allocated before it broke off
        assert lost(whole + bytes(20480)) == (6, [(f"{zeros} bytes at byte {at} are zeros", round(6 * zeros / at))])

    def test_a_tar_without_its_first_header(self, tmp_path):
        path = tmp_path / "a.tar"
        write_shard(path, pairs(3))
        path.write_bytes(bytes(512) + path.read_bytes()[512:])
        opened = open_shards(str(path))
        assert opened.shards[0].samples["key"].tolist() == [b"0001", b"0002"] and opened.lost == 2

    def test_incomplete_samples_are_left_out(self, tmp_path):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as tar:
            for name in ("0.jpg", "1.jpg", "1.txt", "2.txt", "3.txt", "3.png"):
                info = tarfile.TarInfo(name)
                info.size = 4
                tar.addfile(info, io.BytesIO(b"data"))
        samples, left_out = scan(path)
        assert [sample["key"] for sample in samples] == [b"1", b"3"]
        assert left_out == [("0", "no caption (.txt)", 1), ("2", "no image (.jpg, .jpeg, .png, .webp)", 1)]
        opened = open_shards(str(path))
        assert opened.lost == 2 and [bad.key for bad in opened.bad] == ["0", "2"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "empty file"),
            (b"no tar at all" * 100, "not a tar"),
            (b"short", "not a tar"),
            (gzip.compress(b"x" * 2000, mtime=0), "compressed tar"),
            (bytes(10240), "no samples"),
        ],
    )
    def test_what_is_no_shard(self, tmp_path, content, message):
        path = tmp_path / "a.tar"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: .*{message}"):
            open_shards(str(path))

    def test_useless_shards_among_others_are_left_out_and_counted(self, tmp_path, caplog):
        write_shard(tmp_path / "a.tar", pairs(4))
        (tmp_path / "b.tar").touch()
        (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
        (tmp_path / "d.tar").write_bytes(bytes(10240))  # a tar without members has lost nothing
        write_shard(tmp_path / "e.tar", pairs(6))
        for _ in range(2):  # scanned, then from the indexes
            opened = open_shards(str(tmp_path / "*.tar"))
            assert opened.sizes.tolist() == [4, 0, 0, 0, 6]
            assert [Path(bad.shard).name for bad in opened.bad] == ["b.tar", "c.tar"]
            assert opened.lost == 2 * round((4 + 0 + 6) / 3)  # each as much as the mean of the others
            assert sum("holds no sample" in r.message or "0 whole samples" in r.message for r in caplog.records) == 3
            caplog.clear()

    def test_a_shard_that_has_vanished_keeps_its_place(self, shards, caplog):
        sizes = open_shards(shards).sizes.tolist()
        second = sorted(Path(shards).parent.glob("*.tar"))[1]
        second.unlink()
        for pattern in (shards, str(Path(shards).parent / "*.tar")):
            opened = open_shards(pattern)
            assert opened.sizes.tolist() == sizes and opened.shards[1].gone
            assert f"{second} is gone" in caplog.text
        index_places(second)[0].unlink()
        assert len(open_shards(str(Path(shards).parent / "*.tar"))) == 20
        with pytest.raises(UserError, match="no shard .*train-000001.tar"):
            open_shards(shards)

    def test_shards_that_have_all_vanished_are_missing(self, shards):
        open_shards(shards)
        for path in Path(shards).parent.glob("*.tar"):
            path.unlink()
        with pytest.raises(UserError, match="no shard"):
            open_shards(shards)

    def test_keys_cannot_forge_lines(self, tmp_path):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("a\tb\n\x1b[31mc.jpg")
            tar.addfile(info, io.BytesIO())
        open_shard(path)
        text = report_places(path)[0].read_text()
        assert text.count("\n") == text.count("\t") == 1 and "\x1b" not in text
