"""The long fuzz, ``make soak``: damaged shards, configurations and weights end in counts or one clear line, never in a
crash or a hang. It prints how many inputs were tried; MIXREORG_SOAK scales the number (1: 2,000 shards).
"""

import json
import os
import random
from collections import Counter

import pytest
import torch

from mixreorg_fast import load
from mixreorg_fast.config import Config, parse_config
from mixreorg_fast.data.reading.loaders import TrainLoader
from mixreorg_fast.data.reading.training_set import TrainingSet
from mixreorg_fast.data.shards.index import open_shard
from mixreorg_fast.data.shards.pair import write_shard
from mixreorg_fast.data.shards.scan import scan
from mixreorg_fast.data.shards.shard_set import ShardSet
from mixreorg_fast.data.shards.verify import verify_shard
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.errors import UserError
from mixreorg_fast.inference.model import Model
from mixreorg_fast.models import weights
from tests.data.conftest import own_cache, pairs  # noqa: F401, the fixture is used by its name
from tests.tiny import tiny_config

SCALE = float(os.environ.get("MIXREORG_SOAK", "1"))


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four accidents: flipped bits, overwritten, lost, doubled or foreign stretches, a lost end."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(len(data), 1))
        length = min(draw.choice((1, 4, 100, 512, 5000)), len(data) - at)
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = bytes(length)
        elif kind == 2:
            data[at : at + length] = draw.randbytes(length)
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def test_shards(tmp_path, capsys):
    draw, counts = random.Random(0), Counter()
    whole = tmp_path / "whole.tar"
    write_shard(whole, pairs(6))
    whole = whole.read_bytes()
    tokenizer = Tokenizer.train(["a red thing", "a blue thing number 3"], 300)
    verified = []
    for number in range(int(2000 * SCALE)):
        path = tmp_path / f"{number:06d}.tar"
        path.write_bytes(mutated(whole, draw))
        counts["shards"] += 1
        found, incomplete = scan(path)
        shard = verify_shard(path)
        sound = len(shard.samples)
        assert shard.verified and sound + len(shard.bad) == len(found) + len(incomplete)
        assert shard.broken >= len(shard.bad)
        counts["damaged tars"] += shard.problem is not None
        counts["samples"] += len(found) + len(incomplete)
        counts["incomplete samples"] += len(incomplete)
        counts["broken samples"] += len(found) - sound
        if not sound:
            continue
        assert len(open_shard(path).samples) == sound
        samples = ShardSet([shard])
        for place in range(sound):
            samples.open_for([place])
            assert samples.read(place).captions
        samples.close()
        verified.append(path)
    # The loader goes once through all that was found sound, with the decoder that training uses.
    config = tiny_config(data={"shards": str(tmp_path / "*.tar"), "augment": {"rand_augment_ops": 0}})
    for path in tmp_path.glob("*.tar"):
        if path not in verified:
            path.unlink()
    training_set = TrainingSet.open(config)
    with TrainLoader(config, training_set, tokenizer, micro_batch=32) as loader:
        for _ in range(-(-len(training_set) // 32)):
            assert torch.isfinite(next(loader).images).all()
        counts["bad in training"] = len(loader.bad_samples)
        assert len(training_set) == counts["samples"] - counts["incomplete samples"] - counts["broken samples"]
    with capsys.disabled():
        print(f"\nshards: {dict(counts)}")


def test_configurations(capsys):
    draw, counts = random.Random(1), Counter()
    text = json.dumps(Config().model_dump(mode="json")).encode()
    for _ in range(int(5000 * SCALE)):
        counts["configurations"] += 1
        try:
            values = json.loads(mutated(text, draw)[: draw.choice((None, 10_000))])
            parse_config(values if isinstance(values, dict) else {"name": values})
        except ValueError:
            counts["not JSON"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
    names = list(Config().model_dump())
    for _ in range(int(5000 * SCALE)):  # well-formed, but wrong somewhere
        values = json.loads(text)
        section = draw.choice([name for name in names if isinstance(values[name], dict)])
        key = draw.choice(list(values[section]))
        values[section][key] = draw.choice((None, -1, 0, 3.5, 1e30, "x", [], {}, True, [1, 2], {"a": 1}))
        counts["configurations"] += 1
        try:
            parse_config(values)
        except UserError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
    with capsys.disabled():
        print(f"\nconfigurations: {dict(counts)}")


@pytest.mark.parametrize("name", [weights.WEIGHTS, weights.DESCRIPTION, weights.TOKENIZER])
def test_weights(tmp_path, capsys, name):
    draw, counts = random.Random(2), Counter()
    model = Model(tiny_config().model, tokenizer=Tokenizer.train(["a red thing"], 300))
    model.save(tmp_path / "w")
    whole = (tmp_path / "w" / name).read_bytes()
    for _ in range(int(500 * SCALE)):
        (tmp_path / "w" / name).write_bytes(mutated(whole, draw))
        counts["folders"] += 1
        try:
            load(tmp_path / "w")
        except UserError:
            counts["refused"] += 1
    with capsys.disabled():
        print(f"\n{name}: {dict(counts)}")
