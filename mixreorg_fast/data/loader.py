"""Batches for training and for retrieval, decoded and augmented by NVIDIA DALI.

Order and randomness are ours, pixels are DALI's. Position p of a run ("samples consumed") has its sample and its
augmentation from (seed, p) alone (``order.py``, ``augment.py``): the bytes of the samples due are read here and fed to
a DALI graph that holds no randomness of its own. So a batch is a pure function of (seed, position): a run resumes
from one integer, and any number of ranks continues the same order with the same pixels (on a GPU up to the rounding of
its JPEG hardware).

DALI's own WebDataset reader was tried and left: its order depends on the number of shards it is split into, its
checkpoints load silently into another number of ranks, its shuffle is a window over a fixed order, its random
operators hold state, one photo that cannot be decoded loses the whole batch, and one that is no image at all can
crash the process. Here every header is parsed first (by DALI's own parser, 2 µs a photo), and a batch that fails
later is searched for the photo at fault, which another one stands in for.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..errors import UserError
from .augment import draw, training_graph, validation_graph
from .order import Order, Purpose, uniforms
from .scenes import ensure_scenes
from .shards import LARGEST_PHOTO, Sample, ShardSet, open_shards
from .tokenizer import Tokenizer

log = logging.getLogger("mixreorg_fast")

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


def training_shards(config: Config) -> ShardSet:
    """The shards a run trains on: the configured ones, else the embedded scenes (made where absent)."""
    return open_shards(config.data.shards or list(map(str, ensure_scenes(config.data.scenes).train)))


def validation_shards(config: Config) -> ShardSet | None:
    """The image-text pairs for retrieval: the configured ones, else the scenes' when those are trained on."""
    if config.data.val_shards:
        return open_shards(config.data.val_shards)
    return None if config.data.shards else open_shards(list(map(str, ensure_scenes(config.data.scenes).val)))


def captions(config: Config, limit: int | None = None) -> Iterator[str]:
    """All captions of the training shards in order, or those of about `limit` samples spread over them."""
    return training_shards(config).captions(limit)


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
        samples: training samples, N.
        wait_seconds: time spent waiting in ``next``.
        bad_samples: (key, reason) of each sample found unreadable so far; in its place comes the next good one of
            the shards.

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
        self._threads = min(config.data.threads, os.cpu_count() or 1)
        self._photos = _Photos(training_shards(config), self._threads, self._device)
        self._order = Order(self._photos.shards.sizes, config.seed)
        self.samples = len(self._photos.shards)
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
    def bad_samples(self) -> list[tuple[str, str]]:
        return list(self._photos.bad_samples)

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
        )
        pending = deque(self._request() for _ in range(depth))
        for request in pending:
            _feed(pipeline, request.inputs)
        pipeline.schedule_run()  # the first call runs `depth` batches
        while not self._stop.is_set():
            try:
                images = _take(pipeline, self._device)
            except RuntimeError as error:
                self._repair(pipeline, pending, error)
                continue
            request = pending.popleft()
            pending.append(self._request())
            _feed(pipeline, pending[-1].inputs)
            pipeline.schedule_run()
            batch = self._batch(request, images)
            self._put((batch, torch.cuda.current_stream().record_event() if images.is_cuda else None))

    def _repair(self, pipeline: Any, pending: deque[_Request], error: RuntimeError) -> None:
        """After a batch failed: find its bad photos, drop what is in flight, and run all of it again."""
        head = pending[0]
        self._photos.find_bad(head.numbers, head.samples, head.inputs["encoded"], error)
        for _ in range(len(pending) - 1):
            try:
                _take(pipeline, self._device)
            except RuntimeError:
                continue  # it gets its turn at the head
        for place, request in enumerate(pending):
            pending[place] = self._request_at(request.position)
            _feed(pipeline, pending[place].inputs)
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
        batch = Batch(images, _to(ids, self._device), lengths, request.position, [s.key for s in request.samples])
        if self._config.loss.multi_label:
            width = self._config.data.nouns
            numbers = uniforms(self._config.seed, Purpose.NOUNS, request.position, count, max(1, width))
            prompts = [
                prompt
                for sample, text, row in zip(request.samples, texts, numbers, strict=True)
                for prompt in _noun_prompts(sample.nouns, text, row[:width])
            ]
            ids, batch.noun_lengths = self._tokenizer.encode(prompts, context)
            batch.noun_ids = _to(ids.reshape(count, width, context), self._device)
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
        threads = min(config.data.threads, os.cpu_count() or 1)
        self._photos = _Photos(shards, threads, self._device)
        self._numbers = np.arange(rank, len(shards), world_size)
        self._pipeline = validation_graph(
            config.model.image_size, device=self._device, batch=micro_batch, threads=threads
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
                _feed(self._pipeline, {"encoded": encoded})
                self._pipeline.schedule_run()
                images = _take(self._pipeline, self._device)
                break
            except RuntimeError as error:
                self._photos.find_bad(found, samples, encoded, error)
        ids, lengths = self._tokenizer.encode([s.captions[0] for s in samples], self._context)
        return Batch(images, _to(ids, self._device), lengths, found[0], [s.key for s in samples])


@dataclass
class _Photos:
    """Reads samples with a small pool of threads, and keeps account of the ones that cannot be decoded."""

    shards: ShardSet
    threads: int
    device: torch.device
    bad: dict[int, str] = field(default_factory=dict)  # sample -> reason
    bad_samples: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="mixreorg-read")
        self._parse = _header_parser()
        self._probe: Any = None

    def read(
        self, numbers: np.ndarray, *, substitute: bool = True
    ) -> tuple[list[int], list[Sample], list[np.ndarray], np.ndarray]:
        """Samples, their encoded photos and the photos' sizes ``[B, 2]``.

        A bad sample is replaced by the next good one of the whole set or, without `substitute`, left out. The
        replacement does not depend on when a sample was found bad, so order and resuming stay exact.
        """
        self.shards.open_for(numbers)
        parts = np.array_split(numbers, self.threads)  # one task per thread: a task costs more than a cached read
        read = [pair for part in self._pool.map(self._read_part, parts) for pair in part]
        kept = []
        for number, (sample, size) in zip(numbers.tolist(), read, strict=True):
            while substitute and size is None:
                if len(self.bad) == len(self.shards):
                    raise UserError("not one photo of the shards can be decoded; see `mixreorg shards verify`")
                number = (number + 1) % len(self.shards)
                self.shards.open_for(np.array([number]))
                ((sample, size),) = self._read_part(np.array([number]))
            if size is not None:
                kept.append((number, sample, size))
        encoded = [np.frombuffer(sample.image, np.uint8) for _, sample, _ in kept]
        sizes = np.array([size for *_, size in kept], dtype=np.int64).reshape(-1, 2)
        return [number for number, *_ in kept], [sample for _, sample, _ in kept], encoded, sizes

    def find_bad(
        self, numbers: list[int], samples: list[Sample], encoded: list[np.ndarray], failure: RuntimeError
    ) -> None:
        """Mark the photos that made a batch fail, by decoding its photos one by one.

        Raises:
            RuntimeError: `failure`, if all of them decode and it names none.
        """
        if self._probe is None:
            self._probe = validation_graph(32, device=self.device, batch=1, threads=1)
        bad = {}
        for place, photo in enumerate(encoded):
            try:
                _feed(self._probe, {"encoded": [photo]})
                self._probe.schedule_run()
                _take(self._probe, self.device)
            except RuntimeError as error:
                bad[place] = error
        # A photo may decode whole and fail in its crop; DALI then names it.
        bad = bad or {int(place): failure for place in re.findall(r"sample #(\d+)", str(failure))}
        if not bad:
            raise failure
        for place, error in bad.items():
            self._mark(numbers[place], samples[place].key, _decode_reason(error))

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self.shards.close()

    def _read_part(self, numbers: np.ndarray) -> list[tuple[Sample | None, tuple[int, int] | None]]:
        """Samples with their photos' sizes; a size of None marks a bad one."""
        pairs: list[tuple[Sample | None, tuple[int, int] | None]] = []
        for number in numbers.tolist():
            if number in self.bad:
                pairs.append((None, None))
                continue
            try:
                sample = self.shards.read(number)
                pairs.append((sample, self._parse(sample.image)))
            except (ValueError, OSError) as error:  # no photo; a shard that is cut or gone
                self._mark(number, self.shards.key(number), str(error))
                pairs.append((None, None))
        return pairs

    def _mark(self, number: int, key: str, reason: str) -> None:
        if number not in self.bad:
            self.bad[number] = reason
            self.bad_samples.append((key, reason))
            log.warning("sample %s cannot be decoded (%s); the next one stands in for it", key, reason)


def _header_parser() -> Callable[[bytes], tuple[int, int]]:
    """A function from an encoded photo to its height and width as they will be decoded.

    It raises ValueError on what DALI's decoder would refuse at the header: such a photo must not enter a pipeline,
    for DALI 2.4 may crash in the operators behind the decoder. The parser is the one DALI itself uses.

    Raises:
        UserError: DALI is not installed.
    """
    try:
        import nvidia.dali  # noqa: F401
        from nvidia import nvimgcodec
    except ImportError:
        raise UserError(
            "NVIDIA DALI is not installed; training reads its data with it: pip install 'mixreorg_fast[train]'"
        ) from None

    def parse(photo: bytes) -> tuple[int, int]:
        try:
            stream = nvimgcodec.CodeStream(photo)
            height, width = stream.height, stream.width
        except RuntimeError:
            raise ValueError("not an image") from None
        if height * width > LARGEST_PHOTO:
            raise ValueError(f"{width} x {height} pixels, more than {LARGEST_PHOTO}")
        return (width, height) if _turned(photo) else (height, width)

    return parse


def _turned(photo: bytes) -> bool:
    """Whether the EXIF orientation, which the decoder heeds, swaps height and width."""
    if b"Exif\0\0" not in photo[:4096]:
        return False
    import io

    from PIL import Image

    try:
        return Image.open(io.BytesIO(photo)).getexif().get(0x0112, 1) >= 5
    except Exception:  # a damaged EXIF block; the crop's shape is then a little off, nothing else
        return False


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


def _feed(pipeline: Any, inputs: dict[str, Any]) -> None:
    for name, data in inputs.items():
        pipeline.feed_input(name, data)


def _take(pipeline: Any, device: torch.device) -> Tensor:
    """The oldest batch in flight, copied out of DALI's buffers, fp32 ``[B, 3, S, S]``."""
    if device.type == "cuda":
        (output,) = pipeline.share_outputs(cuda_stream=torch.cuda.current_stream(device))
    else:
        (output,) = pipeline.share_outputs()
    try:
        return torch.from_dlpack(output.as_tensor()).clone()
    finally:
        pipeline.release_outputs()


def _decode_reason(error: RuntimeError) -> str:
    """The line of DALI's message that says what happened to the photo."""
    lines = [line.strip() for line in str(error).splitlines() if "decode" in line.lower() or "codec" in line.lower()]
    return lines[-1] if lines else "cannot be decoded"


def _device(device: torch.device | str | None) -> torch.device:
    """`device` with its number if it is a GPU; None: the current GPU where there is one."""
    found = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if found.type == "cpu" else found  # the CPU has no number here


def _to(ids: Tensor, device: torch.device) -> Tensor:
    return ids if device.type == "cpu" else ids.pin_memory().to(device, non_blocking=True)


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
