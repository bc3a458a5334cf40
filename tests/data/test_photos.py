"""Shards from photo files: beside text files, and in tables of all the forms that people have."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from mixreorg_fast import cli
from mixreorg_fast.data.shards.build import Built, build
from mixreorg_fast.data.shards.shard_set import open_shards
from mixreorg_fast.errors import UserError

from .conftest import photo


def shards_of(source: Path, **options) -> tuple[dict[str, list[str]], Built]:
    """Captions by key of the shards that are built of `source`, and what the build says."""
    built = build(source, f"{source.parent}/out/t-{{0..}}.tar", overwrite=True, progress=False, **options)
    opened = open_shards([str(path) for path in built.shards])
    opened.open_for(np.arange(len(opened)))
    samples = [opened.read(number) for number in range(len(opened))]
    opened.close()
    return {sample.key: sample.captions for sample in samples}, built


def reasons(built: Built) -> dict[str, str]:
    return {bad.key: bad.reason for bad in built.skipped}


def test_what_gives_no_sample_is_left_out_and_listed(photos, tmp_path, capsys):
    """A header row, a missing photo, a TIFF, one under a wrong name, lines that lack something: 28 samples of 30."""
    images = photos / "images"
    (images / "p03.jpg").unlink()
    (images / "p04.jpg").write_bytes(photo(4, format="TIFF"))
    (images / "q.tiff").write_bytes(photo(5, format="TIFF"))
    (images / "p06.jpg").write_bytes(photo(6, format="PNG"))
    lines = (photos / "captions.tsv").read_bytes()
    more = b"no tab\np07.jpg\t \n\tno name\n/etc/passwd\tx\n\np08.jpg\tsch\xf6n\nq.tiff\ta quad\n"
    (photos / "captions.tsv").write_bytes(b"image\tcaption\n" + lines + more)
    out = f"{tmp_path}/out/t-{{0..}}.tar"
    assert cli.main(["shards", "build", str(photos), "--out", out, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    listing = tmp_path / "out" / "t.skipped.tsv"
    assert "wrote 28 samples" in printed and "skipped 2: not a JPEG, PNG or WebP image" in printed
    assert str(listing) in printed
    rows = [line.split("\t") for line in listing.read_text().splitlines()]
    assert {key: reason.partition(f" {tmp_path}")[0] for _, key, reason in rows} == {
        "line 62": "no caption in this line",
        "line 63": "no caption in this line",
        "line 64": "no photo in this line",
        "/etc/passwd": "leads out of",
        "line 67": "not UTF-8",
        "p03.jpg": "no such photo in",
        "p04.jpg": "not a JPEG, PNG or WebP image",
        "q.tiff": "not a JPEG, PNG or WebP image",
    }
    opened = open_shards(f"{tmp_path}/out/t-0.tar")
    opened.open_for([4])
    assert opened.read(4).key == "p06" and opened.read(4).image == photo(6, format="PNG")


def test_quotes_of_captions_tsv_are_kept(photos):
    (photos / "captions.tsv").write_text('p00.jpg\t"Stop" it says\np01.jpg\ta 5" pipe\twith a tab\np02.jpg\t"open\n')
    captions, built = shards_of(photos)
    assert captions == {"p00": ['"Stop" it says'], "p01": ['a 5" pipe with a tab'], "p02": ['"open']}
    assert not built.skipped and not built.skipped_list.exists()


TABLES = {
    "captions.csv": 'image,caption\n0.jpg,"a cat, and a dog"\n1.jpg,two\n0.jpg,"a second\nline"\n',
    "windows.csv": '\ufeffFile_Name;Text\r\n0.jpg;"a cat, and a dog"\r\n1.jpg;two\r\n0.jpg;a second line\r\n',
    "open_clip.csv": "filepath\ttitle\n0.jpg\ta cat, and a dog\n1.jpg\ttwo\n0.jpg\ta second line\n",
    "flickr30k.csv": "image_name| comment_number| comment\n0.jpg| 0| a cat, and a dog\n1.jpg| 0| two\n"
    "0.jpg| 1| a second line\n",
    "results.tsv": "id\timage\tcaption\n1\t0.jpg\ta cat, and a dog\n2\t1.jpg\ttwo\n3\t0.jpg\ta second line\n",
    "plain.csv": '0.jpg,"a cat, and a dog"\n1.jpg,two\n0.jpg,a second line\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    folder = tmp_path / "photos"
    images = folder / ("images" if name == "captions.csv" else ".")
    images.mkdir(parents=True)
    for number in range(2):
        (images / f"{number}.jpg").write_bytes(photo(number))
    (folder / name).write_text(TABLES[name], newline="")
    captions, built = shards_of(folder / name)
    assert captions == {"0": ["a cat, and a dog", "a second line"], "1": ["two"]} and not built.skipped
    if name == "captions.csv":  # the table of its folder
        assert shards_of(folder)[0] == captions


class TestTable:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        (tmp_path / "in" / "pictures").mkdir(parents=True)
        for number in range(3):
            (tmp_path / "in" / "pictures" / f"{number}.jpg").write_bytes(photo(number))
        return tmp_path / "in"

    def test_columns_and_the_folder_of_photos_are_named(self, folder):
        table = folder / "t.csv"
        table.write_text("wo,was\n0.jpg,a\n../secret.jpg,b\n" + f"{folder}/pictures/1.jpg,c\n{folder}/2.jpg,d\n")
        options = {"image_column": "wo", "caption_column": "was"}
        captions, built = shards_of(table, images=folder / "pictures", **options)
        assert captions == {"0": ["a"], "1": ["c"]}
        assert all("--images" in reason for reason in reasons(built).values())
        assert list(reasons(built)) == ["../secret.jpg", f"{folder}/2.jpg"]
        with pytest.raises(UserError, match=r"t\.csv: no column 'wass' \(did you mean 'was'\?\)"):
            shards_of(table, image_column="wo", caption_column="wass")

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("wo,was", r"which column is the image\? .*--image-column \(there are: wo, was\); usual names are image, "),
            ("image,was", r"which column is the caption\? .*--caption-column \(there are: image, was\); usual names"),
            ("url,caption", r"its photos are on the web \(there are: url, caption\); .*img2dataset"),
            ('image,"capt\n', r"line 1: malformed: "),
            ("\udcff\udcfei\0m", r"line 1: not UTF-8"),
        ],
    )
    def test_headers(self, folder, header, message):
        (folder / "t.csv").write_text(f"{header}\n0.jpg,a\n", errors="surrogateescape")
        with pytest.raises(UserError, match=rf"t\.csv: {message}"):
            shards_of(folder / "t.csv")

    def test_an_empty_table(self, folder):
        for text in ("", "\n\n", "image,caption\n"):
            (folder / "t.csv").write_text(text)
            with pytest.raises(UserError, match=r"t\.csv: empty; expected a photo and a caption per line"):
                shards_of(folder / "t.csv")

    def test_a_quote_that_is_not_closed_takes_its_line_alone(self, folder):
        lines = ["image,caption", '0.jpg,"never closed', "1.jpg,fine", '2.jpg,"x" y', "", "2.jpg,too", '0.jpg,"open']
        (folder / "t.csv").write_text("\n".join(lines) + "\n")
        captions, built = shards_of(folder / "t.csv", images=folder / "pictures")
        assert captions == {"1": ["fine"], "2": ["too"]}
        assert list(reasons(built)) == ["line 2", "line 4", "line 7"]
        assert all(reason.startswith("malformed: ") for reason in reasons(built).values())


class TestTextFiles:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        folder = tmp_path / "in"
        for name in ("b/0.jpg", "a/1.JPEG", "a/deep/2.x.png", "lonely.webp"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(photo(1, format="PNG" if name.endswith("png") else "JPEG"))
        for name in ("b/0", "a/1", "a/deep/2.x", "README"):
            (folder / f"{name}.txt").write_text(f"caption of {name}\n\nanother\n")
        (folder / "a" / "scan.tiff").write_bytes(photo(3, format="TIFF"))
        (folder / "a" / "scan.txt").write_text("a scan\n")
        return folder

    def test_photos_beside_text_files(self, folder):
        captions, built = shards_of(folder)
        assert captions == {
            "a/1": ["caption of a/1", "another"],
            "a/deep/2_x": ["caption of a/deep/2.x", "another"],
            "b/0": ["caption of b/0", "another"],
        }
        assert list(captions) == sorted(captions)
        assert reasons(built) == {
            "README.txt": "no photo of the same name",
            "a/scan.txt": "no photo of the same name",
            "lonely.webp": "no .txt of the same name",
        }

    def test_empty_captions(self, folder):
        (folder / "a" / "1.txt").write_text(" \n")
        assert reasons(shards_of(folder)[1])["a/1.JPEG"] == "empty caption"

    def test_other_names_of_files(self, folder):
        os.rename(folder / "b" / "0.jpg", os.fsencode(folder) + b"/b/\xff.jpg")
        os.rename(folder / "b" / "0.txt", os.fsencode(folder) + b"/b/\xff.txt")
        captions, built = shards_of(folder)
        assert list(captions) == ["a/1", "a/deep/2_x"]
        assert "file name is not UTF-8" in reasons(built).values()
        assert "b/\ufffd.jpg\tfile name" in built.skipped_list.read_text()

    def test_a_photo_that_came_in_between_is_told(self, folder, monkeypatch):
        out = f"{folder.parent}/out/t-{{0..}}.tar"
        with monkeypatch.context() as patch:
            patch.setattr("mixreorg_fast.data.shards.build.Target.publish", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                build(folder, out, progress=False)
        time.sleep(0.01)
        os.rename(folder / "lonely.webp", folder / "README.webp")
        with pytest.raises(UserError, match="the source has changed since"):
            build(folder, out, progress=False)

    def test_options_of_other_sources(self, folder):
        for option in ("split", "images", "image_column"):
            with pytest.raises(UserError, match=rf"--{option.replace('_', '-')} x: not for .*photos and text files"):
                shards_of(folder, **{option: "x"})
