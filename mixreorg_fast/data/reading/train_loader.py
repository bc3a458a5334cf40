"""Batches for training, decoded and augmented by NVIDIA DALI.

Order and randomness are ours, pixels are DALI's. Position p of a run ("samples consumed") has its sample and its
augmentation from (seed, p) alone (``order.py``, ``augment.py``). The bytes of the samples are read here and fed to a
DALI graph without randomness of its own. So a batch is a pure function of (seed, position): a run resumes from one
integer, and any number of ranks continues the same order with the same pixels (on a GPU up to the rounding of its
JPEG hardware).

DALI's own WebDataset reader was tried and rejected. Its order depends on the number of shards it is split into. Its
checkpoints load silently into another number of ranks. Its shuffle is a window over a fixed order. Its random operators
hold state. One photo that cannot be decoded loses the whole batch, and a file that is not an image can crash the
process. Here every header is parsed first, by DALI's own parser. A batch that fails later is searched for the photo at
fault, and another photo replaces that one.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...config import Config
from ..shards.bad import Bad
from ..shards.shard_set import Sample
from ..text.tokenizer import Tokenizer
from .augment import draw, training_graph
from .decoder import feed, take
from .order import Purpose, uniforms
from .pairs import Pairs
from .samples import SampleReader, reading_threads
from .training_set import TrainingSet

DEPTH = 2  # batches in DALI's pipeline
NOUN_PROMPT = "a photo of a {}."


@dataclass
class _Request:
    """A batch in preparation: the inputs of the pipeline, and the samples whose captions it needs."""

    position: int
    numbers: list[int]  # of the samples, bad ones already replaced
    samples: list[Sample]
    inputs: dict[str, Any]


class TrainLoader:
    """Endless training batches of one rank, prepared by a background thread.

    Micro-step j of M = micro_batch * world_size images takes positions start + j*M … start + (j+1)*M - 1 of the run;
    rank r takes the r-th part of these. Use as a context manager, or call :meth:`close`.

    Args:
        tokenizer: for the captions.
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
        self._config = config
        self._order = training_set.order
        self._tokenizer = tokenizer
        self._micro_batch = micro_batch
        self._step = micro_batch * world_size
        self._next = start + rank * micro_batch
        self._device = device or devices.choose()
        self._threads = reading_threads(config.data)
        self._reader = SampleReader(training_set.shards, self._threads, self._device, training_set.ends)
        self._ready: queue.Queue[tuple[Pairs, torch.cuda.Event | None] | BaseException] = queue.Queue(
            maxsize=config.data.prefetch
        )
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._produce, name="mixreorg-loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before DALI takes its pipelines down under the thread

    @property
    def bad_samples(self) -> list[Bad]:
        """Each sample found unusable while reading; another sample of its set replaces it."""
        return list(self._reader.bad_samples)

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Pairs:
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if self._failed is not None:
            raise self._failed
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        pairs, done = item
        if done is not None:
            _adopt(pairs, done)
        return pairs

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and close the files; safe to call twice."""
        self._stop.set()
        while self._thread.is_alive():
            try:  # the thread may be waiting for room in the queue
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)
        self._reader.close()
        atexit.unregister(self.close)

    def _produce(self) -> None:
        # On a GPU, a stream of the loader's own: its copies do not queue behind the training step.
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.Stream(self._device)) if on_gpu else contextlib.nullcontext()
        try:
            with stream:
                self._run_pipeline()
        except BaseException as error:  # every error is the consumer's to raise
            self._put(error)

    def _run_pipeline(self) -> None:
        """Keep the pipeline fed DEPTH batches ahead of the one being taken out."""
        pipeline = training_graph(
            self._config.data.augment,
            self._config.model.image_size,
            device=self._device,
            batch=self._micro_batch,
            threads=self._threads,
            depth=DEPTH,
            hw_decoder_load=self._config.data.hw_decoder_load,
        )
        pending = deque(self._request() for _ in range(DEPTH))
        for request in pending:
            feed(pipeline, request.inputs)
        pipeline.schedule_run()  # the first call runs DEPTH batches
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
            pairs = self._pairs(request, images)
            done: Any = torch.cuda.current_stream().record_event() if images.is_cuda else None
            self._put((pairs, done))

    def _repair(self, pipeline: Any, pending: deque[_Request], error: RuntimeError) -> None:
        """After a batch failed: find its bad photos, drop the batches in flight, and run all of them again."""
        head = pending[0]
        self._reader.find_bad(head.numbers, head.inputs["encoded"], error)
        for _ in range(len(pending) - 1):
            with contextlib.suppress(RuntimeError):  # a batch that fails too is repaired when it is the head
                take(pipeline, self._device)
        for place, request in enumerate(pending):
            pending[place] = self._request_at(request.position)
            feed(pipeline, pending[place].inputs)
            pipeline.schedule_run()

    def _request(self) -> _Request:
        position, self._next = self._next, self._next + self._step
        return self._request_at(position)

    def _request_at(self, position: int) -> _Request:
        numbers, samples, encoded, sizes = self._reader.read(self._order.at(position, self._micro_batch))
        inputs = draw(self._config.data.augment, self._config.seed, position, sizes)
        return _Request(position, numbers, samples, {"encoded": encoded, **inputs})

    def _pairs(self, request: _Request, images: Tensor) -> Pairs:
        context, count = self._config.model.text.context, len(request.samples)
        chosen = uniforms(self._config.seed, Purpose.CAPTION, request.position, count, 1)[:, 0]
        texts = [s.captions[int(u * len(s.captions))] for s, u in zip(request.samples, chosen, strict=True)]
        ids, lengths = self._tokenizer.encode(texts, context)
        keys = [sample.key for sample in request.samples]
        pairs = Pairs(images, devices.upload(ids, self._device), lengths, request.position, keys)
        if self._config.loss.multi_label:
            width = self._config.data.nouns
            numbers = uniforms(self._config.seed, Purpose.NOUNS, request.position, count, max(1, width))
            prompts = [
                prompt
                for sample, text, row in zip(request.samples, texts, numbers, strict=True)
                for prompt in _noun_prompts(sample.nouns, text, row[:width])
            ]
            ids, pairs.noun_lengths = self._tokenizer.encode(prompts, context)
            pairs.noun_ids = devices.upload(ids.reshape(count, width, context), self._device)
        return pairs

    def _put(self, item: tuple[Pairs, torch.cuda.Event | None] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


def _noun_prompts(nouns: list[str], caption: str, numbers: np.ndarray) -> list[str]:
    """One prompt per number: distinct nouns while there are enough, repeated ones after; without nouns the caption."""
    if not nouns:
        return [caption] * len(numbers)
    prompts: list[str] = []
    left: list[str] = []
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
