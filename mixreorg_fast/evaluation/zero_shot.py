"""The score of zero-shot segmentation on a dataset (GroupViT's protocol)."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import ranks
from ..config import InferenceConfig
from ..errors import RankError, UserError
from ..files import saving
from ..inference.model import Model
from ..inference.overlay import save_labels
from ..inference.segmenter import Segmenter
from . import metrics
from .datasets import Sample, SegmentationDataset

if TYPE_CHECKING:
    from .predictors import PixelScores

READERS = 4  # threads that read photos and masks ahead
THRESHOLDS = tuple(step / 20 for step in range(21))  # of the background, that a sweep tries
SAVE_EVERY = 30.0  # seconds between saved counts, from which an interrupted evaluation resumes


class Read(NamedTuple):
    """A photo by its index in the dataset, and the network's input for it."""

    index: int
    sample: Sample
    tensor: Tensor


def segmenter_for(
    model: Model,
    dataset: SegmentationDataset,
    settings: InferenceConfig | None = None,
    threshold: float | None = None,
    batch: int = 8,
) -> Segmenter:
    """A segmenter of the photos of `dataset` by its classes; errors are those of `threshold_for` and `Segmenter`.

    Args:
        settings: None: those that the model carries.
        threshold: background threshold; None: the settings' one, or else the dataset's usual one.
        batch: photos of one network size, or windows, per forward pass.
    """
    settings = model.inference if settings is None else settings
    threshold = threshold_for(dataset, threshold, settings.background_threshold, dataset.background_threshold)
    settings = settings.model_copy(update={"background_threshold": None}).with_options(background_threshold=threshold)
    return Segmenter(model, dataset.prompts, settings, batch)


def threshold_for(dataset: SegmentationDataset, given: float | None, *usual: float | None) -> float | None:
    """The background threshold: `given`, else the first of `usual` that is not None; None for a dataset without
    background, for which `given` raises a UserError."""
    if dataset.has_background:
        return next((value for value in (given, *usual) if value is not None), None)
    if given is not None:
        raise UserError(
            f"background_threshold {given} does not apply: {dataset.kind} at {dataset.root} has no class "
            f"'background' (its first is '{dataset.classes[0]}')"
        )
    return None


def evaluate(
    segmenter: Segmenter | PixelScores,
    dataset: SegmentationDataset,
    limit: int | None = None,
    progress: bool = True,
    predictions: str | Path | None = None,
    keep: str | Path | None = None,
    resume: bool = False,
    sweep: bool = False,
) -> dict[str, Any]:
    """Score a model zero-shot on `dataset`.

    Under a process group every rank scores its share of the photos, each photo once, and all return the sum. Errors are
    those of the dataset and of the model.

    Args:
        segmenter: of :func:`segmenter_for`, or of :func:`~mixreorg_fast.evaluation.predictors.open_model`.
        limit: score only so many photos, evenly spread over the split.
        progress: show a bar (on rank 0).
        predictions: folder that gets the labels of each photo as a PNG of its name (see `save_labels`).
        keep: file (one per rank, its number appended) that holds the counts while this runs; removed at the end.
        resume: continue from the counts in `keep` if they belong to this model, dataset and settings.
        sweep: try every background threshold of `THRESHOLDS` beside the settings' one.
    Returns:
        what docs/evaluate.md lists under "Scores", in percent; None for a class in neither truth nor prediction.
    """
    device, classes = segmenter.device, dataset.classes
    described = {"dataset": dataset.kind, "root": str(dataset.root), "split": dataset.split, **segmenter.about}
    rank, world = ranks.rank(), ranks.world_size()
    thresholds = THRESHOLDS if sweep else ()
    tally = metrics.Tally(len(classes), len(thresholds))
    kept = None if keep is None else Path(f"{keep}.{rank}")
    about = {**described, "limit": limit, "world": world}
    if kept is not None:
        weights = [] if segmenter.model is None else segmenter.model.parameters()
        about["model_sum"] = sum(parameter.double().sum().item() for parameter in weights)
        if resume:
            tally.restore(kept, about)
            if rank == 0:
                some = f"{len(tally.done)} photos are done already ({kept})"
                none = f"{kept} holds no counts of this evaluation, so it begins at the first photo"
                print(f"--resume: {some if tally.done else none}", file=sys.stderr, flush=True)
    try:
        indices = dataset.spread(limit)
        left = [index for index in indices[rank::world] if index not in tally.done]
        saved = time.monotonic()
        with tqdm(total=len(indices), desc="evaluate", unit="photo", disable=not progress or rank > 0) as bar:
            bar.update(len(indices) - len(left) * world if tally.done else 0)
            for photos in _batches(segmenter, dataset, left):
                inputs = torch.stack([tensor for *_, tensor in photos])
                sizes = [sample.mask.shape for _, sample, _ in photos]
                for (index, sample, _), decoded in zip(photos, segmenter(inputs, sizes), strict=True):
                    truth = torch.from_numpy(sample.mask).to(device)
                    tally.add(index, truth, decoded)
                    for number, threshold in enumerate(thresholds):
                        if decoded.relabelled is None:
                            raise UserError("a threshold sweep needs a model that gives scores without the background")
                        labels = decoded.relabelled(threshold)
                        tally.sweep[number] += metrics.confusion_matrix(truth, labels, len(classes))
                    if predictions is not None:
                        save_labels(Path(predictions) / f"{sample.name}.png", decoded.labels, dataset.has_background)
                bar.update(min(len(photos) * world, bar.total - bar.n))
                if kept is not None and time.monotonic() - saved > SAVE_EVERY:
                    with saving(kept):
                        tally.keep(kept, about)
                    saved = time.monotonic()
    except UserError as error:
        # A photo, file or answer of this rank's share, which other ranks do not see.
        raise RankError(str(error)) from error
    total = tally.over_ranks(device)
    if kept is not None:
        kept.unlink(missing_ok=True)
    return _scores(total, dataset, thresholds) | {"images": total.images, "settings": described}


def _scores(total: metrics.Tally, dataset: SegmentationDataset, thresholds: Sequence[float]) -> dict[str, Any]:
    matrix = total.matrix
    iou = [None if math.isnan(value) else value for value in metrics.per_class_iou(matrix).tolist()]
    scores: dict[str, Any] = {
        "mIoU": metrics.mean_iou(matrix),
        "per_class": dict(zip(dataset.classes, iou, strict=True)),
        "per_class_images": dict(zip(dataset.classes, total.photos.tolist(), strict=True)),
        "pixel_accuracy": metrics.pixel_accuracy(matrix),
        "mean_accuracy": metrics.mean_accuracy(matrix),
        "boundary_mIoU": metrics.mean_boundary_iou(total.boundary),
    }
    if (frequent := metrics.frequent_mean_iou(matrix, total.photos)) is not None:
        scores["frequent_mIoU"] = frequent
    if dataset.has_background:
        scores["all_background_mIoU"] = metrics.mean_iou(metrics.one_class_matrix(matrix))
    if total.groups_used:
        scores |= {"oracle_mIoU": metrics.mean_iou(total.oracle), "groups_used": total.groups_used}
        scores["whole_photo_mIoU"] = metrics.mean_iou(total.whole)
    if thresholds:
        matrices = zip(thresholds, total.sweep, strict=True)
        tried = {f"{threshold:.2f}": metrics.mean_iou(matrix) for threshold, matrix in matrices}
        scores |= {"threshold_sweep": tried, "best_threshold": float(max(tried, key=tried.__getitem__))}
    return scores


def _batches(
    segmenter: Segmenter | PixelScores, dataset: SegmentationDataset, indices: Sequence[int]
) -> Iterator[list[Read]]:
    """Photos of equal network size together, read ahead by threads."""
    batch = segmenter.batch

    def read(index: int) -> Read:
        sample = dataset[index]
        return Read(index, sample, segmenter.tensor(sample.image))

    def read_ahead() -> Iterator[Read]:
        following = iter(indices)
        with ThreadPoolExecutor(READERS) as pool:
            ahead = deque(pool.submit(read, index) for index in islice(following, batch))
            while ahead:
                item = ahead.popleft().result()
                ahead.extend(pool.submit(read, index) for index in islice(following, 1))
                yield item

    waiting: defaultdict[torch.Size, list[Read]] = defaultdict(list)
    for item in read_ahead():
        waiting[item.tensor.shape].append(item)
        fullest = max(waiting, key=lambda size: len(waiting[size]))
        # Photos of many sizes: the number waiting is bounded, because they are held in memory.
        if len(waiting[fullest]) == batch or sum(map(len, waiting.values())) >= 4 * batch:
            yield waiting.pop(fullest)
    yield from waiting.values()
