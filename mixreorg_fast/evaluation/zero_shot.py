"""Zero-shot segmentation of photos by class names, and its score on a data set (GroupViT's protocol).

A photo is resized to a short side of 448, seen whole or through sliding windows, and cut into the network's final
segments; each segment carries the scores of every class. Two decodings lead from there to labels:

- ``groupvit``, the published one: the segment of every pixel *at network size*, its class scores (and 1 for the
  background where they stay under the threshold) averaged over the windows, then bilinearly to photo size, arg-max.
- ``direct``: the segment maps bilinearly to *photo size*, arg-max over the segments there, look-up of the class.

Neither needs a volume of height x width x classes. Wherever a pixel lies, its scores are one row of a small table
(its segment's, or the mean of its segments' in the windows over it), so an image is a map of row numbers; scores are
interpolated only where the four neighbours differ, and only for the classes that score above 0 anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import ops
from ..errors import UserError
from ..models.decoding import class_scores, image_threshold
from ..models.images import network_size, to_tensor
from . import metrics
from .datasets import Sample, SegmentationDataset
from .prompts import TEMPLATES, text_classifier

CHUNK = 1 << 20  # pixels decoded at once: bounds the memory of large photos
# Above this many pixels segments are found at a smaller size and enlarged: the maps hold one value per patch, so
# nothing is lost but the smoothness of outlines, and a photo of 100 megapixels fits in memory.
MAX_DECODED = 1 << 23


@dataclass(frozen=True)
class Settings:
    """How photos are seen and decoded.

    Attributes:
        short_side: pixels; the network's input is rounded to the nearest multiple of the patch in both directions.
        mode: the photo "whole", or through windows of `window` px every `stride` px ("sliding").
        decoding: see the module's text.
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


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int


class Decoded(NamedTuple):
    """One photo, decoded.

    Attributes:
        labels: ``[H, W]``, uint8 or, past 256 values, int32; 0 is the background where there is one.
        segments: ``[H, W]`` likewise, the final segment of each pixel: 0..G-1, or window · G + segment where windows
            slide (of the windows over a pixel, the one whose middle is nearest).
        count: how many segments there are in all.
        windows: how many windows the photo was seen through.
    """

    labels: Tensor
    segments: Tensor
    count: int
    windows: int


def window_boxes(height: int, width: int, window: int, stride: int) -> list[Box]:
    """Windows that cover ``height x width``, row by row; the last of a row or column is moved back to the edge."""

    def starts(length: int) -> list[int]:
        steps = max(0, -(-(length - window) // stride))
        return [max(0, min(i * stride, length - window)) for i in range(steps + 1)]

    return [Box(top, left, min(window, height), min(window, width)) for top in starts(height) for left in starts(width)]


class ScoreMap:
    """Class scores of every pixel of a canvas as row numbers into a table; windows are averaged as they are added.

    Args:
        size: (height, width) of the canvas.
        scores: ``[W, G, T]`` class scores of each window's segments.
        threshold: float or None; with it class 0 of the labels is background and class t is t + 1.
    """

    def __init__(self, size: tuple[int, int], scores: Tensor, threshold: float | None) -> None:
        scores = score_channels(scores, threshold)  # [W, G, C]
        # A class that scores 0 everywhere cannot win (but for class 0, should all be 0).
        used = (scores > 0).flatten(0, 1).any(dim=0)
        used[0] = True
        self.classes = used.nonzero().flatten()  # [U]
        self.scores = scores[:, :, self.classes]
        self.index = torch.zeros(size, dtype=torch.int64, device=scores.device)
        self.table = self.scores.new_zeros(1, len(self.classes))  # row 0: under no window yet
        self.windows = self.scores.new_zeros(1)  # windows averaged in each row

    def add(self, window: int, box: Box, segments: Tensor) -> None:
        """Lay window number `window` over `box`; `segments`: int64 ``[box.height, box.width]``."""
        if segments.shape == self.index.shape and len(self.table) == 1:  # the whole photo: nothing to average with
            self.index = segments + 1
            self.table = torch.cat([self.table, self.scores[window]])
            self.windows = torch.ones(len(self.table), device=self.table.device)
            return
        groups = self.scores.shape[1]
        area = self.index[box.top : box.top + box.height, box.left : box.left + box.width]
        pair = area * groups + segments  # the row so far, and this window's segment
        present = torch.zeros(len(self.table) * groups, dtype=torch.bool, device=pair.device)
        present[pair.flatten()] = True
        pairs = present.nonzero().flatten()
        renumbered = torch.zeros_like(present, dtype=torch.int64)
        renumbered[pairs] = torch.arange(len(pairs), device=pair.device) + len(self.table)
        area.copy_(renumbered[pair])
        rows, segment = pairs // groups, pairs % groups
        self.table = torch.cat([self.table, self.table[rows] + self.scores[window][segment]])
        self.windows = torch.cat([self.windows, self.windows[rows] + 1])

    def labels(self, size: tuple[int, int]) -> Tensor:
        """Arg-max of the scores bilinearly resized (align_corners=False) to `size`: int64 ``[H, W]``."""
        table = self.table / self.windows.clamp(min=1)[:, None]
        best = self.classes[table.argmax(dim=1)]  # the label where all neighbours share a row
        if size == tuple(self.index.shape):
            return best[self.index]
        y0, y1, down = _bilinear(self.index.shape[0], size[0], self.index.device)
        x0, x1, right = _bilinear(self.index.shape[1], size[1], self.index.device)
        at_left, at_right = self.index[:, x0], self.index[:, x1]  # [h, W]
        labels = torch.empty(size, dtype=torch.int64, device=self.index.device)
        for rows in torch.arange(size[0], device=self.index.device).split(max(1, CHUNK // size[1])):
            corners = [side[y[rows]] for y in (y0, y1) for side in (at_left, at_right)]
            strip = best[corners[0]]
            differ = (corners[0] != corners[1]) | (corners[0] != corners[2]) | (corners[0] != corners[3])
            where = differ.nonzero()
            for y, x in (part.unbind(1) for part in where.split(max(1, CHUNK // (4 * len(self.classes))))):
                v, u = down[rows[y], None], right[x, None]
                a, b, c, d = (table[corner[y, x]] for corner in corners)  # [P, U]
                mixed = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)
                strip[y, x] = self.classes[mixed.argmax(dim=1)]
            labels[rows[0] : rows[-1] + 1] = strip
        return labels


def score_channels(scores: Tensor, threshold: float | None) -> Tensor:
    """Scores of classes → of labels: with a threshold, a background channel comes first.

    It is 1 for segments whose best score is under ``min(threshold, the window's best score)``, else 0; the classes
    keep their scores either way. ``[W, G, T]`` → ``[W, G, T or T + 1]``.
    """
    if threshold is None:
        return scores
    background = scores.amax(dim=2) < image_threshold(scores, threshold)[:, None]
    return torch.cat([background[:, :, None].to(scores.dtype), scores], dim=2)


def decode_groupvit_reference(
    maps: Tensor,
    scores: Tensor,
    boxes: Sequence[Box],
    network: tuple[int, int],
    size: tuple[int, int],
    threshold: float | None = None,
) -> Tensor:
    """The ``groupvit`` decoding to the letter, with the dense volume of classes: the oracle of tests and benchmarks.

    Args:
        maps: ``[W, G, h, w]`` soft segment maps of the windows.
        scores: ``[W, G, T]`` their segments' class scores.
        boxes: where each window lies in the network's input of (height, width) `network`.
        size: (H, W) of the photo.
        threshold: background threshold.
    Returns:
        int64 ``[H, W]``.
    """
    channels = score_channels(scores, threshold)
    total = channels.new_zeros(1, channels.shape[2], *network)
    windows = channels.new_zeros(1, 1, *network)
    for map_, channel, (top, left, height, width) in zip(maps, channels, boxes, strict=True):
        fine = F.interpolate(map_[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        one_hot = F.one_hot(fine.argmax(dim=0), fine.shape[0]).to(channel.dtype)  # [height, width, G]
        total[0, :, top : top + height, left : left + width] += (one_hot @ channel).permute(2, 0, 1)
        windows[:, :, top : top + height, left : left + width] += 1
    return F.interpolate(total / windows, size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)


def decode(
    maps: Tensor,
    scores: Tensor,
    boxes: Sequence[Box],
    network: tuple[int, int],
    size: tuple[int, int],
    threshold: float | None = None,
    decoding: str = "groupvit",
) -> Decoded:
    """Labels and segments of one photo from its windows; arguments as of :func:`decode_groupvit_reference`."""
    canvas = network if decoding == "groupvit" else _bounded(size)
    placed = [_scaled(box, network, canvas) for box in boxes]
    score_map = ScoreMap(canvas, scores, threshold)
    groups = scores.shape[1]
    each = torch.eye(groups, device=scores.device)[None]
    final = torch.zeros(canvas, dtype=torch.int64, device=scores.device)
    for number, box in enumerate(placed):
        # Classes = segments: the label of a pixel is then its segment.
        segments = ops.decode_segments(maps[number : number + 1], each, (box.height, box.width))[0]
        score_map.add(number, box, segments)
        top, left = _first_own(box, placed[:number])
        area = final[top : box.top + box.height, left : box.left + box.width]
        area.copy_(segments[top - box.top :, left - box.left :] + number * groups)
    labels = score_map.labels(size if decoding == "groupvit" else canvas)
    count = groups * len(boxes)
    labels, final = _compact(labels, scores.shape[2] + 1), _compact(final, count)
    return Decoded(_nearest(labels, size), _nearest(final, size), count, len(boxes))


def _first_own(box: Box, before: Sequence[Box]) -> tuple[int, int]:
    """Top and left of the part of `box` that is nearer to its middle than to the middle of an earlier window."""
    above = [b.top + b.height for b in before if b.top < box.top and b.left == box.left]
    beside = [b.left + b.width for b in before if b.left < box.left and b.top == box.top]
    top = (above[-1] + box.top + 1) // 2 if above else box.top
    left = (beside[-1] + box.left + 1) // 2 if beside else box.left
    return top, left


class Segmenter:
    """A model, its class embeddings and the settings: photos in, labels out.

    Args:
        model: a :class:`~mixreorg_fast.models.GroupViT` in evaluation mode.
        texts: ``[T, D]`` from :func:`~mixreorg_fast.evaluation.prompts.text_classifier`.
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
) -> dict[str, Any]:
    """Score `model` zero-shot on `dataset`.

    Under a process group every rank scores its share of the photos, each photo once, and all return the sum.

    Args:
        limit: score only so many photos, evenly spread over the split.
        progress: show a bar (on rank 0).
    Returns:
        ``mIoU`` in percent; ``per_class`` IoU in percent by name (None: in neither truth nor prediction, not counted);
        ``all_background_mIoU`` where there is a background; ``oracle_mIoU`` if each segment took its commonest true
        class; ``groups_used``: distinct final segments per photo (where windows slide, per window) on average;
        ``images``; ``settings``.
    Raises:
        UserError: as the data set, and as :class:`Segmenter`.
    """
    settings = settings_for(settings or Settings(), dataset)
    was_training = model.training
    model.eval()
    try:
        segmenter = Segmenter(model, text_classifier(model, tokenizer, dataset.prompts, settings.templates), settings)
        matrix, oracle, groups, images = _count(segmenter, dataset, limit, progress)
    finally:
        model.train(was_training)
    iou = [None if math.isnan(value) else value for value in metrics.per_class_iou(matrix).tolist()]
    result: dict[str, Any] = {
        "mIoU": metrics.mean_iou(matrix),
        "per_class": dict(zip(dataset.classes, iou, strict=True)),
    }
    if dataset.has_background:
        result["all_background_mIoU"] = metrics.mean_iou(metrics.all_background_matrix(matrix))
    return result | {
        "oracle_mIoU": metrics.mean_iou(oracle),
        "groups_used": groups,
        "images": images,
        "settings": {"dataset": dataset.kind, "root": str(dataset.root), "split": dataset.split, **asdict(settings)},
    }


def chosen(total: int, limit: int | None) -> list[int]:
    """Indices of `limit` items evenly spread over `total` (all, without a limit)."""
    count = total if limit is None else min(limit, total)
    return [i * total // count for i in range(count)]


def _count(
    segmenter: Segmenter, dataset: SegmentationDataset, limit: int | None, progress: bool
) -> tuple[Tensor, Tensor, float, int]:
    """Confusion matrix, oracle's confusion matrix, mean groups in use, photos; over all ranks."""
    rank, world = metrics.rank_and_world()
    indices = chosen(len(dataset), limit)
    classes = len(dataset.classes)
    matrix, oracle = torch.zeros(2, classes, classes, dtype=torch.int64)
    used = torch.zeros(3, dtype=torch.int64)  # distinct segments, windows, photos
    bar = tqdm(total=len(indices), desc="evaluate", unit="photo", disable=not progress or rank > 0)
    with bar:
        for samples, inputs in _batches(segmenter, dataset, indices[rank::world]):
            sizes = [sample.mask.shape for sample in samples]
            for sample, decoded in zip(samples, segmenter(inputs, sizes), strict=True):
                truth = torch.from_numpy(sample.mask).to(segmenter.device)
                matrix += metrics.confusion_matrix(truth, decoded.labels, classes)
                oracle += metrics.oracle_matrix(metrics.overlaps(truth, decoded.segments, classes, decoded.count))
                used += torch.tensor([len(decoded.segments.unique()), decoded.windows, 1])
            bar.update(min(len(samples) * world, bar.total - bar.n))
    sums = metrics.sum_over_ranks(torch.cat([matrix.flatten(), oracle.flatten(), used]), segmenter.device)
    matrix, oracle = sums[:-3].view(2, classes, classes)
    distinct, windows, photos = sums[-3:].tolist()
    return matrix, oracle, distinct / windows, photos


def _batches(
    segmenter: Segmenter, dataset: SegmentationDataset, indices: Sequence[int]
) -> Iterator[tuple[list[Sample], Tensor]]:
    """Photos of equal network size together, read ahead by threads."""
    batch = segmenter.settings.batch
    waiting: dict[tuple[int, int], list[tuple[Sample, Tensor]]] = {}

    def read(index: int) -> tuple[Sample, Tensor]:
        sample = dataset[index]
        return sample, segmenter.tensor(sample.image)

    def take(size: tuple[int, int]) -> tuple[list[Sample], Tensor]:
        samples, tensors = zip(*waiting.pop(size), strict=True)
        return list(samples), torch.stack(tensors)

    with ThreadPoolExecutor(4) as pool:
        ahead = [pool.submit(read, index) for index in indices[:batch]]
        following = iter(indices[batch:])
        while ahead:
            item = ahead.pop(0).result()
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


def _bilinear(length: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Both neighbours' indices and the second one's weight, per target position (align_corners=False)."""
    position = ((torch.arange(target, device=device) + 0.5) * (length / target) - 0.5).clamp(min=0)
    first = position.floor().long().clamp(max=length - 1)
    return first, (first + 1).clamp(max=length - 1), position - first


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(labels.shape) == tuple(size):
        return labels
    y, x = (
        ((torch.arange(target, device=labels.device) + 0.5) * (length / target)).long().clamp(max=length - 1)
        for length, target in zip(labels.shape, size, strict=True)
    )
    return labels[y][:, x]


def _compact(labels: Tensor, values: int) -> Tensor:
    return labels.to(torch.uint8 if values <= 256 else torch.int32)


def _bounded(size: tuple[int, int]) -> tuple[int, int]:
    """`size`, shrunk to at most `MAX_DECODED` pixels."""
    scale = min(1.0, (MAX_DECODED / (size[0] * size[1])) ** 0.5)
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _scaled(box: Box, network: tuple[int, int], canvas: tuple[int, int]) -> Box:
    top, bottom = (round(y * canvas[0] / network[0]) for y in (box.top, box.top + box.height))
    left, right = (round(x * canvas[1] / network[1]) for x in (box.left, box.left + box.width))
    return Box(top, left, max(1, bottom - top), max(1, right - left))
