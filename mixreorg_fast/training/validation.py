"""Zero-shot scores and pictures of the model in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..config import Config, EvalDatasetConfig
from ..data.reading.loaders import ValidationLoader
from ..data.reading.training_set import open_validation_shards
from ..evaluation.datasets import SegmentationDataset, open_dataset
from ..evaluation.pictures import dataset_figure, mixing_figure, segments_figure
from ..evaluation.retrieval import retrieval_at_1
from ..evaluation.zero_shot import evaluate, segmenter_for
from ..inference.model import Model
from ..inference.segmenter import Segmenter
from ..ranks import Ranks
from .summary import WAYS


def score(model: Model, config: Config, ranks: Ranks, *, limit: int | None) -> dict[str, Any]:
    """Zero-shot mIoU per dataset and, with validation shards, retrieval R@1; call on every rank.

    `limit`: images per dataset; None: each dataset's own limit.
    """
    scores: dict[str, Any] = {}
    for entry in config.eval.datasets:
        segmenter, dataset = _segmenter(model, config, entry)
        images = min(filter(None, (limit, entry.limit)), default=None)
        scores[entry.name] = evaluate(segmenter, dataset, images, progress=limit is None)
    if config.data.val_shards:
        scores["retrieval"] = retrieval_at_1(model, _pairs(model, config, ranks, limit))
    return scores


def _segmenter(model: Model, config: Config, entry: EvalDatasetConfig) -> tuple[Segmenter, SegmentationDataset]:
    dataset = open_dataset(entry.dataset, entry.root, entry.split)
    return segmenter_for(model, dataset, config.eval.with_options(), entry.background_threshold), dataset


def _pairs(model: Model, config: Config, ranks: Ranks, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's images and token ids of ``data.val_shards``; `limit`: approximate number of pairs over all ranks."""
    assert model.tokenizer is not None and config.data.val_shards is not None
    shards, seen = open_validation_shards(config.data), 0
    loader = ValidationLoader(
        config, model.tokenizer, shards, micro_batch=64, rank=ranks.rank, world_size=ranks.size, device=ranks.device
    )
    with contextlib.closing(loader):
        for pairs in loader:
            yield pairs.images, pairs.ids
            seen += len(pairs.ids) * ranks.size
            if limit is not None and seen >= limit:
                break


def headline(scores: dict[str, Any]) -> dict[str, float]:
    """The main scores: mIoU, oracle mIoU (every segment with its best class), R@1 in both directions."""
    figures = {}
    for figure in ("mIoU", "oracle_mIoU"):
        figures |= {f"{name}_{figure}": value[figure] for name, value in scores.items() if figure in value}
    return figures | {f"{way}_R@1": scores["retrieval"][way] for way in WAYS if "retrieval" in scores}


def draw(model: Model, config: Config, images: Tensor, run: Path) -> None:
    """``segmentation.png`` of the first dataset, and ``mixing.png`` of training `images` ``[B, 3, H, W]``; without a
    dataset ``segments.png`` of those images."""
    if config.eval.datasets:
        dataset_figure(*_segmenter(model, config, config.eval.datasets[0]), run / "segmentation.png")
    elif len(images):
        shown = images[:6].float()
        segments_figure(shown, model.grouping(shown.to(model.device)), run / "segments.png", model.mean, model.std)
    group = config.mixing.group_size
    images = images[: len(images) // group * group][: max(group, 4 // group * group)].float().cpu()
    if len(images):
        patch, size = config.model.patch_size, images.shape[2]
        patches = F.unfold(images, patch, stride=patch).mT.contiguous()  # [B, N, 3 * patch * patch]
        plan = ops.MixPlan.sample(patches.shape[0], patches.shape[1], group, seed=config.seed)
        mixed = ops.patch_mix(patches, plan)
        restored = ops.patch_restore(mixed, plan)
        mixed, restored = (F.fold(x.mT, size, patch, stride=patch) for x in (mixed, restored))
        mixing_figure(images, mixed, restored, run / "mixing.png", model.mean, model.std)
