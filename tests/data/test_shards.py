"""Patterns, building and verifying of shards."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixreorg_fast import cli
from mixreorg_fast.data.shards.build import build
from mixreorg_fast.data.shards.index import open_shard
from mixreorg_fast.data.shards.pair import LONGEST_CAPTION, NounFinder, captions_of, write_shard
from mixreorg_fast.data.shards.patterns import expand
from mixreorg_fast.data.shards.shard_set import open_shards
from mixreorg_fast.data.shards.verify import verify
from mixreorg_fast.errors import UserError

from .conftest import pairs


def names(patterns) -> list[str]:
    return [path.name for path in expand(patterns)]


class TestPatterns:
    @pytest.fixture(autouse=True)
    def files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("t-08.tar", "t-09.tar", "t-10.tar", "v-a.tar", "v-b.tar"):
            Path(name).touch()

    def test_ranges_keep_leading_zeros(self):
        assert names("t-{08..10}.tar") == ["t-08.tar", "t-09.tar", "t-10.tar"]

    def test_globs_lists_and_commas(self):
        assert names("t-*.tar") == ["t-08.tar", "t-09.tar", "t-10.tar"]
        assert names("{t-08,v-{a,b}}.tar") == ["t-08.tar", "v-a.tar", "v-b.tar"]
        assert names("v-b.tar, t-{08..09}.tar") == ["v-b.tar", "t-08.tar", "t-09.tar"]
        assert names(["v-?.tar", "v-a.tar"]) == ["v-a.tar", "v-b.tar"]

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            ("t-{08..12}.tar", r"no shard t-11\.tar and 1 more \(did you mean"),
            ("x-*.tar", r"no shard matches x-\*\.tar"),
            ("t-{08..10.tar", "braces do not match"),
            ("t-{08}.tar", "neither a range"),
            ("t-{10..08}.tar", "not a rising range"),
            ("", "pattern is empty"),
            ("data/flickr8k/train-{000000..000001}.tar", r"no shard data/flickr8k.*docs/data\.md"),
            ("data/scenes/train-*.tar", r"no shard matches data/scenes.*docs/data\.md"),
            ("t-08.tar,gs://bucket/00.tar", r"gs://bucket/00.tar: .*gsutil"),
            ("pipe:cat t-08.tar", r"local path"),
        ],
    )
    def test_errors(self, pattern, message):
        with pytest.raises(UserError, match=message):
            expand(pattern)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"a dog\n\n a cat \r\n", ["a dog", "a cat"]),
        ("schön".encode("latin-1") + b"\nfine", ["fine"]),
        (b"x" * 10_000 + b"\nfine", ["fine"]),
        (b"x" * LONGEST_CAPTION, ["x" * LONGEST_CAPTION]),
        (b"", "empty caption"),
        (b" \n\t\n", "empty caption"),
        ("schön".encode("latin-1"), "not UTF-8"),
        (b"x" * 10_000, "10000 bytes"),
    ],
)
def test_captions(text, found):
    if isinstance(found, list):
        assert captions_of(text) == found
    else:
        with pytest.raises(ValueError, match=found):
            captions_of(text)


class TestBuild:
    def test_round_trip(self, photos, built):
        assert [path.name for path in built] == [f"train-{n:06d}.tar" for n in range(3)]
        opened = open_shards([str(path) for path in built])
        assert opened.sizes.tolist() == [8, 8, 4]
        opened.open_for(np.array([19]))
        sample = opened.read(19)
        assert sample.key == "p19" and sample.captions == ["A dog and 19 cats .", "animals in photo 19"]
        assert sample.image == (photos / "images/p19.jpg").read_bytes()

    def test_same_input_gives_same_bytes(self, photos, tmp_path, built):
        out = f"{tmp_path}/b/x-{{00..}}.tar"
        again = build(photos, out, split="train", samples_per_shard=8, progress=False).shards
        assert [path.name for path in again] == ["x-00.tar", "x-01.tar", "x-02.tar"]
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in built]

    def test_nouns(self, photos, tmp_path):
        (tmp_path / "nouns.txt").write_text("Dog\ncat\nhot dog\n")
        paths = build(photos, f"{tmp_path}/n-{{0..}}.tar", nouns=tmp_path / "nouns.txt", progress=False).shards
        opened = open_shards([str(path) for path in paths])
        opened.open_for(np.array([0]))
        assert opened.read(0).nouns == ["dog", "cat"]
        assert NounFinder(["dog", "hot dog", "bus"]).find(["Hot dogs, buses and a dog", "dogma"]) == [
            "hot dog",
            "bus",
            "dog",
        ]

    def test_existing_shards_need_overwrite(self, photos, tmp_path, built):
        pattern = f"{tmp_path}/out/train-{{000000..}}.tar"
        with pytest.raises(UserError, match="exists already .*--overwrite"):
            build(photos, pattern, progress=False)
        open_shards([str(path) for path in built])
        build(photos, pattern, split="val", overwrite=True, progress=False)
        assert sorted(os.listdir(tmp_path / "out")) == ["train-000000.tar"]  # older shards and their indexes are gone

    def test_failure_leaves_nothing(self, photos, tmp_path, monkeypatch):
        monkeypatch.setattr(Path, "read_bytes", lambda path: 1 / 0 if path.name == "p25.jpg" else b"")
        with pytest.raises(ZeroDivisionError):
            build(photos, f"{tmp_path}/out/t-{{0..}}.tar", samples_per_shard=4, progress=False)
        assert os.listdir(tmp_path / "out") == [".t.building"]  # nothing that a reader would take for whole

    def test_repeated_keys_stay_apart(self, tmp_path):
        one, other = pairs(2)
        write_shard(tmp_path / "a.tar", [one, replace(other, key=one.key), other])
        assert open_shard(tmp_path / "a.tar").samples["key"].tolist() == [b"0000", b"0000-2", b"0001"]
        # A number that is appended may be taken.
        keys = ["a", "a", "a-2", "a", "a-2-2"]
        assert write_shard(tmp_path / "b.tar", [replace(one, key=key) for key in keys]) == 5
        found = open_shard(tmp_path / "b.tar").samples["key"].tolist()
        assert found == [b"a", b"a-2", b"a-2-2", b"a-3", b"a-2-2-2"]

    def test_failure_keeps_what_was_there(self, photos, tmp_path, built):
        before = [path.read_bytes() for path in built]
        shutil.rmtree(photos / "images")
        with pytest.raises(UserError):
            build(photos, f"{tmp_path}/out/train-{{000000..}}.tar", overwrite=True, progress=False)
        assert [path.read_bytes() for path in built] == before

    def test_errors(self, photos, tmp_path):
        out = f"{tmp_path}/t-{{0..}}.tar"
        with pytest.raises(UserError, match=r"did you mean 'train'"):
            build(photos, out, split="trian", progress=False)
        with pytest.raises(UserError, match="one open range"):
            build(photos, f"{tmp_path}/t.tar", progress=False)
        with pytest.raises(UserError, match="ends in .tar"):
            build(photos, f"{tmp_path}/t-{{0..}}.zip", progress=False)
        with pytest.raises(UserError, match=r"nothing to build shards from; expected photos with a NAME\.txt"):
            build(tmp_path, out, progress=False)
        with pytest.raises(UserError, match="no readable noun list"):
            build(photos, out, nouns=tmp_path / "absent", progress=False)
        for line, message in (
            ("no tab", "none of 1 samples can be used: no caption in this line"),
            ("../x.jpg\thello", "none of 1 samples can be used: leads out of .*images"),
            ("p00.gif\thello", "none of 1 samples can be used: no such photo in .*images"),
            ("", r"captions\.tsv: empty"),
        ):
            (photos / "captions.tsv").write_text(line + "\n")
            with pytest.raises(UserError, match=message):
                build(photos, out, progress=False)
        assert os.listdir(tmp_path) == ["photos"]


class TestVerify:
    def broken_shard(self, path: Path) -> None:
        samples = pairs(8)
        samples[2] = samples[2].__class__("0002", samples[2].image[:300], "jpg", ["cut"])
        samples[4] = samples[4].__class__("0004", b"<html>404</html>", "jpg", ["no photo"])
        samples[5] = samples[5].__class__("0005", samples[5].image, "jpg", [""])
        write_shard(path, samples)

    def test_broken_samples_leave_the_index(self, tmp_path, capsys):
        path = tmp_path / "a.tar"
        self.broken_shard(path)
        assert len(open_shard(path).samples) == 8
        assert cli.main(["shards", "verify", str(path), "--workers", "1"]) == 1
        printed = capsys.readouterr().out
        assert "0002" in printed and "5 samples are sound, 3 broken" in printed
        shard = open_shard(path)
        assert shard.verified and [k.decode() for k in shard.samples["key"]] == ["0000", "0001", "0003", "0006", "0007"]
        rows = dict(line.split("\t") for line in Path(f"{path}.broken.tsv").read_text().splitlines())
        assert rows["0004"] == "not an image" and rows["0005"] == "empty caption" and rows["0002"]
        opened = open_shards(str(path))
        assert opened.lost == 3 and {bad.key for bad in opened.bad} == {"0002", "0004", "0005"}

    def test_sound_shards(self, shards, capsys):
        assert cli.main(["shards", "verify", shards, "--workers", "1"]) == 0
        assert "30 samples are sound" in capsys.readouterr().out
        assert not list(Path(shards).parent.glob("*.broken.tsv"))

    @pytest.mark.slow
    def test_several_processes_agree(self, shards):
        assert [len(shard.samples) for shard in verify(shards, workers=2, progress=False)] == [13, 10, 7]

    def test_a_cut_tar_counts_as_broken(self, tmp_path, capsys):
        path = tmp_path / "a.tar"
        write_shard(path, pairs(6))
        os.truncate(path, 12_000)
        assert cli.main(["shards", "verify", str(path), "--workers", "1"]) == 1
        assert "a.tar: cut short" in capsys.readouterr().out

    def test_a_zeroed_stretch_counts_with_what_it_held(self, tmp_path, capsys):
        path = tmp_path / "a.tar"
        write_shard(path, pairs(50))
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : -20480] = bytes(len(content) - len(content) // 2 - 20480)
        path.write_bytes(content)
        assert cli.main(["shards", "verify", str(path), "--workers", "1"]) == 1
        printed = capsys.readouterr().out
        sound, broken = map(int, re.findall(r"(\d+) samples are sound, (\d+) broken", printed)[0])
        assert abs(sound + broken - 50) <= 2 and "bytes at byte" in printed

    def test_nothing_left(self, tmp_path, capsys):
        path = tmp_path / "a.tar"
        write_shard(path, [pairs(1)[0].__class__("x", b"nothing", "jpg", ["a"])])
        assert cli.main(["shards", "verify", str(path), "--workers", "1"]) == 2
        with pytest.raises(UserError, match="no sample can be used"):
            open_shards(str(path))


def test_command_line_builds(photos, tmp_path, capsys):
    out = f"{tmp_path}/cli/train-{{000000..}}.tar"
    assert (
        cli.main(["shards", "build", str(photos), "--out", out, "--split", "train", "--samples-per-shard", "15"]) == 0
    )
    assert "train-000001.tar, 2 shards" in capsys.readouterr().out
    assert cli.main(["shards", "build", str(photos), "--out", out]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert cli.main(["shards", "verify", f"{tmp_path}/none-*.tar"]) == 2
    assert cli.main(["shards"]) == 2


def test_moving_a_shard_keeps_it_usable(shards, tmp_path):
    opened = open_shards(shards)
    target = tmp_path / "moved"
    shutil.copytree(opened.shards[0].path.parent, target)
    assert len(open_shards(f"{target}/train-*.tar")) == 30
