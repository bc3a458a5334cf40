"""From the segments of a photo's windows to the labels of its pixels, by either of two decodings.

- ``groupvit``, the published decoding: every pixel *at network size* takes a segment and its class scores (and 1 for
  the background if they are below the threshold). They are averaged over the windows and resized bilinearly to photo
  size; the best class wins.
- ``direct``: the segment maps are resized bilinearly to *photo size*, and each pixel takes the class of its best
  segment. Through windows, the classes' scores at each pixel are averaged.

Neither needs a volume of height x width x classes. Wherever a pixel lies, its scores are one row of a small table
(its segment's, or the mean of its segments' in the windows over it), so an image is a map of row numbers; scores are
interpolated only where the four neighbours differ, and only for the classes that score above 0 anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..models.groupvit import image_threshold

CHUNK = 1 << 20  # pixels decoded at once: bounds the memory of large photos
# Above this many pixels segments are found at a smaller size and enlarged: the maps hold one value per patch, so
# nothing is lost but the smoothness of outlines, and a photo of 100 megapixels fits in memory.
MAX_DECODED = 1 << 23


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor) -> Tensor:
        """The part of `image` ``[..., H, W]`` in this box."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


class Decoded(NamedTuple):
    """One photo, decoded."""

    labels: Tensor  # [H, W], uint8 or, past 256 values, int32; 0 is the background where there is one
    # [H, W] likewise: the final segment of each pixel, 0..G-1; where windows slide, window · G + segment, of the window
    # whose middle is nearest.
    segments: Tensor
    count: int  # of segments in all
    windows: int  # how many the photo was seen through
    scores: Tensor  # fp32 [count, T], every segment's class scores, the background apart
    stages: tuple[Tensor, ...] = ()  # fp32 [G, h, w] per grouping stage: its segments' maps, of a photo seen whole
    relabelled: Callable[[float], Tensor] | None = None  # labels at another background threshold, where there is one
    whole: int | None = None  # label of the class whose text is most similar to the photo (to its windows on average)


class Labelled(NamedTuple):
    """One photo, labelled without segments; fields as of :class:`Decoded`."""

    labels: Tensor
    relabelled: Callable[[float], Tensor] | None = None
    segments: None = None
    count: int = 0
    windows: int = 1
    whole: None = None


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
        threshold: of the background, or None. With one, label 0 is background and class t is label t + 1.
    """

    def __init__(self, size: tuple[int, int], scores: Tensor, threshold: float | None) -> None:
        scores = score_channels(scores, threshold)  # [W, G, C]
        # A class that scores 0 everywhere cannot win. Class 0 stays: it wins where all scores are 0.
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
        area = box.of(self.index)
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
            for y, x in (part.unbind(1) for part in where.split(max(1, 4 * CHUNK // len(self.classes)))):
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
    return torch.cat([is_background(scores, threshold)[:, :, None].to(scores.dtype), scores], dim=2)


def is_background(scores: Tensor, threshold: float) -> Tensor:
    """Which segments are background: bool ``[W, G]`` from scores ``[W, G, T]``."""
    return scores.amax(dim=2) < image_threshold(scores, threshold)[:, None]


def decode(
    maps: Tensor,
    scores: Tensor,
    boxes: Sequence[Box],
    network: tuple[int, int],
    size: tuple[int, int],
    threshold: float | None = None,
    decoding: str = "groupvit",
) -> Decoded:
    """Labels and segments of one photo from its windows.

    Args:
        maps: ``[W, G, h, w]`` soft segment maps of the windows.
        scores: ``[W, G, T]`` their segments' class scores.
        boxes: where each window lies in the network's input of (height, width) `network`.
        size: (H, W) of the photo. threshold: of the background.
    """
    canvas = network if decoding == "groupvit" else _bounded(size)
    groups = scores.shape[1]
    if decoding == "direct" and len(boxes) == 1:  # the whole photo: each pixel takes its segment's label
        final = segment_of_pixels(maps, canvas)[0]
        labels = score_channels(scores, threshold)[0].argmax(dim=1)[final]
    else:
        placed = [_scaled(box, network, canvas) for box in boxes]
        score_map = ScoreMap(canvas, scores, threshold)
        final = torch.zeros(canvas, dtype=torch.int64, device=scores.device)
        for number, box in enumerate(placed):
            segments = segment_of_pixels(maps[number : number + 1], (box.height, box.width))[0]
            score_map.add(number, box, segments)
            top, left = _first_own(box, placed[:number])
            area = final[top : box.top + box.height, left : box.left + box.width]
            area.copy_(segments[top - box.top :, left - box.left :] + number * groups)
        labels = score_map.labels(size if decoding == "groupvit" else canvas)
    count = groups * len(boxes)
    labels, final = compact(labels, scores.shape[2] + 1), compact(final, count)
    return Decoded(_nearest(labels, size), _nearest(final, size), count, len(boxes), scores.flatten(0, 1))


def segment_of_pixels(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The most probable segment of every pixel: int64 ``[B, H, W]`` from soft maps ``[B, G, h, w]``, upsampled
    bilinearly to `size` (align_corners=False)."""
    # Classes that are the segments themselves: the label of a pixel is then its segment.
    own = torch.eye(maps.shape[1], device=maps.device).expand(len(maps), -1, -1)
    return ops.decode_segments(maps, own, size)


def _first_own(box: Box, before: Sequence[Box]) -> tuple[int, int]:
    """Top and left of the part of `box` that is nearer to its middle than to the middle of an earlier window."""
    above = [b.top + b.height for b in before if b.top < box.top and b.left == box.left]
    beside = [b.left + b.width for b in before if b.left < box.left and b.top == box.top]
    top = (above[-1] + box.top + 1) // 2 if above else box.top
    left = (beside[-1] + box.left + 1) // 2 if beside else box.left
    return top, left


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


def compact(labels: Tensor, values: int) -> Tensor:
    """Integers 0..values-1 in uint8, or int32 where those are too many."""
    return labels.to(torch.uint8 if values <= 256 else torch.int32)


def _bounded(size: tuple[int, int]) -> tuple[int, int]:
    """`size`, shrunk to at most `MAX_DECODED` pixels."""
    scale = min(1.0, (MAX_DECODED / (size[0] * size[1])) ** 0.5)
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _scaled(box: Box, network: tuple[int, int], canvas: tuple[int, int]) -> Box:
    top, bottom = (round(y * canvas[0] / network[0]) for y in (box.top, box.top + box.height))
    left, right = (round(x * canvas[1] / network[1]) for x in (box.left, box.left + box.width))
    return Box(top, left, max(1, bottom - top), max(1, right - left))
