"""Class names to text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..names import parse_templates

if TYPE_CHECKING:
    from .model import Model


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
    templates = parse_templates(templates)
    prompts = [template.replace("{}", name.strip()) for name in classes for template in templates]
    ids, _ = model.tokenizer.encode(prompts, model.config.text.context)
    embeddings = [model.text_embeddings(chunk.to(model.device), normalise=False).float() for chunk in ids.split(256)]
    return F.normalize(torch.cat(embeddings).unflatten(0, (len(classes), -1)).mean(dim=1), dim=-1)
