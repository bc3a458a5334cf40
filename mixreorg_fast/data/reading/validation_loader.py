"""Image-text pairs in order, for retrieval."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ... import devices
from ...config import Config
from ..shards.shard_set import ShardSet
from ..text.tokenizer import Tokenizer
from .augment import validation_graph
from .decoder import feed, take
from .pairs import Pairs
from .samples import SampleReader, reading_threads


class ValidationLoader:
    """The pairs of `shards` in order, each once: the middle square of the photo and its first caption.

    Iterates anew each time. Each of several ranks takes every world_size-th sample. The last batch may be smaller, and
    photos that cannot be decoded are left out. ``Pairs.position`` is the number of the batch's first sample.

    Args:
        device: where the batches go; None: as :func:`~mixreorg_fast.devices.choose`.

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
        device: torch.device | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._context = config.model.text.context
        self._micro_batch = micro_batch
        self._device = device or devices.choose()
        threads = reading_threads(config.data)
        self._reader = SampleReader(shards, threads, self._device)
        self._numbers = np.arange(rank, len(shards), world_size)
        self._pipeline = validation_graph(
            config.model.image_size,
            device=self._device,
            batch=micro_batch,
            threads=threads,
            hw_decoder_load=config.data.hw_decoder_load,
        )

    def __iter__(self) -> Iterator[Pairs]:
        for first in range(0, len(self._numbers), self._micro_batch):
            pairs = self._load(self._numbers[first : first + self._micro_batch])
            if pairs is not None:
                yield pairs

    def close(self) -> None:
        self._reader.close()

    def _load(self, numbers: np.ndarray) -> Pairs | None:
        while True:
            found, samples, encoded, _ = self._reader.read(numbers, substitute=False)
            if not found:
                return None
            try:
                feed(self._pipeline, {"encoded": encoded})
                self._pipeline.schedule_run()
                images = take(self._pipeline, self._device)
                break
            except RuntimeError as error:
                self._reader.find_bad(found, encoded, error)
        ids, lengths = self._tokenizer.encode([sample.captions[0] for sample in samples], self._context)
        keys = [sample.key for sample in samples]
        return Pairs(images, devices.upload(ids, self._device), lengths, found[0], keys)
