"""Pascal VOC's colours of masks. NumPy alone, so that the processes that draw scenes do not load PyTorch."""

from __future__ import annotations

import numpy as np


def voc_palette() -> np.ndarray:
    """Colours by label, uint8 ``[256, 3]``: the bits of the label, dealt to the channels from the top down."""
    labels, palette = np.arange(256), np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette
