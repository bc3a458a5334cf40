"""The shards that a run trains on: which they are, the order of their samples, the tokenizer of their captions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...config import Config, DataConfig
from ...errors import UserError
from ..shards.scan import Bad
from ..shards.shard_set import ShardSet, open_shards
from ..text.tokenizer import Tokenizer
from .order import Mixture, Order

# Half a million samples settle a tokenizer's merges. More samples only take time.
TOKENIZER_SAMPLES = 500_000


@dataclass(frozen=True)
class TrainingSet:
    """The samples that a run trains on, from one set of shards or several, opened once.

    Attributes:
        shards: of all sets, one set after the other.
        ends: the number of samples up to the end of each set, int64 ``[sets]``.
        order: which sample stands at which position of a run.
        lost: samples that the shards' indexes leave out, summed over the sets.
        digest: of all that the order depends on besides the seed. When it changes, positions mean other samples.
    """

    shards: ShardSet
    ends: np.ndarray
    order: Order | Mixture
    lost: int
    digest: str

    @classmethod
    def open(cls, config: Config, *, warn: bool = False) -> TrainingSet:
        """Open the shards of ``data.shards``; errors and `warn` as of :func:`~..shards.shard_set.open_shards`.

        Raises:
            UserError: the weight of a set is too small.
        """
        patterns, weights = zip(*shard_sets(config.data), strict=True)
        sets = [open_shards(pattern, warn=warn) for pattern in patterns]
        sizes = [part.sizes for part in sets]
        try:
            order = Order(sizes[0], config.seed) if len(sets) == 1 else Mixture(sizes, weights, config.seed)
        except ValueError as error:
            raise UserError(f"data.shards: {error}; leave that set out") from None
        lines = [f"{weight} {of_shards.tolist()}\n" for weight, of_shards in zip(weights, sizes, strict=True)]
        return cls(
            shards=ShardSet([shard for part in sets for shard in part.shards]),
            ends=np.cumsum([len(part) for part in sets]),
            order=order,
            lost=sum(part.lost for part in sets),
            digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        )

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def bad(self) -> list[Bad]:
        """What the shards' indexes leave out: broken samples, lost ends of tars, files that are not tars."""
        return self.shards.bad

    def train_tokenizer(self, vocab_size: int) -> Tokenizer:
        """A tokenizer of the captions, as :meth:`Tokenizer.train`."""
        return Tokenizer.train(self.shards.captions(TOKENIZER_SAMPLES), vocab_size)


def shard_sets(data: DataConfig) -> list[tuple[str | list[str], float]]:
    """Patterns and weights of the sets of ``data.shards``; a single set where no weights are given."""
    shards: Any = data.shards
    if isinstance(shards, str) or not shards or isinstance(shards[0], str):
        return [(shards, 1.0)]
    return [(part.pattern, part.weight) for part in shards]
