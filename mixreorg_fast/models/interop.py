"""GroupViT's tensors under other names: those of Hugging Face's ``GroupViTModel`` and of NVlabs' original files.

One table holds the names; both directions, and the errors about missing or unknown tensors, are read from it.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import ModelConfig, validated
from ..errors import UserError
from .weights import check_names, shapes_of

Naming = Literal["huggingface", "nvlabs"]

# Three columns: ours, Hugging Face's, NVlabs'. A line that is indented continues the names of the last one that is
# not. `#` is a number and `*` a word; they carry over in the order in which they occur. `{q,k,v}` names the tensors
# that ours holds as one, stacked along the first dimension.
_TABLE = """
logit_scale                        logit_scale                               logit_scale
image_encoder.                     vision_model.                             img_encoder.
  patch_embed.*                      embeddings.patch_embeddings.projection.*  patch_embed.proj.*
  patch_norm.*                       embeddings.layernorm.*                    patch_embed.norm.*
  positions.weight                   embeddings.position_embeddings            pos_embed
  norm.*                             layernorm.*                               norm.*
image_encoder.stages.#.            vision_model.encoder.stages.#.            img_encoder.layers.#.
  group_tokens.weight                group_token                               group_token
  group_projector.norm.*             group_projector.0.*                       group_projector.0.*
  group_projector.mixer.*.*          group_projector.1.*.*                     group_projector.1.*.*
  blocks.#.norm1.*                   layers.#.layer_norm1.*                    blocks.#.norm1.*
  blocks.#.attention.qkv.*           layers.#.self_attn.{q,k,v}_proj.*         blocks.#.attn.qkv.*
  blocks.#.attention.out.*           layers.#.self_attn.out_proj.*             blocks.#.attn.proj.*
  blocks.#.norm2.*                   layers.#.layer_norm2.*                    blocks.#.norm2.*
  blocks.#.mlp.*.*                   layers.#.mlp.*.*                          blocks.#.mlp.*.*
image_encoder.stages.#.grouping.   vision_model.encoder.stages.#.downsample. img_encoder.layers.#.downsample.
  norm_groups.*                      norm_tokens.*                             norm_tokens.*
  mix_groups.*.*                     mlp_inter.*.*                             mlp_inter.*.*
  norm_mixed.*                       norm_post_tokens.*                        norm_post_tokens.*
  norm_patches.*                     norm_x.*                                  norm_x.*
  pre_assign.attention.q.*           pre_assign_attn.attn.q_proj.*             pre_assign_attn.attn.q_proj.*
  pre_assign.attention.kv.*          pre_assign_attn.attn.{k,v}_proj.*         pre_assign_attn.attn.{k,v}_proj.*
  pre_assign.attention.out.*         pre_assign_attn.attn.out_proj.*           pre_assign_attn.attn.proj.*
  pre_assign.norm2.*                 pre_assign_attn.norm2.*                   pre_assign_attn.norm2.*
  pre_assign.mlp.*.*                 pre_assign_attn.mlp.*.*                   pre_assign_attn.mlp.*.*
  pre_assign.norm_out.*              pre_assign_attn.norm_post.*               pre_assign_attn.norm_post.*
  q.*                                assign.q_proj.*                           assign.q_proj.*
  kv.*                               assign.{k,v}_proj.*                       assign.{k,v}_proj.*
  out.*                              assign.proj.*                             assign.proj.*
  norm2.*                            norm_new_x.*                              norm_new_x.*
  mlp.*.*                            mlp_channels.*.*                          mlp_channels.*.*
text_encoder.                      text_model.                               text_encoder.
  token_embedding.*                  embeddings.token_embedding.*              token_embedding.*
  position_embedding.weight          embeddings.position_embedding.weight      positional_embedding
  norm.*                             final_layer_norm.*                        ln_final.*
text_encoder.blocks.#.             text_model.encoder.layers.#.              text_encoder.transformer.resblocks.#.
  norm1.*                            layer_norm1.*                             ln_1.*
  attention.qkv.*                    self_attn.{q,k,v}_proj.*                  attn.in_proj_*
  attention.out.*                    self_attn.out_proj.*                      attn.out_proj.*
  norm2.*                            layer_norm2.*                             ln_2.*
  mlp.fc1.*                          mlp.fc1.*                                 mlp.c_fc.*
  mlp.fc2.*                          mlp.fc2.*                                 mlp.c_proj.*
image_projection.                  visual_projection.                        img_projector.
  fc1.*                              0.*                                       linear_hidden.0.*
  norm.*                             1.*                                       linear_hidden.1.*
  fc2.*                              3.*                                       linear_out.*
text_projection.                   text_projection.                          text_projector.
  fc1.*                              0.*                                       linear_hidden.0.*
  norm.*                             1.*                                       linear_hidden.1.*
  fc2.*                              3.*                                       linear_out.*
"""

# Tensors of other programs' files that no embedding and no map depends on.
_IGNORED = {"multi_label_logit_scale", "text_model.embeddings.position_ids"}


@functools.cache
def _rows() -> list[tuple[re.Pattern, dict[Naming, str]]]:
    """The table's rows: a pattern of our names, and the templates of the others'."""
    rows, stem = [], [""] * 3
    for line in _TABLE.strip().splitlines():
        cells = line.split()
        if not line.startswith(" "):
            stem = cells
        if cells[0].endswith("."):
            continue
        ours, huggingface, nvlabs = cells if cells is stem else map("".join, zip(stem, cells, strict=True))
        pattern = re.escape(ours).replace(r"\#", r"(\d+)").replace(r"\*", r"(\w+)")
        rows.append((re.compile(pattern), {"huggingface": huggingface, "nvlabs": nvlabs}))
    return rows


def foreign_names(name: str, naming: Naming) -> tuple[str, ...]:
    """The names of our tensor `name` in the other naming; several where our tensor joins several.
    Raises a KeyError if we have no tensor of that name."""
    for pattern, templates in _rows():
        if found := pattern.fullmatch(name):
            template = templates[naming]
            for value in found.groups():
                template = re.sub(r"[#*]", value, template, count=1)
            before, brace, rest = template.partition("{")
            if not brace:
                return (template,)
            choices, after = rest.split("}")
            return tuple(before + choice + after for choice in choices.split(","))
    raise KeyError(name)


def from_foreign(
    state: Mapping[str, Any], naming: Naming, source: str, heads: tuple[int, int] | None = None
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """The sizes of a model; its tensors under our names, in their dtypes; the names of tensors that nothing needs.

    Args:
        state: tensors under the names of elsewhere. source: what errors call it.
        heads: of the image and the text encoder, which no shape tells; None: GroupViT's 64 channels per head.
    Raises:
        UserError: a tensor is missing, unknown, no tensor at all, or of a shape that does not fit the others.
    """
    ignored = sorted(_IGNORED & state.keys())
    state = {name: value for name, value in state.items() if name not in _IGNORED}
    config = _sizes(state, naming, source, heads)
    shapes = shapes_of(config)
    names = {name: foreign_names(name, naming) for name in shapes}
    check_names(state.keys(), {foreign for parts in names.values() for foreign in parts}, source)
    return config, {name: _joined(state, names[name], shapes[name], source) for name in shapes}, ignored


def to_foreign(state: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Our tensors (as :mod:`.weights` files hold them) under the names of elsewhere, in their dtypes."""
    out = {}
    for name, value in state.items():
        names = foreign_names(name, naming)
        parts = [part.clone() for part in value.chunk(len(names))] if len(names) > 1 else [value]
        out.update(zip(names, parts, strict=True))
    return out


def _joined(state: Mapping[str, Any], names: tuple[str, ...], shape: torch.Size, source: str) -> Tensor:
    """The tensors `names` as one of `shape`; dimensions of 1 do not matter (NVlabs' projections are convolutions)."""
    wanted = torch.Size((shape[0] // len(names), *shape[1:])) if len(names) > 1 else shape
    for name in names:
        found = state[name].shape if isinstance(state[name], Tensor) else None
        if found is None or [n for n in found if n != 1] != [n for n in wanted if n != 1]:
            kind = "no tensor" if found is None else list(found)
            raise UserError(f"{source}: '{name}' is {kind}, but its neighbours' sizes make it {list(wanted)}")
    parts = [state[name] for name in names]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)


def _sizes(state: Mapping[str, Any], naming: Naming, source: str, heads: tuple[int, int] | None) -> ModelConfig:
    """The sizes of the model that these tensors are of."""

    def shape(name: str, dimensions: int) -> list[int]:
        foreign = foreign_names(name, naming)[0]
        if not isinstance(state.get(foreign), Tensor):
            raise UserError(f"{source} lacks tensor '{foreign}'; GroupViT's tensors were expected")
        if state[foreign].dim() != dimensions:
            raise UserError(f"{source}: '{foreign}' is {list(state[foreign].shape)}, expected {dimensions} dimensions")
        return list(state[foreign].shape)

    def blocks(stem: str) -> int:
        """How many blocks there are, counted from 0 until one is missing."""
        return next(n for n in itertools.count() if foreign_names(f"{stem}.{n}.norm1.weight", naming)[0] not in state)

    _, patches, width = shape("image_encoder.positions.weight", 3)
    patch = shape("image_encoder.patch_embed.weight", 4)[2]
    vocabulary, text_width = shape("text_encoder.token_embedding.weight", 2)
    side = math.isqrt(patches)
    if side * side != patches:
        raise UserError(f"{source}: {patches} position embeddings are no square grid; a square image_size was expected")
    if heads is None:
        for channels in (width, text_width):
            if channels % 64:
                raise UserError(f"{source}: a width of {channels} is not a multiple of GroupViT's 64 channels per head")
        heads = (width // 64, text_width // 64)
    values = {
        "image_size": side * patch,
        "patch_size": patch,
        "width": width,
        "heads": heads[0],
        "depths": [blocks(f"image_encoder.stages.{i}.blocks") for i in range(3)],
        "groups": [shape(f"image_encoder.stages.{i}.group_tokens.weight", 3)[1] for i in range(2)],
        "embed_dim": shape("image_projection.fc2.bias", 1)[0],
        "projection_hidden": shape("image_projection.fc1.bias", 1)[0],
        "text": {
            "width": text_width,
            "heads": heads[1],
            "layers": blocks("text_encoder.blocks"),
            "context": shape("text_encoder.position_embedding.weight", 2)[0],
            "vocab_size": vocabulary,
        },
    }
    return validated(ModelConfig, values, source)
