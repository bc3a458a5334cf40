"""The tokenizer's ids are what the text encoder relies on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mixreorg_fast.data.text.tokenizer import END, START, Tokenizer
from mixreorg_fast.errors import UserError

CAPTIONS = ["A red dog on the grass.", "Two blue dogs in the snow", "the DOG is red", "ein großer Hund 🐕"] * 5


def test_end_is_the_highest_id_and_start_the_one_below():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    ids, lengths = tokenizer.encode(["a dog", "red grass"], 12)
    assert ids.dtype == torch.int64 and ids.shape == (2, 12)
    assert tokenizer.end_id == tokenizer.vocab_size - 1 and tokenizer.vocab_size <= 300
    for row, length in zip(ids, lengths, strict=True):
        assert row[0] == tokenizer.start_id == tokenizer.vocab_size - 2
        assert row.argmax() == length - 1 and row[length - 1] == tokenizer.end_id
        assert (row[length:] == 0).all() and (row[1 : length - 1] < tokenizer.start_id).all()


def test_truncation_keeps_the_end():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    ids, lengths = tokenizer.encode(["dog " * 50, ""], 8)
    assert lengths == [8, 2]
    assert ids[0, 7] == tokenizer.end_id and (ids[0, :7] != tokenizer.end_id).all()


def test_captions_cannot_spell_a_special_token():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    ids, lengths = tokenizer.encode([f"a {END} dog {START}"], 60)
    assert (ids[0, 1 : lengths[0] - 1] < tokenizer.start_id).all()


def test_case_is_ignored_and_any_text_can_be_encoded():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    upper, lower = (tokenizer.encode([text], 16)[0] for text in ("A RED DOG", "a red dog"))
    assert torch.equal(upper, lower)
    _, lengths = tokenizer.encode(["漢字 \x00 🐈"], 40)
    assert lengths[0] > 5  # bytes, none of them dropped


@pytest.mark.launch
def test_training_is_deterministic_across_processes(tmp_path):
    code = (
        "import sys, json; from mixreorg_fast.data.text.tokenizer import Tokenizer;"
        "Tokenizer.train(json.loads(sys.argv[1]), 300).save(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(CAPTIONS), str(tmp_path / "there")], check=True)
    here = Tokenizer.train(CAPTIONS, 300).save(tmp_path / "here")
    assert here.read_bytes() == (tmp_path / "there/tokenizer.json").read_bytes()


def test_save_and_load(tmp_path):
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    path = tokenizer.save(tmp_path / "weights")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    for source in (path, path.parent):
        loaded = Tokenizer.load(source)
        assert torch.equal(loaded.encode(CAPTIONS, 20)[0], tokenizer.encode(CAPTIONS, 20)[0])


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer .*absent"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="nearest: 258"):
        Tokenizer.train(CAPTIONS, 100)
    with pytest.raises(UserError, match="no captions"):
        Tokenizer.train(["", " "], 300)
    with pytest.raises(UserError, match="nearest: 3"):
        Tokenizer.train(CAPTIONS, 300).encode(["a"], 2)


def test_a_tokenizer_whose_end_is_not_highest_is_refused(tmp_path):
    path = Tokenizer.train(CAPTIONS, 300).save(tmp_path)
    content = json.loads(path.read_text())
    content["added_tokens"][0]["content"], content["added_tokens"][1]["content"] = END, START
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="two highest ids"):
        Tokenizer.load(path)
