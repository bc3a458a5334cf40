"""Batches for training and for retrieval, decoded and augmented by NVIDIA DALI.

Order and randomness are ours, pixels are DALI's. Position p of a run ("samples consumed") has its sample and its
augmentation from (seed, p) alone (``order.py``, ``augment.py``): the bytes of the samples due are read here and fed to
a DALI graph that holds no randomness of its own. So a batch is a pure function of (seed, position): a run resumes
from one integer, and any number of ranks continues the same order with the same pixels (on a GPU up to the rounding of
its JPEG hardware).

DALI's own WebDataset reader was tried and left: its order depends on the number of shards it is split into, its
checkpoints load silently into another number of ranks, its shuffle is a window over a fixed order, its random
operators hold state, one photo that cannot be decoded loses the whole batch, and one that is no image at all can
crash the process. Here every header is parsed first (by DALI's own parser), and a batch that fails later is searched
for the photo at fault, which another one stands in for.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...config import Config, DataConfig
from ...errors import UserError
from ..scenes.scenes import ensure_scenes
from ..shards.shards import Bad, Sample, ShardSet, open_shards
from ..text.tokenizer import Tokenizer
from .augment import draw, training_graph, validation_graph
from .decoder import Decoder, feed, take
from .order import Mixture, Order, Purpose, stand_in, uniforms

log = logging.getLogger("mixreorg_fast")

MOST_THREADS = 16  # what a GPU's decoder leaves to the CPU does not keep more busy
NOUN_PROMPT = "a photo of a {}."


@dataclass
class Batch:
    """One micro-step's image-text pairs of a rank."""

    images: Tensor  # [B, 3, S, S] fp32, normalised RGB
    ids: Tensor  # [B, context] int64, zero-padded
    lengths: list[int]  # tokens per caption with start and end
    position: int  # run-global position of this rank's first sample
    keys: list[str]
    noun_ids: Tensor | None = None  # [B, P, context] int64: P noun prompts per image, with loss.multi_label
    noun_lengths: list[int] | None = None  # B * P, image by image


@dataclass
class _Request:
    """A batch on its way: what goes into the pipeline, and what its captions will need."""

    position: int
    numbers: list[int]  # samples, in place of bad ones already substituted
    samples: list[Sample]
    inputs: dict[str, Any]


def shard_sets(data: DataConfig) -> list[tuple[str | list[str], float]]:
    """Patterns and weights of the sets that a run mixes; a single one where no weights are given.

    Without configured shards they are those of the embedded scenes (made where absent).
    """
    if data.shards is None:
        return [(list(map(str, ensure_scenes(data.scenes).train)), 1.0)]
    if isinstance(data.shards, str) or not data.shards or isinstance(data.shards[0], str):
        return [(data.shards, 1.0)]
    return [(part.pattern, part.weight) for part in data.shards]


def reading_threads(data: DataConfig) -> int:
    """Threads of a rank that read and decode: ``data.threads``, else its share of the node's cores, at most
    MOST_THREADS; never more than there are cores."""
    cores = len(os.sched_getaffinity(0))
    return min(data.threads, cores) if data.threads else max(1, min(cores // devices.local_size(), MOST_THREADS))


def training_shards(config: Config, *, warn: bool = True) -> ShardSet:
    """The shards a run trains on, set after set; `warn` as for :func:`~.shards.open_shards`."""
    return ShardSet([shard for part in _opened(config, warn) for shard in part.shards])


def _opened(config: Config, warn: bool) -> list[ShardSet]:
    return [open_shards(pattern, warn=warn) for pattern, _ in shard_sets(config.data)]


def training_order(config: Config, sets: Sequence[ShardSet]) -> Order | Mixture:
    """Which sample of `sets`, opened as :func:`shard_sets` lists them, stands at which position of a run.

    Raises:
        UserError: a weight is too small.
    """
    if len(sets) == 1:
        return Order(sets[0].sizes, config.seed)
    try:
        weights = [weight for _, weight in shard_sets(config.data)]
        return Mixture([part.sizes for part in sets], weights, config.seed)
    except ValueError as error:
        raise UserError(f"data.shards: {error}; leave that set out") from None


def validation_shards(config: Config) -> ShardSet | None:
    """The image-text pairs for retrieval: the configured ones, else the scenes' when those are trained on."""
    if config.data.val_shards:
        return open_shards(config.data.val_shards)
    return None if config.data.shards else open_shards(list(map(str, ensure_scenes(config.data.scenes).val)))


def captions(config: Config, limit: int | None = None) -> Iterator[str]:
    """All captions of the training shards in order, or those of about `limit` samples spread over them."""
    return training_shards(config, warn=False).captions(limit)


def tokenizer_for(config: Config) -> Tokenizer:
    """The tokenizer a run is configured with: ``data.tokenizer``, else one trained on its captions."""
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    # Half a million samples settle the merges; more only take time.
    return Tokenizer.train(captions(config, limit=500_000), config.data.vocab_size)


class TrainLoader:
    """Endless training batches of one rank, prepared by a background thread.

    Micro-step j of M = micro_batch * world_size images takes positions start + j*M … start + (j+1)*M - 1 of the run;
    rank r has the r-th part of them. Use as a context manager, or call :meth:`close`.

    Args:
        tokenizer: for the captions.
        micro_batch: images per rank and micro-step.
        start: samples of the run consumed so far, over all ranks.
        device: where the batches go; None: the GPU where there is one.

    Attributes:
        samples: training samples, N; of several sets their sum.
        lost: samples that the shards' indexes leave out (found broken when they were made).
        wait_seconds: time spent waiting in ``next``.
        bad_samples: each sample found unusable while reading; another one of its set stands in for it.

    Raises:
        UserError: as :func:`training_shards`; DALI is missing; not one photo can be decoded (from ``next``).
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        *,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._micro_batch = micro_batch
        self._step = micro_batch * world_size
        self._next = start + rank * micro_batch
        self._device = _device(device)
        self._threads = reading_threads(config.data)
        sets = _opened(config, warn=False)
        self._order = training_order(config, sets)
        shards = ShardSet([shard for part in sets for shard in part.shards])
        self._photos = _Photos(shards, self._threads, self._device, np.cumsum([len(part) for part in sets]))
        self.samples, self.lost = len(shards), sum(part.lost for part in sets)
        self.wait_seconds = 0.0
        self._ready: queue.Queue[tuple[Batch, torch.cuda.Event | None] | BaseException] = queue.Queue(
            maxsize=config.data.prefetch
        )
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._produce, name="mixreorg-loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before DALI takes its pipelines down under the thread

    @property
    def bad_samples(self) -> list[Bad]:
        return list(self._photos.bad_samples)

    @property
    def left_out(self) -> list[Bad]:
        """What the shards' indexes leave out: broken samples, lost ends of tars, files that are no tars."""
        return self._photos.shards.bad

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if self._failed is not None:
            raise self._failed
        begin = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - begin
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        batch, done = item
        if done is not None:
            _adopt(batch, done)
        return batch

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and close the files; safe to call twice."""
        self._stop.set()
        while self._thread.is_alive():
            try:  # the thread may stand before a full queue
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)
        self._photos.close()
        atexit.unregister(self.close)

    def _produce(self) -> None:
        try:
            with _side_stream(self._device):
                self._run_pipeline()
        except BaseException as error:  # whatever it is, it belongs to the consumer
            self._put(error)

    def _run_pipeline(self) -> None:
        """Keep the pipeline fed `depth` batches ahead of the one being taken out."""
        depth = 2
        augment = self._config.data.augment
        pipeline = training_graph(
            augment,
            self._config.model.image_size,
            device=self._device,
            batch=self._micro_batch,
            threads=self._threads,
            depth=depth,
            hw_decoder_load=self._config.data.hw_decoder_load,
        )
        pending = deque(self._request() for _ in range(depth))
        for request in pending:
            feed(pipeline, request.inputs)
        pipeline.schedule_run()  # the first call runs `depth` batches
        while not self._stop.is_set():
            try:
                images = take(pipeline, self._device)
            except RuntimeError as error:
                self._repair(pipeline, pending, error)
                continue
            request = pending.popleft()
            pending.append(self._request())
            feed(pipeline, pending[-1].inputs)
            pipeline.schedule_run()
            batch = self._batch(request, images)
            self._put((batch, torch.cuda.current_stream().record_event() if images.is_cuda else None))

    def _repair(self, pipeline: Any, pending: deque[_Request], error: RuntimeError) -> None:
        """After a batch failed: find its bad photos, drop what is in flight, and run all of it again."""
        head = pending[0]
        self._photos.find_bad(head.numbers, head.inputs["encoded"], error)
        for _ in range(len(pending) - 1):
            try:
                take(pipeline, self._device)
            except RuntimeError:
                continue  # it gets its turn at the head
        for place, request in enumerate(pending):
            pending[place] = self._request_at(request.position)
            feed(pipeline, pending[place].inputs)
            pipeline.schedule_run()

    def _request(self) -> _Request:
        position, self._next = self._next, self._next + self._step
        return self._request_at(position)

    def _request_at(self, position: int) -> _Request:
        numbers, samples, encoded, sizes = self._photos.read(self._order.at(position, self._micro_batch))
        inputs = draw(self._config.data.augment, self._config.seed, position, sizes)
        return _Request(position, numbers, samples, {"encoded": encoded, **inputs})

    def _batch(self, request: _Request, images: Tensor) -> Batch:
        context, count = self._config.model.text.context, len(request.samples)
        chosen = uniforms(self._config.seed, Purpose.CAPTION, request.position, count, 1)[:, 0]
        texts = [s.captions[int(u * len(s.captions))] for s, u in zip(request.samples, chosen, strict=True)]
        ids, lengths = self._tokenizer.encode(texts, context)
        batch = Batch(
            images, devices.upload(ids, self._device), lengths, request.position, [s.key for s in request.samples]
        )
        if self._config.loss.multi_label:
            width = self._config.data.nouns
            numbers = uniforms(self._config.seed, Purpose.NOUNS, request.position, count, max(1, width))
            prompts = [
                prompt
                for sample, text, row in zip(request.samples, texts, numbers, strict=True)
                for prompt in _noun_prompts(sample.nouns, text, row[:width])
            ]
            ids, batch.noun_lengths = self._tokenizer.encode(prompts, context)
            batch.noun_ids = devices.upload(ids.reshape(count, width, context), self._device)
        return batch

    def _put(self, item: tuple[Batch, torch.cuda.Event | None] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


class ValidationLoader:
    """Image-text pairs in order, each once: the middle square of the photo and its first caption.

    Iterates anew each time. Of several ranks, each takes every world_size-th sample; the last batch may be smaller,
    and photos that cannot be decoded are left out. ``Batch.position`` is the place in the whole set of the batch's
    first pair.

    Raises:
        UserError: DALI is missing.
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
        device: torch.device | str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._context = config.model.text.context
        self._micro_batch = micro_batch
        self._device = _device(device)
        threads = reading_threads(config.data)
        self._photos = _Photos(shards, threads, self._device)
        self._numbers = np.arange(rank, len(shards), world_size)
        self._pipeline = validation_graph(
            config.model.image_size,
            device=self._device,
            batch=micro_batch,
            threads=threads,
            hw_decoder_load=config.data.hw_decoder_load,
        )

    def __len__(self) -> int:
        """Pairs of this rank, undecodable ones included."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._numbers), self._micro_batch):
            batch = self._load(self._numbers[first : first + self._micro_batch])
            if batch is not None:
                yield batch

    def close(self) -> None:
        self._photos.close()

    def _load(self, numbers: np.ndarray) -> Batch | None:
        while True:
            found, samples, encoded, _ = self._photos.read(numbers, substitute=False)
            if not found:
                return None
            try:
                feed(self._pipeline, {"encoded": encoded})
                self._pipeline.schedule_run()
                images = take(self._pipeline, self._device)
                break
            except RuntimeError as error:
                self._photos.find_bad(found, encoded, error)
        ids, lengths = self._tokenizer.encode([s.captions[0] for s in samples], self._context)
        return Batch(images, devices.upload(ids, self._device), lengths, found[0], [s.key for s in samples])


class _Photos:
    """Reads samples with a small pool of threads, and keeps account of the ones that cannot be used.

    Args:
        ends: where the sets end whose samples may stand in for one another; None: all of `shards` is one set.
    """

    def __init__(self, shards: ShardSet, threads: int, device: torch.device, ends: np.ndarray | None = None) -> None:
        self.shards = shards
        self.threads = threads
        self.bad: set[int] = set()
        self.bad_samples: list[Bad] = []
        self._ends = np.array([len(shards)]) if ends is None else ends
        self._decoder = Decoder(device, 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mixreorg-read")
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def read(
        self, numbers: np.ndarray, *, substitute: bool = True
    ) -> tuple[list[int], list[Sample], list[np.ndarray], np.ndarray]:
        """Samples, their encoded photos and the photos' sizes ``[B, 2]``.

        A bad sample is replaced by a good one of its set (see :func:`~.order.stand_in`) or, without `substitute`,
        left out. The replacement does not depend on when a sample was found bad, so order and resuming stay exact.
        """
        self.shards.open_for(numbers)
        parts = np.array_split(numbers, self.threads)  # one task per thread: a task costs more than a cached read
        read = [pair for part in self._pool.map(self._read_part, parts) for pair in part]
        kept = []
        for number, pair in zip(numbers.tolist(), read, strict=True):
            if pair is None and substitute:
                number, pair = self._stand_in(number)
            if pair is not None:
                kept.append((number, *pair))
        encoded = [np.frombuffer(sample.image, np.uint8) for _, sample, _ in kept]
        sizes = np.array([size for *_, size in kept], dtype=np.int64).reshape(-1, 2)
        return [number for number, *_ in kept], [sample for _, sample, _ in kept], encoded, sizes

    def find_bad(self, numbers: list[int], encoded: list[np.ndarray], failure: RuntimeError) -> None:
        """Mark the photos that made a batch fail, by decoding its halves, their halves and so on.

        Raises:
            RuntimeError: `failure`, if all of them decode and it names none.
        """
        bad = self._decoder.failing(encoded)
        # A photo may decode whole and fail in its crop; DALI then names it.
        bad = bad or {int(place): "cannot be decoded" for place in re.findall(r"sample #(\d+)", str(failure))}
        if not bad:
            raise failure
        for place, reason in bad.items():
            self._mark(numbers[place], reason)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.shards.close()

    def _stand_in(self, number: int) -> tuple[int, tuple[Sample, tuple[int, int]]]:
        part = int(np.searchsorted(self._ends, number, side="right"))
        end = int(self._ends[part])
        first = int(self._ends[part - 1]) if part else 0
        for attempt in range(64 + end - first):
            other = stand_in(number, attempt, first, end - first)
            if other not in self.bad:
                self.shards.open_for(np.array([other]))
                (pair,) = self._read_part(np.array([other]))
                if pair is not None:
                    return other, pair
        folder = self.shards.bad_sample(number, "").shard
        raise UserError(f"not one sample of the shards can be used ({folder} …); see `mixreorg shards verify`")

    def _read_part(self, numbers: np.ndarray) -> list[tuple[Sample, tuple[int, int]] | None]:
        """Samples with their photos' heights and widths; None for a bad one."""
        pairs: list[tuple[Sample, tuple[int, int]] | None] = []
        for number in numbers.tolist():
            pair = None
            if number not in self.bad:
                try:
                    sample = self.shards.read(number)
                    pair = sample, self._decoder.size(sample.image)
                except (ValueError, OSError) as error:  # no photo, no caption; a shard that is cut or gone
                    self._mark(number, str(error), alone=isinstance(error, ValueError))
            pairs.append(pair)
        return pairs

    def _mark(self, number: int, reason: str, *, alone: bool = True) -> None:
        """Note a bad sample; `alone` False: the reason is its shard's, and said once."""
        with self._lock:
            if number in self.bad:
                return
            self.bad.add(number)
        bad = self.shards.bad_sample(number, reason)
        self.bad_samples.append(bad)
        if alone:
            log.warning("%s", f"{bad}; another sample stands in for it".replace("\t", ": "))
        elif reason not in self._warned:
            self._warned.add(reason)
            log.warning("%s; other samples stand in for its", reason)


def _noun_prompts(nouns: list[str], caption: str, numbers: np.ndarray) -> list[str]:
    """One prompt per number: distinct nouns while there are enough, repeated ones after; else the caption."""
    if not nouns:
        return [caption] * len(numbers)
    prompts: list[str] = []
    left: list[str] = []
    for number in numbers:
        left = left or list(dict.fromkeys(nouns))
        prompts.append(NOUN_PROMPT.format(left.pop(int(number * len(left)))))
    return prompts


def _device(device: torch.device | str | None) -> torch.device:
    """`device` with its number if it is a GPU; None: as :func:`~mixreorg_fast.devices.choose`."""
    found = devices.choose() if device is None else torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if found.type == "cpu" else found  # the CPU has no number here


def _side_stream(device: torch.device) -> contextlib.AbstractContextManager:
    """On a GPU, a stream of the loader's own: its copies do not queue behind the training step."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def _adopt(batch: Batch, done: torch.cuda.Event) -> None:
    """Make a batch of the side stream safe to use, and later to free, on the consumer's stream."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(done)
    for tensor in (batch.images, batch.ids, batch.noun_ids):
        if tensor is not None:
            tensor.record_stream(stream)
