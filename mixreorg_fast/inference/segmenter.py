"""From a photo to its labels: the network sees it whole or through windows, and each segment takes a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config import InferenceConfig
from ..errors import UserError
from ..images import load_image, to_tensor
from ..models.groupvit import class_scores
from ..names import parse_templates
from .overlay import class_palette, kind_of, label_counts, overlay, save_labels, save_picture
from .windows import Box, Decoded, decode, is_background, window_boxes

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A photo, segmented.

    Attributes:
        labels: integers ``[H, W]``: label t is ``classes[t]``. int64 from ``model.segment``, else uint8 or int32.
        classes: names of the labels; with a background it is the first.
        segments: integers ``[H, W]`` in the same dtype: the final segment of each pixel.
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


@torch.no_grad()
def text_classifier(model: Model, classes: Sequence[str], templates: str | Sequence[str] = "default") -> Tensor:
    """One L2-normalised embedding per class: fp32 ``[T, D]`` on the model's device.

    The prompts' embeddings are averaged over the templates before they are normalised, as GroupViT does.

    Args:
        classes: one name each; `templates` as of :func:`~mixreorg_fast.names.parse_templates`.
    Raises:
        UserError: no classes, an empty name, no templates, one without ``{}``, or weights without a tokenizer.
    """
    if model.tokenizer is None:
        raise UserError("these weights have no tokenizer; segment_labels takes text embeddings instead")
    if not classes or not all(name.strip() for name in classes):
        raise UserError(f"class names must not be empty, got {list(classes)}")
    prompts = [template.replace("{}", name.strip()) for name in classes for template in parse_templates(templates)]
    ids, _ = model.tokenizer.encode(prompts, model.config.text.context)
    embeddings = [model.text_embeddings(chunk.to(model.device), normalise=False).float() for chunk in ids.split(256)]
    return F.normalize(torch.cat(embeddings).unflatten(0, (len(classes), -1)).mean(dim=1), dim=-1)


class Segmenter:
    """A model with class names and settings: photos in, labels out.

    Args:
        model: in evaluation mode.
        prompts: class names, as the text encoder reads them.
        settings: with a `background_threshold`, label 0 is the background and label t + 1 is class t; with None,
            label t is class t.
        batch: photos of one network size, or windows, per forward pass.
    Raises:
        UserError: a batch below 1; a window that is not a multiple of the patch; as :func:`text_classifier`.
    """

    def __init__(self, model: Model, prompts: Sequence[str], settings: InferenceConfig, batch: int = 8) -> None:
        if batch < 1:
            raise UserError(f"batch must be at least 1, got {batch}")
        patch = model.config.patch_size
        if settings.mode == "sliding" and settings.window % patch:
            low = settings.window // patch * patch
            raise UserError(
                f"window {settings.window} is not a multiple of the patch {patch} "
                f"(nearest: {max(low, patch)} or {low + patch})"
            )
        self.model, self.prompts, self.settings, self.batch = model, list(prompts), settings, batch
        self.texts = text_classifier(model, prompts, settings.templates)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def about(self) -> dict[str, Any]:
        """Settings for a results file."""
        return {**self.settings.model_dump(mode="json"), "batch": self.batch}

    def tensor(self, image: Image.Image) -> Tensor:
        """The network's input ``[3, height, width]`` for `image`, on the CPU."""
        model = self.model
        return to_tensor(image, self.settings.short_side, model.config.patch_size, model.mean, model.std)

    @torch.no_grad()
    def __call__(self, inputs: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Decoded]:
        """Decode photos of one network size: normalised `inputs` ``[B, 3, h, w]``; `sizes`: (H, W) of each photo."""
        settings, network = self.settings, (inputs.shape[2], inputs.shape[3])
        boxes = [Box(0, 0, *network)]
        if settings.mode == "sliding":
            boxes = window_boxes(*network, settings.window, settings.stride)
        crops = [box.of(image) for image in inputs for box in boxes]
        maps, scores, stages, cosines = [], [], [], []
        for start in range(0, len(crops), self.batch):
            seen = self.model.segments(torch.stack(crops[start : start + self.batch]).to(self.model.device))
            maps.append(seen.maps.float())
            scores.append(class_scores(seen.embeddings, seen.image, self.texts, self.model.logit_multiplier()))
            stages += zip(*seen.stages, strict=True)  # of every crop
            cosines.append(seen.image @ self.texts.T)
        maps, scores, cosines = torch.cat(maps), torch.cat(scores), torch.cat(cosines)
        whole = cosines.unflatten(0, (len(sizes), -1)).mean(dim=1).argmax(dim=1)
        whole = (whole + (settings.background_threshold is not None)).tolist()
        for number, size in enumerate(sizes):
            own = slice(number * len(boxes), (number + 1) * len(boxes))
            decoded = self._decoded(maps[own], scores[own], boxes, network, size)._replace(whole=whole[number])
            yield decoded._replace(stages=stages[number]) if stages and len(boxes) == 1 else decoded

    def _decoded(
        self, maps: Tensor, scores: Tensor, boxes: Sequence[Box], network: tuple[int, int], size: tuple[int, int]
    ) -> Decoded:
        settings = self.settings
        decoded = decode(maps, scores, boxes, network, size, settings.background_threshold, settings.decoding)
        if settings.background_threshold is None:
            return decoded
        known: dict[int, Tensor] = {}

        def relabelled(threshold: float) -> Tensor:
            # A higher threshold only adds segments to the background, so their number identifies the set.
            count = int(is_background(scores, threshold).sum())
            if count not in known:
                known[count] = decode(maps, scores, boxes, network, size, threshold, settings.decoding).labels
            return known[count]

        return decoded._replace(relabelled=relabelled)

    def segment(self, image: Image.Image) -> Decoded:
        """Decode one RGB photo at its own size."""
        return next(iter(self(self.tensor(image)[None], [(image.height, image.width)])))

    def photo(self, source: Any) -> Segmentation:
        """Segment one photo; `source` and errors are those of :func:`~mixreorg_fast.images.load_image`."""
        image = load_image(source)
        decoded = self.segment(image)
        stages = decoded.stages
        if not stages:  # windows have no map of the whole photo, so the network sees the whole photo once more
            whole = self.model.segments(self.tensor(image)[None].to(self.model.device))
            stages = tuple(maps[0] for maps in whole.stages)
        present = label_counts(decoded.segments.cpu(), decoded.count) > 0
        best = decoded.scores.cpu()[torch.from_numpy(present)].amax(dim=0).tolist()
        labels = self.prompts if self.settings.background_threshold is None else ["background", *self.prompts]
        scores = dict(zip(self.prompts, best, strict=True))
        return Segmentation(decoded.labels, labels, decoded.segments, stages, scores, image)
