"""The fast ops inside a Hugging Face ``GroupViTModel``."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .groupvit import Segments, label_pixels

if TYPE_CHECKING:
    from transformers import GroupViTModel


def accelerate(model: GroupViTModel, *, undo: bool = False) -> GroupViTModel:
    """Put the fast grouping attention into `model`, in place, and add ``segment_labels``; returns `model`.

    Outputs and gradients are the same; parameters, their names and what ``save_pretrained`` writes are untouched. In
    training, the Gumbel noise is of the same distribution but other draws: its seed comes from torch's generator of
    the model's device, so that ``torch.manual_seed`` repeats a run. ``segmentation_logits`` keep their own formula.

    Args:
        undo: restore Hugging Face's own methods instead.
    Raises:
        TypeError: `model` is no ``GroupViTModel``.
    """
    from transformers import GroupViTModel

    if not isinstance(model, GroupViTModel):
        raise TypeError(f"accelerate: expected transformers' GroupViTModel, got {type(model).__name__}")
    stages: Any = model.vision_model.encoder.stages
    assigning = [stage.downsample.assign for stage in stages if stage.downsample is not None]
    methods = [(model, "segment_labels", _segment_labels), *((module, "forward", _assign) for module in assigning)]
    for module, name, method in methods:
        if undo:
            vars(module).pop(name, None)
        else:
            setattr(module, name, MethodType(method, module))
    return model


def _assign(self: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """``GroupViTAssignAttention.forward``: segments ``[B, G, C]`` and soft assignment ``[B, G, N]``."""
    seed = torch.randint(2**62, (), device=query.device) if self.training else None
    q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(key)
    out, soft = ops.grouping_attention(
        q, k, v, scale=self.scale, eps=self.assign_eps, seed=seed, return_assignment="soft"
    )
    return self.proj(out), soft.to(query.dtype)


@torch.no_grad()
def _segment_labels(
    self: GroupViTModel,
    pixel_values: Tensor,
    text_embeds: Tensor,
    *,
    size: tuple[int, int] | None = None,
    background_threshold: float | None = None,
) -> Tensor:
    """Labels int64 ``[B, H, W]`` of `pixel_values` ``[B, 3, H, W]``; the model must be in evaluation mode.

    `text_embeds` ``[T, D]`` and the options are those of :meth:`mixreorg_fast.models.GroupViT.segment_labels`.
    """
    vision = self.vision_model(pixel_values, output_attentions=True, return_dict=True)
    maps = vision.attentions[0].float()
    for attention in vision.attentions[1:]:
        maps = attention.float() @ maps  # [B, G2, N] <- [B, G2, G1] @ [B, G1, N]
    segments = vision.last_hidden_state
    embeddings = F.normalize(self.visual_projection(segments.flatten(0, 1)).float(), dim=-1)
    image = F.normalize(self.visual_projection(vision.pooler_output).float(), dim=-1)
    multiplier = self.logit_scale.float().exp().clamp(max=100.0)
    height = pixel_values.shape[2] // self.vision_model.embeddings.patch_embeddings.patch_size[0]
    seen = Segments(maps.unflatten(2, (height, -1)), embeddings.unflatten(0, segments.shape[:2]), image)
    size = size or (pixel_values.shape[2], pixel_values.shape[3])
    return label_pixels(seen, text_embeds, multiplier, size, background_threshold)
