"""A loaded model is a well-behaved module: copies, pickles, dtypes, threads, worker processes, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mixreorg_fast
from mixreorg_fast.data.text.tokenizer import Tokenizer
from mixreorg_fast.inference.model import Model

from ..tiny import fill, tiny_config

CLASSES = ["cat", "red ball"]
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    tokenizer = Tokenizer.train(["a red ball on grass", "two dogs and a cat"] * 5, 300)
    made = Model(tiny_config(model={"text": {"vocab_size": tokenizer.vocab_size}}).model, tokenizer=tokenizer)
    fill(made)
    folder = tmp_path_factory.mktemp("module") / "weights"
    made.save(folder)
    return mixreorg_fast.load(folder)


def labels(model: Model) -> Tensor:
    return model.segment(PHOTO, CLASSES, short_side=32).labels


def saved_and_loaded(model: Model) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_apart(copied, model):
    expected = labels(model)
    other = copied(model)
    assert torch.equal(labels(other), expected)
    assert (other.mean, other.inference, other.config) == (model.mean, model.inference, model.config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(labels(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_convert_there_and_back(dtype, model):
    other = copy.deepcopy(model).to(dtype)
    assert other.dtype == dtype and all(x.dtype == dtype for x in other.buffers() if x.is_floating_point())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    close = (other.image_embeddings(images).double() * model.image_embeddings(images)).sum(1)
    assert (close > 0.98).all()
    assert labels(other).shape == PHOTO.shape[:2]
    assert other.float().dtype == torch.float32 and labels(other).shape == PHOTO.shape[:2]


def test_threads_share_a_model(model):
    expected = labels(model)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: labels(model), range(8)))


class Segmented(Dataset):
    """Photos that a worker process segments."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> Tensor:
        return labels(self.model)


def test_a_worker_process_runs_a_model(model):
    expected = labels(model)
    for found in DataLoader(Segmented(model), num_workers=1):
        assert torch.equal(found[0], expected)


@pytest.mark.slow
def test_torch_compile_takes_the_network_in_one_graph(model):
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 50, (3, 8))
    expected = model.forward(images, ids)
    _, pooled, _ = torch.compile(model.image_encoder, fullgraph=True, backend="aot_eager")(images)
    assert torch.allclose(model.image_projection(pooled), expected[0], atol=1e-5)
    for found, truth in zip(torch.compile(model, backend="aot_eager")(images, ids), expected, strict=True):
        assert torch.allclose(found, truth, atol=1e-5)
