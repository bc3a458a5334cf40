"""What `mixreorg evaluate --model` takes: our weights, Hugging Face's GroupViT and CLIPSeg, or a function."""

from __future__ import annotations

import importlib
import operator
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import devices
from ..errors import UserError, extra, nearest
from ..inference import hub
from ..inference.options import load_on_device
from ..inference.segmenter import Segmenter
from ..inference.windows import Labelled, compact
from ..names import parse_templates
from ..ranks import on_main
from .datasets import SegmentationDataset
from .zero_shot import segmenter_for, threshold_for

CLASSES_AT_ONCE = 32  # classes whose score maps are held at the photo's size
FUNCTION = re.compile(r"[^\W\d]\w*(\.\w+)*:[^\W\d]\w*(\.\w+)*")  # package.module:object.method
# Settings of windows and sizes, which a model with its own preprocessing does not have.
OWN_SIZES = ("short_side", "mode", "window", "stride")


def open_model(
    name: str, dataset: SegmentationDataset, options: Mapping[str, Any], device: str | None = None, batch: int = 8
) -> Segmenter | PixelScores:
    """The model called `name`, ready to segment the photos of `dataset`.

    Args:
        name: weights of ours, a folder or repository of Hugging Face's (GroupViT or CLIPSeg), or ``module:function``.
        options: settings by name (see :class:`~mixreorg_fast.config.InferenceConfig`); None: the model's.
        batch: photos, or windows, per forward pass.
    Raises:
        UserError: a model of another type, a function that is not there, an option that does not fit.
    """
    threshold = options.get("background_threshold")
    if FUNCTION.fullmatch(name) and not Path(name).exists():
        _refuse(options, *OWN_SIZES, "templates")
        return Function(name, dataset, threshold, devices.choose(device))
    kind = hub.model_type(name)
    if kind == "clipseg":
        _refuse(options, *OWN_SIZES)
        templates = options.get("templates") or "default"
        return CLIPSeg(name, dataset, threshold, devices.choose(device), batch, templates=templates)
    if kind not in (None, "groupvit"):
        raise UserError(
            f"{name}: a model of type '{kind}' is not supported (choose from: weights of ours, groupvit, clipseg; or "
            "give a function, module:function)"
        )
    model = load_on_device(on_main(lambda: hub.pinned(name)), device)  # one commit on all ranks
    return segmenter_for(model, dataset, model.inference.with_options(**options), threshold, batch)


def _refuse(options: Mapping[str, Any], *names: str) -> None:
    if given := [name.replace("_", "-") for name in names if options.get(name) is not None]:
        raise UserError(f"--{given[0]} does not apply: the model prepares its photos and texts itself")


@dataclass(eq=False)
class PixelScores(ABC):
    """A model that scores the classes of a dataset at every pixel, or labels them.

    Maps of scores are resized bilinearly to the photo (align_corners=False) and a pixel takes its best class. Where the
    background has no scores, a pixel is background if its best score is below min(threshold, the photo's best score).
    """

    name: str  # what results call the model
    dataset: SegmentationDataset
    threshold: float | None  # of the background
    device: torch.device
    batch: int = 1  # photos per call
    model: Any = None  # the network, if there is one: its weights tell evaluations apart

    @property
    def about(self) -> dict[str, Any]:
        """Settings for the results file."""
        return {"model": self.name, "background_threshold": self.threshold, "batch": self.batch}

    @abstractmethod
    def tensor(self, image: Image.Image) -> Tensor:
        """The model's input for an RGB photo, on the CPU."""

    @abstractmethod
    def outputs(self, inputs: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Per photo scores ``[T, h, w]``, with or without the background, or labels ``[H, W]`` at its size."""

    @torch.no_grad()
    def __call__(self, inputs: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Labelled]:
        """Decode photos whose inputs have one size; `sizes`: (H, W) of each photo."""
        for output, size in zip(self.outputs(inputs, sizes), sizes, strict=True):
            yield self._decoded(output, size)

    def segment(self, image: Image.Image) -> Labelled:
        """Decode one RGB photo at its own size."""
        return next(self(self.tensor(image)[None], [(image.height, image.width)]))

    def _decoded(self, output: Tensor, size: tuple[int, int]) -> Labelled:
        classes = len(self.dataset.classes)
        if output.ndim == 2:
            return Labelled(compact(output, classes))
        best = torch.full(size, -torch.inf, device=output.device)
        label = torch.zeros(size, dtype=torch.int64, device=output.device)
        for first in range(0, len(output), CLASSES_AT_ONCE):
            part = output[None, first : first + CLASSES_AT_ONCE].float()
            part, place = F.interpolate(part, size, mode="bilinear", align_corners=False)[0].max(dim=0)
            label = torch.where(part > best, place + first, label)
            best = torch.maximum(part, best)
        if len(output) == classes:
            return Labelled(compact(label, classes))
        assert self.threshold is not None, "the dataset has a background"

        def relabelled(threshold: float) -> Tensor:
            return compact(torch.where(best < best.max().clamp(max=threshold), 0, label + 1), classes)

        return Labelled(relabelled(self.threshold), relabelled)


@dataclass(eq=False)
class CLIPSeg(PixelScores):
    """Hugging Face's CLIPSeg (Lüddecke and Ecker, CVPR 2022): the sigmoid of each class's map is its score.

    The photo goes through the model's own preprocessor. A class is the mean of its prompts' embeddings. The photo is
    encoded once; the decoder runs per class. The usual threshold is 0.5, where a class's probability passes that of its
    absence. Errors: transformers is missing or cannot read the model; those of `hub.locate`.
    """

    templates: str | tuple[str, ...] = "default"  # as of `parse_templates`

    def __post_init__(self) -> None:
        self.threshold = threshold_for(self.dataset, self.threshold, 0.5)
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"{self.name}: CLIPSeg needs transformers ({error}): {extra('hf')}") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        folder = hub.locate(self.name, "clipseg")
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder)
            model: Any = transformers.CLIPSegForImageSegmentation.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name}: not readable as CLIPSeg: {str(error).splitlines()[0]}") from None
        self.model, self.templates = model.eval().to(self.device), parse_templates(self.templates)
        self._images = processor.image_processor
        self._texts = self._embedded(processor.tokenizer)

    @property
    def about(self) -> dict[str, Any]:
        return super().about | {"templates": list(self.templates)}

    @torch.no_grad()
    def _embedded(self, tokenizer: Any) -> Tensor:
        """One embedding per class: ``[T, D]``."""
        prompts = [template.replace("{}", name) for name in self.dataset.prompts for template in self.templates]
        length = self.model.config.text_config.max_position_embeddings
        embeddings = []
        for first in range(0, len(prompts), 256):
            some = prompts[first : first + 256]
            texts = tokenizer(some, padding=True, truncation=True, max_length=length, return_tensors="pt")
            ids, mask = (texts[key].to(self.device) for key in ("input_ids", "attention_mask"))
            embeddings.append(self.model.get_conditional_embeddings(len(some), ids, mask))
        return torch.cat(embeddings).unflatten(0, (-1, len(self.templates))).mean(dim=1)

    def tensor(self, image: Image.Image) -> Tensor:
        return self._images(images=image, return_tensors="pt").pixel_values[0]

    def outputs(self, inputs: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        model = self.model
        seen = model.clip.vision_model(
            pixel_values=inputs.to(self.device), output_hidden_states=True, interpolate_pos_encoding=True
        )
        layers = [seen.hidden_states[layer + 1] for layer in model.extract_layers]
        for number in range(len(inputs)):
            logits = [
                model.decoder([layer[number].expand(len(texts), -1, -1) for layer in layers], texts).logits
                for texts in self._texts.split(CLASSES_AT_ONCE)
            ]
            yield torch.cat(logits).sigmoid()


@dataclass(eq=False)
class Function(PixelScores):
    """A Python function: ``function(photo, classes)`` gives labels or scores.

    It takes a Pillow image (RGB) and the dataset's class names (a list, with "background" first where there is one).
    It gives integers ``[H, W]`` at the photo's size, label t for ``classes[t]``; or floats ``[T, h, w]`` of any size, a
    map per class, with or without one for the background. NumPy arrays and tensors are taken. The module of
    ``module:function`` is looked for in the working directory too; a UserError says which of the two is missing.
    """

    def __post_init__(self) -> None:
        self.threshold = threshold_for(self.dataset, self.threshold, self.dataset.background_threshold)
        name = self.name
        module_name, _, path = name.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever its lines raise
            raise UserError(f"{name}: module {module_name} cannot be imported ({error})") from error
        try:
            self._function: Any = operator.attrgetter(path)(module)
        except AttributeError:
            raise UserError(f"{name}: no {path} in module {module_name}{nearest(path, vars(module), False)}") from None
        if not callable(self._function):
            raise UserError(f"{name}: {path} is of type {type(self._function).__name__}; a function was expected")

    def tensor(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image))

    def outputs(self, inputs: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        for pixels, (height, width) in zip(inputs, sizes, strict=True):
            classes = list(self.dataset.classes)
            try:
                given = self._function(Image.fromarray(pixels.numpy()), classes)
            except Exception as error:
                raise UserError(f"{self.name} failed with {type(error).__name__}: {error} (see --debug)") from error
            try:
                output = given.detach() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
            except (TypeError, ValueError, RuntimeError):
                raise UserError(f"{self.name} gave {type(given).__name__}; an array or tensor was expected") from None
            most, least = len(classes), len(self.dataset.prompts)
            labels = output.shape == (height, width) and not (output.is_floating_point() or output.dtype == torch.bool)
            scores = output.ndim == 3 and output.is_floating_point() and len(output) in (most, least) and output.numel()
            if not labels and not scores:
                counts = f"{most}" if most == least else f"{most} (or {least}, without the background)"
                dtype = str(output.dtype).removeprefix("torch.")
                raise UserError(
                    f"{self.name} gave {dtype} {list(output.shape)} for a photo of {width} x {height}; expected "
                    f"integer labels [{height}, {width}], or floats [T, h, w] with T = {counts}"
                )
            output = output.to(self.device, torch.int64 if labels else torch.float32)
            if labels and not 0 <= output.min() <= output.max() < most:
                wrong = output[(output < 0) | (output >= most)][0]
                raise UserError(f"{self.name} gave label {wrong}; the {most} classes are 0 to {most - 1}")
            if scores and output.isnan().any():
                raise UserError(f"{self.name} gave scores that are not numbers (NaN)")
            yield output
