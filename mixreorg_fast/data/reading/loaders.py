"""Batches for training and retrieval, decoded by NVIDIA DALI.

Order and randomness are ours, pixels are DALI's. Position p of a run ("samples consumed") has its sample and its
augmentation from (seed, p) alone (``order.py``, ``augment.py``). The bytes of the samples are read here and fed to a
DALI graph that draws nothing. So any number of ranks continues a run with the same pixels (on a GPU up to the rounding
of its JPEG hardware).

DALI's own WebDataset reader was tried and rejected. Its order depends on the number of shards it is split into. Its
checkpoints load silently into another number of ranks. Its shuffle is a window over a fixed order. Its random operators
hold state. One photo that cannot be decoded loses the whole batch, and a file that is not an image can crash the
process. Here every header is parsed first, by DALI's own parser. A batch that fails later is searched for the photo at
fault, and another photo replaces that one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...config import Config
from ...errors import RankError, UserError
from ...ranks import local_rank
from ..shards.scan import Bad
from ..shards.shard_set import Sample, ShardSet
from ..text.tokenizer import Tokenizer
from .augment import draw, training_graph, validation_graph
from .decoder import take
from .order import Purpose, uniforms
from .samples import SampleReader, reading_threads
from .training_set import TrainingSet

DEPTH = 2  # batches in DALI's pipeline
NOUN_PROMPT = "a photo of a {}."


@dataclass
class Pairs:
    """Image-text pairs of one rank and micro-step."""

    images: Tensor  # [B, 3, S, S] fp32, normalised RGB
    ids: Tensor  # [B, context] int64, zero-padded
    lengths: list[int]  # tokens per caption with start and end
    position: int  # run-global position of this rank's first sample
    keys: list[str]
    noun_ids: Tensor | None = None  # [B, P, context] int64: P noun prompts per image, with loss.multi_label
    noun_lengths: list[int] | None = None  # B * P, image by image


@dataclass
class _Request:
    """A batch in DALI's pipeline."""

    position: int
    numbers: list[int]  # of the samples, bad ones already replaced
    samples: list[Sample]
    encoded: list[np.ndarray]


class _Loader:
    """What both loaders hold: a reader of samples and the options of DALI's graph."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, shards: ShardSet, micro_batch: int, device: torch.device | None
    ) -> None:
        self._config, self._tokenizer, self._micro_batch = config, tokenizer, micro_batch
        self._device, threads = device or devices.choose(), reading_threads(config.data)
        self._reader = SampleReader(shards, threads, self._device)
        self._decoding: dict[str, Any] = {
            "device": self._device,
            "batch": micro_batch,
            "threads": threads,
            "hw_decoder_load": config.data.hw_decoder_load,
        }

    def _paired(self, images: Tensor, samples: list[Sample], texts: list[str], position: int) -> Pairs:
        ids, lengths = self._tokenizer.encode(texts, self._config.model.text.context)
        keys = [sample.key for sample in samples]
        return Pairs(images, devices.upload(ids, self._device), lengths, position, keys)


class TrainLoader(_Loader, Iterator[Pairs]):
    """Endless training batches of one rank, prepared by a background thread.

    Micro-step j of M = micro_batch * world_size images takes positions start + j*M … start + (j+1)*M - 1 of the run;
    rank r takes the r-th part of these. Use as a context manager, or call :meth:`close`.

    Args:
        micro_batch: images per rank and micro-step.
        start: samples of the run consumed so far, over all ranks.
        device: where the batches go; None: as :func:`~mixreorg_fast.devices.choose`.

    Raises:
        UserError: DALI is missing; not one photo can be decoded (from ``next``).
    """

    def __init__(
        self,
        config: Config,
        training_set: TrainingSet,
        tokenizer: Tokenizer,
        *,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(config, tokenizer, training_set.shards, micro_batch, device)
        self._order = training_set.order
        step = micro_batch * world_size
        self._positions = itertools.count(start + rank * micro_batch, step)
        # The ranks meet in each micro-step, so another rank may be behind by the batches that are prepared here.
        self._fetching = training_set.fetch_ahead((config.data.prefetch + DEPTH + 2) * step)
        self._closed = False
        self._batches = self._prepared()
        self._thread = ThreadPoolExecutor(1, "mixreorg-loader")
        self._ahead = deque(self._thread.submit(next, self._batches) for _ in range(config.data.prefetch + 1))

    @property
    def bad_samples(self) -> list[Bad]:
        """Each sample found unusable while reading; another sample of its set replaces it."""
        return list(self._reader.bad.values())

    def __next__(self) -> Pairs:
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            pairs, done = self._ahead[0].result()  # an error stays at the head, and is raised again
        except UserError as error:  # one rank per node reports it: another node may have the shard that this node lacks
            raise (UserError if local_rank() else RankError)(str(error)) from None
        self._ahead.popleft()
        self._ahead.append(self._thread.submit(next, self._batches))
        if done is not None:
            _adopt(pairs, done)
        return pairs

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and close the files; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._fetching is not None:  # the thread may be waiting for a shard
            self._fetching.close()
        for batch in self._ahead:
            batch.cancel()
        self._thread.submit(self._batches.close)  # frees DALI's pipeline in the thread that built it
        self._thread.shutdown()
        self._reader.close()
        if self._fetching is not None:
            self._fetching.release()

    def _prepared(self) -> Generator[tuple[Pairs, Any], None, None]:
        """Batches, and when their tensors are there; the pipeline is fed DEPTH batches ahead."""
        if self._device.type == "cuda":  # this thread's copies do not queue behind the training step
            torch.cuda.set_stream(torch.cuda.Stream(self._device))
        size = self._config.model.image_size
        pipeline = training_graph(self._config.data.augment, size, depth=DEPTH, **self._decoding)
        first = itertools.islice(self._positions, DEPTH)
        pending = deque(self._request_at(position, pipeline) for position in first)
        pipeline.schedule_run()  # the first call runs DEPTH batches
        while True:
            try:
                images = take(pipeline, self._device)
            except RuntimeError as error:
                self._repair(pipeline, pending, error)
                continue
            request = pending.popleft()
            pending.append(self._request_at(next(self._positions), pipeline))
            pipeline.schedule_run()
            pairs = self._pairs(request, images)
            yield pairs, torch.cuda.current_stream().record_event() if images.is_cuda else None

    def _repair(self, pipeline: Any, pending: deque[_Request], error: RuntimeError) -> None:
        """After a batch failed: find its bad photos, drop the batches in flight, and run all of them again."""
        self._reader.find_bad(pending[0].numbers, pending[0].encoded, error)
        for _ in range(len(pending) - 1):
            with contextlib.suppress(RuntimeError):  # a batch that fails too is repaired when it is the head
                take(pipeline, self._device)
        for place, request in enumerate(pending):
            pending[place] = self._request_at(request.position, pipeline)
            pipeline.schedule_run()

    def _request_at(self, position: int, pipeline: Any) -> _Request:
        """The batch at a position of the run, fed to the pipeline."""
        numbers, samples, encoded, sizes = self._reader.read(self._order.at(position, self._micro_batch))
        drawn = draw(self._config.data.augment, self._config.seed, position, sizes)
        for name, data in {"encoded": encoded, **drawn}.items():
            pipeline.feed_input(name, data)
        return _Request(position, numbers, samples, encoded)

    def _pairs(self, request: _Request, images: Tensor) -> Pairs:
        context, count = self._config.model.text.context, len(request.samples)
        chosen = uniforms(self._config.seed, Purpose.CAPTION, request.position, count, 1)[:, 0]
        texts = [s.captions[int(u * len(s.captions))] for s, u in zip(request.samples, chosen, strict=True)]
        pairs = self._paired(images, request.samples, texts, request.position)
        if self._config.loss.multi_label:
            numbers = uniforms(self._config.seed, Purpose.NOUNS, request.position, count, self._config.data.nouns)
            rows = zip(request.samples, texts, numbers, strict=True)
            prompts = [prompt for sample, text, row in rows for prompt in _noun_prompts(sample.nouns, text, row)]
            ids, pairs.noun_lengths = self._tokenizer.encode(prompts, context)
            pairs.noun_ids = devices.upload(ids.reshape(*numbers.shape, context), self._device)
        return pairs


class ValidationLoader(_Loader):
    """The pairs of `shards` in order, each once: the middle square of the photo and its first caption.

    Each iteration starts from the first. Each of several ranks takes every world_size-th sample. The last batch may be
    smaller, and photos that cannot be decoded are left out. ``Pairs.position`` is the number of the batch's first
    sample. `device`, and the error where DALI is missing, are as of :class:`TrainLoader`.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        shards: ShardSet,
        *,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(config, tokenizer, shards, micro_batch, device)
        self._numbers = np.arange(rank, len(shards), world_size)
        self._pipeline = validation_graph(config.model.image_size, **self._decoding)

    def __iter__(self) -> Iterator[Pairs]:
        for first in range(0, len(self._numbers), self._micro_batch):
            if pairs := self._load(self._numbers[first : first + self._micro_batch]):
                yield pairs

    def close(self) -> None:
        self._reader.close()

    def _load(self, numbers: np.ndarray) -> Pairs | None:
        found, samples, encoded, _ = self._reader.read(numbers, substitute=False)
        if not found:
            return None
        try:
            self._pipeline.feed_input("encoded", encoded)
            self._pipeline.schedule_run()
            images = take(self._pipeline, self._device)
        except RuntimeError as error:
            self._reader.find_bad(found, encoded, error)
            return self._load(numbers)  # without the bad ones
        return self._paired(images, samples, [sample.captions[0] for sample in samples], found[0])


def _noun_prompts(nouns: list[str], caption: str, numbers: np.ndarray) -> list[str]:
    """One prompt per number: distinct nouns while there are enough, repeated ones after; without nouns the caption."""
    if not nouns:
        return [caption] * len(numbers)
    prompts, left = [], []
    for number in numbers:
        left = left or list(dict.fromkeys(nouns))
        prompts.append(NOUN_PROMPT.format(left.pop(int(number * len(left)))))
    return prompts


def _adopt(pairs: Pairs, done: torch.cuda.Event) -> None:
    """Make tensors of the side stream safe to use, and later to free, on the consumer's stream."""
    stream = torch.cuda.current_stream(pairs.images.device)
    stream.wait_event(done)
    for tensor in (pairs.images, pairs.ids, pairs.noun_ids):
        if tensor is not None:
            tensor.record_stream(stream)
