"""Zero-shot segmentation of photos by class names, and its score on a data set (GroupViT's protocol).

A photo is resized to a short side of 448, seen whole or through sliding windows, and cut into the network's final
segments; each segment carries the scores of every class, and :mod:`.decoding` leads from there to labels.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import RankError, UserError, nearest
from ..models.decoding import class_scores
from ..models.images import network_size, to_tensor
from ..models.prompts import TEMPLATES, text_classifier
from . import metrics
from .datasets import Sample, SegmentationDataset
from .decoding import Box, Decoded, decode, window_boxes
from .pictures import save_labels, saving

READERS = 4  # threads that read photos and masks ahead
SAVE_EVERY = 30.0  # seconds between the counts that an interrupted evaluation goes on from


@dataclass(frozen=True)
class Settings:
    """How photos are seen and decoded.

    Attributes:
        short_side: pixels; the network's input is rounded to the nearest multiple of the patch in both directions.
        mode: the photo "whole", or through windows of `window` px every `stride` px ("sliding").
        decoding: "groupvit" (published) or "direct" (straight to photo size), see :mod:`.decoding`.
        background_threshold: a segment whose best score is below min(this, the image's best) is background; None: the
            data set's usual one, or no background at all where it has none.
        templates: prompt templates.
        batch: photos of one network size, or windows, per forward pass.
    """

    short_side: int = 448
    mode: Literal["whole", "sliding"] = "whole"
    window: int = 448
    stride: int = 224
    decoding: Literal["groupvit", "direct"] = "groupvit"
    background_threshold: float | None = None
    templates: tuple[str, ...] = TEMPLATES["default"]
    batch: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        for name in ("short_side", "window", "stride", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, choices in (("mode", ("whole", "sliding")), ("decoding", ("groupvit", "direct"))):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} '{getattr(self, name)}' is no valid choice{nearest(getattr(self, name), choices)}"
                )
        if self.stride > self.window:
            raise UserError(
                f"stride {self.stride} leaves gaps between windows of {self.window} (at most {self.window})"
            )
        if self.background_threshold is not None and not 0 <= self.background_threshold <= 1:
            raise UserError(f"background_threshold must lie in 0..1, got {self.background_threshold}")

    @classmethod
    def from_config(cls, config: Any, background_threshold: float | None = None) -> Settings:
        """From the ``eval`` section of a run's configuration."""
        names = ("short_side", "mode", "window", "stride", "decoding")
        return cls(
            **{name: getattr(config, name) for name in names},
            templates=tuple(config.templates),
            background_threshold=background_threshold,
        )


class Segmenter:
    """A model, its class embeddings and the settings: photos in, labels out.

    Args:
        model: a :class:`~mixreorg_fast.models.GroupViT` in evaluation mode.
        texts: ``[T, D]`` from :func:`~mixreorg_fast.models.prompts.text_classifier`.
        settings: `background_threshold` None means that there is no background here.
    Raises:
        UserError: a window that is no multiple of the patch.
    """

    def __init__(self, model: Any, texts: Tensor, settings: Settings) -> None:
        patch = model.config.patch_size
        if settings.mode == "sliding" and settings.window % patch:
            low = settings.window // patch * patch
            raise UserError(
                f"window {settings.window} is no multiple of the patch {patch} "
                f"(nearest: {max(low, patch)} or {low + patch})"
            )
        self.model, self.texts, self.settings = model, texts, settings
        self.device = next(model.parameters()).device

    def network_size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) at which the network sees `image`."""
        return network_size((image.height, image.width), self.settings.short_side, self.model.config.patch_size)

    def tensor(self, image: Image.Image) -> Tensor:
        """The network's input ``[3, height, width]`` for `image`, on the CPU."""
        model = self.model
        return to_tensor(image, self.settings.short_side, model.config.patch_size, model.mean, model.std)

    @torch.no_grad()
    def __call__(self, inputs: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Decoded]:
        """Decode photos of one network size.

        Args:
            inputs: ``[B, 3, h, w]`` normalised.
            sizes: (H, W) of each photo.
        """
        settings, network = self.settings, (inputs.shape[2], inputs.shape[3])
        if settings.mode == "sliding":
            boxes = window_boxes(*network, settings.window, settings.stride)
        else:
            boxes = [Box(0, 0, *network)]
        crops = [image[:, t : t + h, left : left + w] for image in inputs for t, left, h, w in boxes]
        maps, scores = [], []
        for start in range(0, len(crops), settings.batch):
            seen = self.model.segments(torch.stack(crops[start : start + settings.batch]).to(self.device))
            maps.append(seen.maps.float())
            scores.append(class_scores(seen.embeddings, seen.image, self.texts, self.model.logit_multiplier()))
        maps, scores = torch.cat(maps), torch.cat(scores)
        for number, size in enumerate(sizes):
            own = slice(number * len(boxes), (number + 1) * len(boxes))
            yield decode(maps[own], scores[own], boxes, network, size, settings.background_threshold, settings.decoding)

    def segment(self, image: Image.Image) -> Decoded:
        """Decode one RGB photo at its own size."""
        return next(iter(self(self.tensor(image)[None], [(image.height, image.width)])))


def settings_for(settings: Settings, dataset: SegmentationDataset) -> Settings:
    """`settings` with the background threshold that holds for `dataset`.

    Raises:
        UserError: a threshold for a data set without background.
    """
    if settings.background_threshold is None:
        return replace(settings, background_threshold=dataset.background_threshold)
    if not dataset.has_background:
        raise UserError(
            f"background_threshold {settings.background_threshold} has no use: {dataset.kind} at {dataset.root} has no "
            f"class 'background' (its first is '{dataset.classes[0]}')"
        )
    return settings


def evaluate(
    model: Any,
    tokenizer: Any,
    dataset: SegmentationDataset,
    settings: Settings | None = None,
    limit: int | None = None,
    progress: bool = True,
    predictions: str | Path | None = None,
    keep: str | Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Score `model` zero-shot on `dataset`.

    Under a process group every rank scores its share of the photos, each photo once, and all return the sum.

    Args:
        limit: score only so many photos, evenly spread over the split.
        progress: show a bar (on rank 0).
        predictions: folder that gets the labels of each photo as a palette PNG of its name.
        keep: file (one per rank, its number appended) that holds the counts while this runs; removed at the end.
        resume: go on from the counts in `keep`, if they are of this model, data set and settings.
    Returns:
        ``mIoU`` in percent; ``per_class`` IoU in percent by name (None: in neither truth nor prediction, not counted);
        ``per_class_images``, how many photos show each; ``frequent_mIoU`` over the classes that
        at least 30 photos show, where fewer than 10 show another;
        ``all_background_mIoU`` where there is a background; ``oracle_mIoU`` if each segment took its commonest true
        class; ``groups_used``: distinct final segments per photo (where windows slide, per window) on average;
        ``images``; ``settings``.
    Raises:
        UserError: as the data set, and as :class:`Segmenter`.
    """
    settings = settings_for(settings or Settings(), dataset)
    described = {"dataset": dataset.kind, "root": str(dataset.root), "split": dataset.split, **asdict(settings)}
    rank, world = metrics.rank_and_world()
    tally = metrics.Tally(len(dataset.classes))
    kept = None if keep is None else Path(f"{keep}.{rank}")
    about = {**described, "limit": limit, "world": world}
    if kept is not None:
        about["model"] = sum(parameter.double().sum().item() for parameter in model.parameters())
        if resume:
            tally.restore(kept, about)
    was_training = model.training
    model.eval()
    try:
        texts = text_classifier(model, tokenizer, dataset.prompts, settings.templates)
        segmenter = Segmenter(model, texts, settings)
        indices = chosen(len(dataset), limit)
        left = [index for index in indices[rank::world] if index not in tally.done]
        started = time.monotonic()
        with tqdm(total=len(indices), desc="evaluate", unit="photo", disable=not progress or rank > 0) as bar:
            bar.update(len(indices) - len(left) * world if tally.done else 0)
            for numbered, inputs in _batches(segmenter, dataset, left):
                sizes = [sample.mask.shape for _, sample in numbered]
                for (index, sample), decoded in zip(numbered, segmenter(inputs, sizes), strict=True):
                    truth = torch.from_numpy(sample.mask).to(segmenter.device)
                    tally.add(index, truth, decoded.labels, decoded.segments, decoded.count, decoded.windows)
                    if predictions is not None:
                        save_labels(Path(predictions) / f"{sample.name}.png", decoded.labels, dataset.has_background)
                bar.update(min(len(numbered) * world, bar.total - bar.n))
                if kept is not None and time.monotonic() - started > SAVE_EVERY:
                    with saving(kept):
                        tally.keep(kept, about)
                    started = time.monotonic()
    except UserError as error:
        raise RankError(str(error)) from None  # a photo or file of this rank's share: the others know nothing of it
    finally:
        model.train(was_training)
    total = tally.over_ranks(segmenter.device)
    if kept is not None:
        kept.unlink(missing_ok=True)
    iou = [None if math.isnan(value) else value for value in metrics.per_class_iou(total.matrix).tolist()]
    result: dict[str, Any] = {
        "mIoU": metrics.mean_iou(total.matrix),
        "per_class": dict(zip(dataset.classes, iou, strict=True)),
        "per_class_images": dict(zip(dataset.classes, total.photos.tolist(), strict=True)),
    }
    if (frequent := metrics.frequent_mean_iou(total.matrix, total.photos)) is not None:
        result["frequent_mIoU"] = frequent
    if dataset.has_background:
        result["all_background_mIoU"] = metrics.mean_iou(metrics.all_background_matrix(total.matrix))
    return result | {
        "oracle_mIoU": metrics.mean_iou(total.oracle),
        "groups_used": total.groups_used,
        "images": total.images,
        "settings": described,
    }


def chosen(total: int, limit: int | None) -> list[int]:
    """Indices of `limit` items evenly spread over `total` (all, without a limit)."""
    count = total if limit is None else min(limit, total)
    return [i * total // count for i in range(count)]


def _batches(
    segmenter: Segmenter, dataset: SegmentationDataset, indices: Sequence[int]
) -> Iterator[tuple[list[tuple[int, Sample]], Tensor]]:
    """Photos of equal network size together, with their indices, read ahead by threads."""
    batch = segmenter.settings.batch
    waiting: dict[tuple[int, int], list[tuple[tuple[int, Sample], Tensor]]] = {}

    def read(index: int) -> tuple[tuple[int, Sample], Tensor]:
        sample = dataset[index]
        return (index, sample), segmenter.tensor(sample.image)

    def take(size: tuple[int, int]) -> tuple[list[tuple[int, Sample]], Tensor]:
        numbered, tensors = zip(*waiting.pop(size), strict=True)
        return list(numbered), torch.stack(tensors)

    with ThreadPoolExecutor(READERS) as pool:
        ahead = deque(pool.submit(read, index) for index in indices[:batch])
        following = iter(indices[batch:])
        while ahead:
            item = ahead.popleft().result()
            index = next(following, None)
            if index is not None:
                ahead.append(pool.submit(read, index))
            size = (item[1].shape[1], item[1].shape[2])
            waiting.setdefault(size, []).append(item)
            if len(waiting[size]) == batch:
                yield take(size)
            elif sum(map(len, waiting.values())) >= 4 * batch:  # many sizes: bound what is held
                yield take(max(waiting, key=lambda key: len(waiting[key])))
        for size in list(waiting):
            yield take(size)
