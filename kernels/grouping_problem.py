"""How the grouping attention cuts a call into tiles, and the launch configurations of its kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .settings import Grouping
from .variants import ARCHITECTURES, INTERPRET, Config, architecture, cdiv, next_power_of_2


def _on(*architectures: int, channels: int, warps: int, **options: int) -> dict[int, Config]:
    return dict.fromkeys(architectures or ARCHITECTURES, Config({"BLOCK_CHANNELS": channels}, warps, **options))


# On sm_90, loops over channels of one or two rounds are unrolled. There ptxas 12.8, which Triton 3.6 and 3.7 bring,
# builds descriptors of wgmma from registers that nothing has written. Blocks of fewer than 64 rows take mma instead.
_SMALL_16 = {**_on(channels=64, warps=4), **_on(90, channels=32, warps=4)}
_BACKWARD_32 = {
    **_on(80, 120, channels=32, warps=16),
    **_on(86, 89, 100, channels=32, warps=8, most_registers=255),  # where ptxas would stop at 128 and spill
    **_on(90, channels=32, warps=8),
}
# By kernel and element size, then by the tile's elements at most, then by architecture. docs/kernels.md says why.
CONFIGS = {
    ("forward", 2): {
        2**12: _SMALL_16,
        2**13: _on(channels=64, warps=8),
        2**14: {**_on(80, 86, 89, 120, channels=64, warps=16), **_on(90, channels=128, warps=16)},
    },
    ("backward", 2): {
        2**12: _SMALL_16,
        2**13: {**_on(channels=32, warps=8), **_on(90, channels=64, warps=8)},
        2**14: {
            **_on(80, 120, channels=32, warps=8),
            **_on(86, 89, channels=32, warps=8, num_stages=3),
            **_on(90, channels=64, warps=8, num_stages=3),
        },
    },
    ("backward with map", 2): {
        2**12: {**_SMALL_16, **_on(80, channels=64, warps=4, most_registers=255)},  # ptxas would stop at 128 and spill
        2**13: {**_on(channels=32, warps=8), **_on(90, channels=64, warps=8)},
        2**14: {**_on(80, channels=32, warps=8, num_stages=3), **_on(86, 89, 90, 120, channels=32, warps=8)},
    },
    ("aggregate", 2): {2**13: {**_on(channels=32, warps=8), **_on(90, channels=128, warps=8)}},
    ("forward", 4): {2**12: _on(channels=32, warps=8)},
    ("backward", 4): {2**12: _BACKWARD_32},
    ("backward with map", 4): {2**12: _BACKWARD_32},
    ("aggregate", 4): {2**12: {**_on(channels=32, warps=8), **_on(100, channels=32, warps=8, num_stages=1)}},
}
CANDIDATES = [
    Config({"BLOCK_CHANNELS": channels}, num_warps=warps, num_stages=stages)
    for channels in (32, 64, 128)
    for warps in (4, 8, 16)
    for stages in (2, 3, 4)
]


@dataclass(frozen=True)
class Problem:
    """The sizes of a call, and how its images are cut into tiles of patches."""

    batch: int
    groups: int
    patches: int
    channels: int
    itemsize: int
    architecture: int
    with_soft: bool = False  # a soft map or assignment, which takes further registers

    @classmethod
    def of(cls, q: Tensor, k: Tensor, with_soft: bool) -> Problem:
        (batch, groups, channels), patches = q.shape, k.shape[1]
        return cls(batch, groups, patches, channels, q.element_size(), architecture(q.device), with_soft)

    def numbers(self, settings: Grouping) -> tuple[int, tuple[int | float, ...]]:
        """The first image, and the other numbers, of the forward and of the backward kernel."""
        return settings.first_image, (self.patches, settings.scale, 1.0 / settings.tau, settings.eps)

    @property
    def block_groups(self) -> int:
        return max(16, next_power_of_2(self.groups))

    @property
    def block_patches(self) -> int:
        """The whole image if it fits a program's registers, as the model's does at 224 px in 16 bits."""
        tensor_memory = self.architecture // 10 == 10  # results pass through it, which costs registers
        if self.itemsize == 4:
            whole = 2**12 if self.architecture < 100 else 2**11
        elif self.channels <= 64 and self.architecture == 90:  # below the 64 rows of a wgmma, see _SMALL_16
            whole = 2**11
        elif self.with_soft or self.block_groups > 64 or self.channels % 64 > 0 or tensor_memory:
            whole = 2**13
        else:
            whole = 2**14
        block = max(16, next_power_of_2(self.patches))
        return block if block * self._width <= whole else min(whole, 2**13) // self._width

    @property
    def _width(self) -> int:
        """Columns of a tile: the groups, or a block of channels."""
        return max(64, self.block_groups)

    @property
    def tiles(self) -> int:
        return max(1, cdiv(self.patches, self.block_patches))

    @property
    def constexprs(self) -> dict[str, object]:
        return {
            "GROUPS": self.groups,
            "CHANNELS": self.channels,
            "BLOCK_PATCHES": self.block_patches,
            "BLOCK_GROUPS": self.block_groups,
        }

    def configurations(self, kernel: str) -> dict[int, Config]:
        """The table for `kernel`'s tiles of this size."""
        tables = CONFIGS[kernel, self.itemsize]
        elements = self.block_patches * self._width
        return tables[min(most for most in tables if most >= elements)]


def rows_together(x: Tensor) -> Tensor:
    """`x`, copied only if its channels are not adjacent or an image spans 2**31 elements: offsets within an image are
    int32."""
    _, rows, channels = x.shape
    if (x.stride(2) == 1 or channels == 1) and (rows - 1) * x.stride(1) + channels <= 2**31:
        return x
    return x.contiguous()


def prefetch_bytes(*tensors: Tensor) -> int:
    """A row's size in bytes if the device can prefetch whole rows (from sm_90, at multiples of 16 bytes), else 0."""
    row = tensors[0].shape[2] * tensors[0].element_size()
    offsets = [x.data_ptr() for x in tensors] + [x.stride(axis) * x.element_size() for x in tensors for axis in (0, 1)]
    able = not INTERPRET and architecture(tensors[0].device) >= 90
    return row if able and not any(offset % 16 for offset in (row, *offsets)) else 0


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(axis) for x in tensors for axis in (0, 1))
