"""What the data's code does on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixreorg_fast.config import AugmentConfig, DataConfig
from mixreorg_fast.data.reading import augment, loaders
from mixreorg_fast.data.reading.augment import training_graph, validation_graph
from mixreorg_fast.data.reading.decoder import take
from mixreorg_fast.data.reading.loaders import ValidationLoader
from mixreorg_fast.data.reading.samples import MOST_THREADS, reading_threads
from mixreorg_fast.data.shards.shard_set import open_shards

from .conftest import open_loader, photo

pytest.importorskip("nvidia.dali")
GPU = torch.device("cuda")  # without a number: DALI is not told of a GPU


@pytest.fixture
def operators(monkeypatch) -> list:
    """The specs of a graph's operators, each held against DALI's schemas, but not built: that needs the GPU."""
    from nvidia.dali import backend
    from nvidia.dali.pipeline import Pipeline

    found: list = []

    def build(pipeline: Pipeline) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(backend, "check_cuda_runtime", lambda: None)
            pipeline._build_graph()
            pipeline._init_pipeline_backend()  # raises what a schema refuses
        found.extend(op.spec for op in pipeline._ops)

    monkeypatch.setattr(Pipeline, "build", build)
    return found


RECIPES = {
    "rand_augment": AugmentConfig(),
    "jitter": AugmentConfig(rand_augment_ops=0, color_jitter=0.4),
    "plain": AugmentConfig(rand_augment_ops=0, random_erasing=0.0),
}


def make(graph: str, **options):
    if graph == "validation":
        return validation_graph(32, device=GPU, batch=4, threads=1, **options)
    return training_graph(RECIPES[graph], 32, device=GPU, batch=4, threads=1, depth=2, **options)


@pytest.mark.parametrize("graph", [*RECIPES, "validation"])
def test_dali_takes_every_operator_of_the_gpus_graph(graph, operators):
    make(graph, hw_decoder_load=0.8)
    (decoder,) = (spec for spec in map(str, operators) if spec.startswith("OpSpec for decoders"))
    for argument in ("device: mixed", "jpeg_fancy_upsampling: True", "hw_decoder_load: 0.8"):
        assert argument in decoder, decoder


def test_a_misspelt_argument_is_refused(operators, monkeypatch):
    arguments = augment._decoder
    monkeypatch.setattr(augment, "_decoder", lambda *given: {**arguments(*given), "hw_decoder_laod": 0.5})
    with pytest.raises(Exception, match="hw_decoder_laod"):
        make("validation")


def test_dalis_own_share_of_the_jpeg_hardware_is_left_alone(operators):
    make("validation")
    assert not any("hw_decoder_load: " in str(spec) for spec in operators)


def test_the_loaders_pass_the_share_on(config, tokenizer, shards, monkeypatch):
    seen = []
    for name in ("training_graph", "validation_graph"):
        build = getattr(augment, name)
        monkeypatch.setattr(
            loaders, name, lambda *a, build=build, **k: (seen.append(k["hw_decoder_load"]), build(*a, **k))[1]
        )
    configuration = config({"hw_decoder_load": 0.25})
    with open_loader(configuration, tokenizer, micro_batch=2) as loader:
        next(loader)
    ValidationLoader(configuration, tokenizer, open_shards(shards), micro_batch=2).close()
    assert seen == [0.25, 0.25]


def test_a_gpus_batches_are_prepared_on_a_stream_of_their_own(config, tokenizer, monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.append((stream, threading.current_thread())))

    def graph(*arguments, **options):
        raise RuntimeError("enough" if streams else "no stream was set")

    monkeypatch.setattr(loaders, "training_graph", graph)
    with (
        open_loader(config(), tokenizer, micro_batch=2, device=GPU) as loader,
        pytest.raises(RuntimeError, match="enough"),
    ):
        next(loader)
    ((stream, thread),) = streams
    assert stream == f"a stream of {GPU}" and thread is not threading.current_thread()


def test_batches_are_copied_and_not_lent(monkeypatch):
    monkeypatch.setattr(torch, "from_dlpack", lambda *_: pytest.fail("DALI's memory was lent to PyTorch"))
    pipeline = validation_graph(32, device=torch.device("cpu"), batch=2, threads=1)
    taken = []
    for number in (0, 1, 0):
        pipeline.feed_input("encoded", [np.frombuffer(photo(number + i), np.uint8) for i in range(2)])
        pipeline.schedule_run()
        taken.append(take(pipeline, torch.device("cpu")))
    first, second, again = taken  # each in memory of its own, which later batches leave alone
    assert first.shape == (2, 3, 32, 32) and first.dtype == torch.float32
    assert torch.equal(first, again) and torch.equal(first[1], second[0]) and not torch.equal(first, second)
    assert len({images.data_ptr() for images in taken}) == 3


class FakeTensorGPU:
    """A batch in DALI's memory on a GPU: notes how it is copied."""

    dtype = None

    def __init__(self, calls: list) -> None:
        from nvidia.dali import types

        self.dtype, self._calls = types.DALIDataType.FLOAT, calls

    def shape(self) -> list[int]:
        return [2, 3, 8, 8]

    def as_tensor(self) -> FakeTensorGPU:
        return self

    def copy_to_external(self, ptr: ctypes.c_void_p, cuda_stream: ctypes.c_void_p, non_blocking: bool) -> None:
        self._calls.append(("copy", ptr.value, cuda_stream.value, non_blocking))


def test_a_gpus_batch_is_copied_in_the_order_of_the_loaders_stream(monkeypatch):
    from nvidia.dali.plugin.pytorch import torch_utils

    calls: list = []
    stream = SimpleNamespace(cuda_stream=0x77)
    empty = torch.empty
    monkeypatch.setattr(torch_utils, "TensorGPU", FakeTensorGPU)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch, "empty", lambda shape, device: empty(shape) if device.type == "cuda" else None)
    monkeypatch.setattr(torch_utils.types, "_raw_cuda_stream", lambda stream: stream.cuda_stream)
    pipeline = SimpleNamespace(
        share_outputs=lambda cuda_stream: (calls.append(("share", cuda_stream.cuda_stream)), [FakeTensorGPU(calls)])[1],
        release_outputs=lambda: calls.append(("release",)),
    )
    images = take(pipeline, GPU)
    assert images.shape == (2, 3, 8, 8)
    # Bound to the stream, copied on it without waiting, and only then given back.
    assert calls == [("share", 0x77), ("copy", images.data_ptr(), 0x77, True), ("release",)]


@pytest.mark.parametrize(
    ("threads", "cores", "ranks", "expected"),
    [
        (None, 64, 8, 8),
        (None, 192, 8, MOST_THREADS),
        (None, 2, 4, 1),
        (None, 8, 1, 8),
        (12, 64, 8, 12),
        (12, 2, 1, 2),
    ],
)
def test_threads_by_cores_per_rank(monkeypatch, threads, cores, ranks, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_SIZE", str(ranks))
    assert reading_threads(DataConfig(threads=threads)) == expected
