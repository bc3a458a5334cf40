"""From a photo to its labels: the network sees it whole or through windows, and each segment takes a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..config import InferenceConfig
from ..errors import UserError
from ..images import load_image, to_tensor
from ..models.class_scores import class_scores
from .overlay import label_counts
from .prompts import text_classifier
from .segmentation import Segmentation
from .windows import Box, Decoded, decode, window_boxes

if TYPE_CHECKING:
    from .model import Model


class Segmenter:
    """A model with class names and settings: photos in, labels out.

    Args:
        model: in evaluation mode.
        prompts: class names, as the text encoder reads them.
        settings: `background_threshold` None: no background.
        labels: names of the labels; with a background it is the first.
        batch: photos of one network size, or windows, per forward pass.
    Raises:
        UserError: a window that is no multiple of the patch; as :func:`.prompts.text_classifier`.
    """

    def __init__(
        self, model: Model, prompts: Sequence[str], settings: InferenceConfig, labels: Sequence[str], batch: int = 8
    ) -> None:
        patch = model.config.patch_size
        if settings.mode == "sliding" and settings.window % patch:
            low = settings.window // patch * patch
            raise UserError(
                f"window {settings.window} is no multiple of the patch {patch} "
                f"(nearest: {max(low, patch)} or {low + patch})"
            )
        self.model, self.settings, self.labels, self.batch = model, settings, list(labels), batch
        self.texts = text_classifier(model, prompts, settings.templates)

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
            seen = self.model.segments(torch.stack(crops[start : start + self.batch]).to(self.model.device))
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
        names = self.labels[len(self.labels) - len(best) :]
        # Windows have no map of the whole photo, so the network sees the whole photo once more.
        stages = decoded.stages or self._stages(image)
        scores = dict(zip(names, best, strict=True))
        return Segmentation(decoded.labels, self.labels, decoded.segments, stages, scores, image)

    def _stages(self, image: Image.Image) -> tuple[Tensor, ...]:
        seen = self.model.segments(self.tensor(image)[None].to(self.model.device))
        return tuple(maps[0] for maps in seen.stages)
