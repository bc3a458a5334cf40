"""Captions that are joined to shards by key, and what a run reads of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mixreorg_fast import cli
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.data.shards.index import joined_places
from mixreorg_fast.data.shards.join import join
from mixreorg_fast.data.shards.pair import write_shard
from mixreorg_fast.data.shards.shard_set import open_shards
from mixreorg_fast.data.shards.verify import verify
from mixreorg_fast.errors import UserError

from .conftest import open_loader, pairs

pa = pytest.importorskip("pyarrow", reason="Parquet files are read with pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

KEYS = [pair.key for pair in pairs(30)]
OWN = {pair.key: pair.captions for pair in pairs(30)}


@pytest.fixture
def table(tmp_path) -> Path:
    """New captions of the samples 0 … 19, in another order than theirs, in small row groups."""
    order = np.random.default_rng(0).permutation(20)
    columns = {
        "uid": [KEYS[n] for n in order],
        "short": [f"sketch {n}" for n in order],
        "long": [[f"a long\ntext on {n}", f"more on {n}"] for n in order],
    }
    pq.write_table(pa.table(columns), tmp_path / "new.parquet", row_group_size=3)
    return tmp_path / "new.parquet"


def captions(shards: str) -> dict[str, list[str]]:
    opened = open_shards(shards)
    opened.open_for(np.arange(len(opened)))
    samples = [opened.read(number) for number in range(len(opened))]
    opened.close()
    return {sample.key: sample.captions for sample in samples}


def expected(count: int = 20) -> dict[str, list[str]]:
    new = {KEYS[n]: [f"sketch {n}", f"a long text on {n}", f"more on {n}"] for n in range(count)}
    return {key: [*own, *new.get(key, [])] for key, own in OWN.items()}


def files(shards: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(shards).parent.iterdir() if path.suffix != ".index"}


def test_a_parquet_file_by_key(shards, table, capsys):
    before = files(shards)
    assert cli.main(["shards", "join", "hf://datasets/a/b/{0..9}.tar", str(table), "--key", "uid"]) == 2
    assert "joined to local shards" in capsys.readouterr().err
    command = ["shards", "join", shards, str(table), "--key", "uid", "--text", "short", "long"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        "joined 60 captions to 20 of 30 samples",
        "10 samples have no new caption",
    ]
    assert captions(shards) == expected()
    assert list(open_shards(shards).captions()) == [text for texts in expected().values() for text in texts]
    # Two shards have one file more each: the third holds no sample of the table.
    assert {name: files(shards)[name] for name in before} == before
    assert set(files(shards)) - set(before) == {f"train-00000{n}.tar.captions" for n in range(2)}
    again = files(shards)
    assert cli.main(command) == 0
    assert "joined 0 captions to 20" in (out := capsys.readouterr().out)
    assert "60 captions repeat one that their sample has" in out
    assert files(shards) == again


def test_what_cannot_be_joined_is_counted(shards, table, tmp_path):
    join(shards, [table], key="uid", texts=["short", "long"], progress=False)
    write_shard(Path(shards).parent / "more.tar", [*pairs(1, 5), *pairs(1, 40)])  # one key stands twice
    rows = [
        {"file": "0040.jpg", "caption": "by the name of its photo"},
        {"file": "0005", "caption": "ambiguous"},
        {"file": "absent", "caption": "x"},
        {"file": "0001", "caption": " \n"},
        {"file": "0001", "caption": "x" * 9000},
        {"file": "0001"},
        {"file": "0002", "caption": ["sketch 2", "new", "new"]},
        {"file": "0003", "caption": "half \ud800"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    everything = f"{shards},{Path(shards).parent}/more.tar"
    assert join(everything, [tmp_path / "rows.jsonl"], key="file", progress=False) == [
        "joined 3 captions to 3 of 32 samples",
        "29 samples have no new caption",
        "1 rows have the key of no sample, such as 'absent'",
        "1 rows have the key of several samples, and were left out",
        "3 rows have no caption of 1 to 8192 bytes",
        "2 captions repeat one that their sample has",
    ]
    found = captions(everything)
    assert found["0002"] == [*expected()["0002"], "new"] and found["0003"] == [*expected()["0003"], "half ?"]
    assert found["0040"] == [*pairs(1, 40)[0].captions, "by the name of its photo"]


@pytest.mark.parametrize("name", ["new.csv", "new.tsv", "folder"])
def test_other_tables(shards, tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for number in range(2):
            (path / f"{number}.jsonl").write_text(json.dumps({"uid": KEYS[number], "text": f'new, "{number}"'}) + "\n")
    else:
        comma = "," if name == "new.csv" else "\t"
        lines = [f'{KEYS[number]}{comma}"new, ""{number}"""' for number in range(2)]
        path.write_text("\n".join([f"uid{comma}text", *lines]))
    join(shards, [path], key="uid", progress=False)
    assert [captions(shards)[key][2:] for key in KEYS[:3]] == [['new, "0"'], ['new, "1"'], []]


def test_verifying_leaves_them_and_a_changed_shard_refuses_them(shards, table, tmp_path):
    join(shards, [table], key="uid", texts=["short", "long"], progress=False)
    list(verify(shards, progress=False))
    assert captions(shards) == expected()
    moved = tmp_path / "moved"
    Path(shards).parent.rename(moved)  # a copy has other times
    shards, first = f"{moved}/*.tar", moved / "train-000000.tar"
    os.utime(first, (0, 0))
    assert captions(shards) == expected()
    place = joined_places(first)[0]
    whole = place.read_bytes()
    for samples in (pairs(30), pairs(13)[::-1]):  # another size; the same size
        write_shard(first, samples)
        with pytest.raises(UserError, match=rf"^{place}: captions of another state of this shard"):
            open_shards(shards)
    join(shards, [table], key="uid", texts=["short"], progress=False)
    assert captions(shards)["0003"] == [*OWN["0003"], "sketch 3"]
    for damage in (whole[:-1], whole[:300], b"", b"no"):
        place.write_bytes(damage)
        with pytest.raises(UserError, match=rf"^{place}: damaged; delete it"):
            open_shards(shards)


def test_nothing_is_left_by_a_join_that_fails(shards, table, tmp_path, monkeypatch):
    before = sorted(files(shards))
    with monkeypatch.context() as patch:
        patch.setattr("mixreorg_fast.data.shards.join.os.path.getsize", lambda path: 1 / ("000000" in str(path)))
        with pytest.raises(ZeroDivisionError):  # at the second shard, after the first was written
            join(shards, [table], key="uid", texts=["short"], progress=False)
    monkeypatch.setattr("mixreorg_fast.data.shards.join.write_joined", lambda *_: os.open("/nowhere/x", os.O_WRONLY))
    with pytest.raises(UserError, match=r"captions cannot be stored beside it: .*No such file"):
        join(shards, [table], key="uid", texts=["short"], progress=False)
    assert sorted(files(shards)) == before
    folder = Path(shards).parent
    (folder / ".joining-killed").mkdir()
    (folder / ".joining-killed" / "captions.db").touch()
    with pytest.raises(UserError, match="captions cannot be stored"):  # another join removes what a killed one left
        join(shards, [table], key="uid", texts=["short"], progress=False)
    assert not list(folder.glob(".joining-*"))
    table.write_bytes(table.read_bytes()[:-100])
    for path, key, message in (
        (table, "uid", r"new\.parquet: not a readable Parquet file"),
        (tmp_path / "nev.parquet", "uid", r"no .*nev\.parquet \(did you mean '.*new\.parquet'\?\)"),
        (tmp_path / "empty", "uid", r"empty: no table; expected files that end in \.parquet or"),
        (tmp_path / "a.jsonl", "iud", r"a\.jsonl: no column 'iud' \(did you mean 'uid'\?\)"),
        (tmp_path / "a.jsonl", "uid", r"a\.jsonl: which column is the caption\? name it with --text"),
        (tmp_path / "b.jsonl", "uid", r"b\.jsonl: not a readable table"),
        (tmp_path / "numbers.jsonl", "uid", r"numbers\.jsonl: not a readable table"),
        (tmp_path / "c.jsonl", "uid", r"c\.jsonl: no row .*; column 'uid' holds 'zebra' and the like, .* have '0000'"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "a.jsonl").write_text('{"uid": "0001", "words": "x"}\n')
        (tmp_path / "numbers.jsonl").write_text("5\n")
        (tmp_path / "b.jsonl").write_text('{"uid": "0001", "text": "x"}\n{"uid"\n')
        (tmp_path / "c.jsonl").write_text('{"uid": "zebra", "text": "x"}\n')
        with pytest.raises(UserError, match=message):
            join(shards, [path], key=key, progress=False)
    assert sorted(files(shards)) == before


def test_training_draws_from_all_captions(shards, table, config, tokenizer):
    join(shards, [table], key="uid", texts=["short", "long"], progress=False)
    configuration = config({"augment": {"rand_augment_ops": 0, "random_erasing": 0.0}})
    texts = expected()
    drawn: dict[str, set[int]] = {key: set() for key in KEYS}

    def batches(count: int, **options) -> list:
        with open_loader(configuration, tokenizer, **options) as loader:
            return [next(loader) for _ in range(count)]

    one = batches(30, micro_batch=10)
    for batch in one:
        for key, ids in zip(batch.keys, batch.ids, strict=True):
            rows = tokenizer.encode(texts[key], 16)[0]
            drawn[key].add([bool((ids == row).all()) for row in rows].index(True))
    counts = [len(texts[key]) for key in KEYS]
    assert max(max(numbers) for numbers in drawn.values()) == 4
    assert sum(map(len, drawn.values())) > 0.8 * sum(counts)
    resumed = batches(2, micro_batch=10, start=150)  # a function of (seed, position)
    assert all((a.ids == b.ids).all() and a.keys == b.keys for a, b in zip(one[15:17], resumed, strict=True))
    assert "sketch" in " ".join(TrainingSet.open(configuration).shards.captions())
