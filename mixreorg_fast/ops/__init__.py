"""The public fast ops. Shapes: B images, N patches, G groups, C channels, K images in a mixing group, T texts.

Every op takes `impl`: "auto", "triton" or "torch"; `attention` and `linear` choose among libraries instead. The
plain-PyTorch reference of a kernel is in the op's file; tests and benchmarks compare with it.
"""

from .attention import attention
from .contrastive_loss import contrastive_loss
from .decode_segments import decode_segments
from .grouping_attention import grouping_attention
from .linear import linear
from .mixed_segmentation_loss import mixed_segmentation_loss
from .patch_mixing import MixPlan, patch_blend, patch_mix, patch_restore
from .stochastic_depth import stochastic_depth
from .token_mixing import blend_tokens, mix_tokens, restore_tokens

__all__ = [
    "MixPlan",
    "attention",
    "blend_tokens",
    "contrastive_loss",
    "decode_segments",
    "grouping_attention",
    "linear",
    "mix_tokens",
    "mixed_segmentation_loss",
    "patch_blend",
    "patch_mix",
    "patch_restore",
    "restore_tokens",
    "stochastic_depth",
]
