"""What ``mixreorg_fast.load`` returns: the network with its tokenizer and its settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import InferenceConfig, ModelConfig
from ..data.text.tokenizer import Tokenizer
from ..errors import UserError
from ..files import atomic_path
from ..images import IMAGENET_MEAN, IMAGENET_STD
from ..models import weights
from ..models.groupvit import GroupViT
from ..names import parse_classes
from ..ranks import rank
from . import hub
from .formats import read
from .segmenter import Segmentation, Segmenter

Photo = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
Names = str | Sequence[str]  # of classes: "cat, dog" or ["cat", "dog"]


class Model(GroupViT):
    """GroupViT with a tokenizer and settings, so that it takes photos and class names.

    Args:
        config, mean, std: as of :class:`~mixreorg_fast.models.GroupViT`.
        tokenizer: None: only the tensor methods work.
        inference: settings of these weights; None: GroupViT's, at twice the training size (448 px).
    """

    def __init__(
        self,
        config: ModelConfig,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        tokenizer: Tokenizer | None = None,
        inference: InferenceConfig | None = None,
    ):
        super().__init__(config, mean, std)
        self.tokenizer = tokenizer
        self.inference = inference or InferenceConfig(short_side=2 * config.image_size)
        self.source: Path | None = None  # the file or folder that :func:`load` read

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder of weights, atomically; `state`: the tensors, where the parameters live elsewhere."""
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            state = self.state_dict() if state is None else state
            weights.write_files(self, temporary, state, self.inference)
            if self.tokenizer is not None:
                self.tokenizer.save(temporary)

    def push_to_hub(
        self, name: str, format: hub.Format = "ours", *, private: bool = False, license: str | None = None
    ) -> str:
        """Publish as ``owner/name`` on the Hugging Face hub: see :func:`mixreorg_fast.inference.hub.push`."""
        return hub.push(self, name, format, private=private, license=license)

    @overload
    def segment(self, image: list[Any] | tuple[Any, ...], classes: Names, **options: Any) -> list[Segmentation]: ...

    @overload
    def segment(self, image: Photo, classes: Names, **options: Any) -> Segmentation: ...

    def segment(self, image: Any, classes: Names, **options: Any) -> Segmentation | list[Segmentation]:
        """Segment a photo, or a list of photos, by class names.

        Args:
            image: a path, bytes, a binary file, a Pillow image or an array (see
                :func:`~mixreorg_fast.images.load_image`); or a list or tuple of them, which gives a list.
            classes, options: as of :meth:`segmenter`; so are the errors, beside those of `load_image`.
        """
        segmenter = self.segmenter(classes, **options)
        if isinstance(image, list | tuple):
            return [segmenter.photo(each).long() for each in image]
        return segmenter.photo(image).long()

    def segmenter(
        self, classes: Names, *, batch: int = 8, decoding: str | None = "direct", **options: Any
    ) -> Segmenter:
        """A segmenter of photos by class names.

        Args:
            classes: names (see :func:`~mixreorg_fast.names.parse_classes`).
            batch: windows per forward pass.
            decoding, options: settings (see :class:`~mixreorg_fast.config.InferenceConfig`) that overrule
                :attr:`inference`, such as `short_side` in pixels; `templates`, one prompt template, several, or the
                name of a set; `background_threshold`, 0..1: segments whose best score is below min(this, the image's
                best score) are background, and "background" becomes the first class; 0: no background.
        Raises:
            UserError: no classes, an option that does not fit, "background" named beside a background threshold, or
                weights without a tokenizer.
        """
        settings = self.inference.with_options(decoding=decoding, **options)
        settings = settings.model_copy(update={"background_threshold": settings.background_threshold or None})
        names = parse_classes(classes)
        if settings.background_threshold is not None and "background" in map(str.casefold, names):
            raise UserError(
                "classes: 'background' is what scores below the background threshold "
                f"({settings.background_threshold:g}); leave it out of the names, or set the threshold to 0"
            )
        return Segmenter(self, names, settings, batch)


def load(source: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model of weights in any format, in evaluation mode on `device`, with its tokenizer where it has one.

    Args:
        source: a folder of weights, ours or of Hugging Face's GroupViT; a run's folder, of which the newest weights are
            taken; an NVlabs .pth file; or ``owner/name[@revision]`` on the Hugging Face hub, which is fetched once.
    Raises:
        UserError: a file is missing, damaged, or does not fit the others; the hub's reasons.
    """
    found = read(source)
    for note in found.notes if rank() == 0 else ():
        print(note, file=sys.stderr, flush=True)
    with weights.sizes_only():  # initial values would take longer than those of the file
        model = Model(found.config, found.mean, found.std, found.tokenizer, found.inference)
    model.to_empty(device="cpu")
    weights.fill(model, found.state, source)
    model.source = found.source
    return model.to(device).eval()
