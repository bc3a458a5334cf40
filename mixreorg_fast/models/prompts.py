"""Class names to text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, nearest

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from .groupvit import GroupViT

TEMPLATES = {
    "default": ("a photo of a {}.",),
    # The seven that CLIP's prompt study for ImageNet kept of its eighty (Radford et al., 2021).
    "imagenet7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "name": ("{}",),
}


def templates_named(name: str) -> tuple[str, ...]:
    """The set of templates called `name`, or the one template that `name` is (anything with ``{}``).

    Raises:
        UserError: neither.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{}" in name:
        return (name,)
    raise UserError(f"--templates '{name}': no such set and no {{}} in it{nearest(name, TEMPLATES)}")


@torch.no_grad()
def text_classifier(
    model: GroupViT, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str] = TEMPLATES["default"]
) -> Tensor:
    """One L2-normalised embedding per class: fp32 ``[T, D]`` on the model's device.

    The prompts' embeddings are averaged over the templates before they are normalised, as GroupViT does.

    Raises:
        UserError: no classes, an empty name, or a template without ``{}``.
    """
    if not classes or not all(name.strip() for name in classes):
        raise UserError(f"class names must not be empty, got {list(classes)}")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template '{template}' has no {{}} for the class name")
    device = next(model.parameters()).device
    prompts = [template.replace("{}", name.strip()) for name in classes for template in templates]
    ids, _ = tokenizer.encode(prompts, model.config.text.context)
    embeddings = [model.text_embeddings(chunk.to(device), normalise=False).float() for chunk in ids.split(256)]
    return F.normalize(torch.cat(embeddings).unflatten(0, (len(classes), -1)).mean(dim=1), dim=-1)
