"""From a photo to its labels: the network sees it whole or through windows, and each segment takes a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import InferenceConfig
from ..errors import UserError
from ..images import load_image, network_size, to_tensor
from ..names import parse_classes
from .class_scores import class_scores
from .overlay import class_palette, kind_of, label_counts, overlay, save_labels, save_picture
from .prompts import text_classifier
from .windows import Box, Decoded, decode, window_boxes


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A photo, segmented.

    Attributes:
        labels: integers ``[H, W]``: label t is ``classes[t]``. int64 from ``model.segment``, else as small as they fit.
        classes: names of the labels; with a background it is the first.
        segments: such integers: the final segment of each pixel.
        stages: fp32 ``[G, h, w]`` per grouping stage: probability of its segments per patch.
        scores: per class its best score (0..1) among the segments in the picture; the background has none.
        photo: RGB.
    """

    labels: Tensor
    classes: list[str]
    segments: Tensor
    stages: tuple[Tensor, ...]
    scores: dict[str, float]
    photo: Image.Image

    @property
    def has_background(self) -> bool:
        return len(self.scores) < len(self.classes)

    @property
    def areas(self) -> dict[str, float]:
        """Share of the photo that each class takes; they add up to 1."""
        shares = label_counts(self.labels.cpu(), len(self.classes)) / self.labels.numel()
        return dict(zip(self.classes, shares.tolist(), strict=True))

    def overlay(self) -> Image.Image:
        """The photo under its classes' colours, over a legend of the classes that occur."""
        return overlay(self.photo, self.labels.cpu(), self.classes, class_palette(self.has_background))

    def save(self, path: str | Path) -> None:
        """Write the overlay, in the format that the suffix names.

        Raises:
            UserError: an unknown suffix, or a place that cannot be written.
        """
        kind = kind_of(path)  # before the work
        save_picture(path, self.overlay(), kind)

    def save_mask(self, path: str | Path) -> None:
        """Write a palette PNG whose values are the labels, in Pascal VOC's colours.

        Raises:
            UserError: more than 255 labels, or a place that cannot be written.
        """
        if len(self.classes) > 255:
            raise UserError(f"{path}: a mask holds at most 255 labels, got {len(self.classes)}")
        save_labels(path, self.labels.to(torch.uint8), self.has_background)

    def long(self) -> Segmentation:
        """The same with labels and segments in int64, by which tensors can be indexed."""
        return replace(self, labels=self.labels.long(), segments=self.segments.long())


class Segmenter:
    """A model, its class embeddings and the settings: photos in, labels out.

    Args:
        model: a :class:`~mixreorg_fast.models.GroupViT` in evaluation mode.
        texts: ``[T, D]`` from :func:`~mixreorg_fast.inference.prompts.text_classifier`.
        settings: `background_threshold` None means that there is no background here.
        classes: names of the labels, for :meth:`photo`.
        batch: photos of one network size, or windows, per forward pass.
    Raises:
        UserError: a window that is no multiple of the patch.
    """

    def __init__(
        self, model: Any, texts: Tensor, settings: InferenceConfig, classes: Sequence[str] = (), batch: int = 8
    ) -> None:
        patch = model.config.patch_size
        if settings.mode == "sliding" and settings.window % patch:
            low = settings.window // patch * patch
            raise UserError(
                f"window {settings.window} is no multiple of the patch {patch} "
                f"(nearest: {max(low, patch)} or {low + patch})"
            )
        self.model, self.texts, self.settings, self.classes, self.batch = model, texts, settings, list(classes), batch
        self.device = next(model.parameters()).device

    @classmethod
    def of_classes(cls, model: Any, classes: Any, settings: InferenceConfig, batch: int = 8) -> Segmenter:
        """For photos of one's own; a threshold of 0 is none.

        Args:
            classes: as of :func:`~mixreorg_fast.names.parse_classes`.
        Raises:
            UserError: as there; "background" named beside a background threshold.
        """
        names = parse_classes(classes)
        settings = settings.model_copy(update={"background_threshold": settings.background_threshold or None})
        labels = names
        if settings.background_threshold is not None:
            if "background" in map(str.casefold, names):
                raise UserError(
                    "classes: 'background' is what scores below the background threshold "
                    f"({settings.background_threshold:g}); leave it out of the names, or set the threshold to 0"
                )
            labels = ["background", *names]
        texts = text_classifier(model, model.tokenizer, names, settings.templates)
        return cls(model, texts, settings, labels, batch)

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
        maps, scores, stages = [], [], []
        for start in range(0, len(crops), self.batch):
            seen = self.model.segments(torch.stack(crops[start : start + self.batch]).to(self.device))
            maps.append(seen.maps.float())
            scores.append(class_scores(seen.embeddings, seen.image, self.texts, self.model.logit_multiplier()))
            stages += zip(*seen.stages, strict=True)  # of every crop
        maps, scores = torch.cat(maps), torch.cat(scores)
        for number, size in enumerate(sizes):
            own = slice(number * len(boxes), (number + 1) * len(boxes))
            decoded = decode(
                maps[own], scores[own], boxes, network, size, settings.background_threshold, settings.decoding
            )
            yield decoded._replace(stages=stages[number]) if stages and len(boxes) == 1 else decoded

    def segment(self, image: Image.Image) -> Decoded:
        """Decode one RGB photo at its own size."""
        return next(iter(self(self.tensor(image)[None], [(image.height, image.width)])))

    def photo(self, source: Any) -> Segmentation:
        """Segment one photo.

        Args:
            source: as of :func:`~mixreorg_fast.images.load_image`.
        Raises:
            UserError: as there.
        """
        image = load_image(source)
        decoded = self.segment(image)
        present = label_counts(decoded.segments.cpu(), decoded.count) > 0
        best = decoded.scores.cpu()[torch.from_numpy(present)].amax(dim=0).tolist()
        names = self.classes[len(self.classes) - len(best) :]
        # Windows have no map of the whole photo, so it is seen once more.
        stages = decoded.stages or self._stages(image)
        scores = dict(zip(names, best, strict=True))
        return Segmentation(decoded.labels, self.classes, decoded.segments, stages, scores, image)

    @torch.no_grad()
    def _stages(self, image: Image.Image) -> tuple[Tensor, ...]:
        seen = self.model.segments(self.tensor(image)[None].to(self.device))
        return tuple(maps[0] for maps in seen.stages)
