"""Training's decoder: the sizes of photos from their headers, and which photos make a batch fail."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import UserError, extra
from ...images import MAX_PIXELS
from .augment import validation_graph

# Limits of a batch: photos, and pixels (200 MB) unless it is a single photo.
BATCH, PIXELS = 64, 1 << 26


class Decoder:
    """NVIDIA DALI's decoder, the one that training uses on `device`, and its parser of headers."""

    def __init__(self, device: torch.device, threads: int) -> None:
        try:
            import nvidia.dali  # noqa: F401
            from nvidia import nvimgcodec
        except ImportError:
            message = "NVIDIA DALI is not installed; training reads its data with it"
            raise UserError(f"{message}: {extra('train')}") from None
        self._stream: Any = getattr(nvimgcodec, "CodeStream")  # noqa: B009 (of an extension module)
        self._device, self._threads = device, threads
        self._pipeline: Any = None

    def size(self, photo: bytes) -> tuple[int, int]:
        """Height and width as they will be decoded, from the header alone (2 µs).

        A photo that fails here must not enter a pipeline: DALI 2.4 may crash in the operators after the decoder.

        Raises:
            ValueError: the decoder does not know the header, or the photo is too large to be decoded.
        """
        if not photo:
            raise ValueError("empty image")
        try:
            stream = self._stream(photo)
            height, width = stream.height, stream.width
        except RuntimeError:
            raise ValueError("not an image") from None
        if height * width > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
        return (width, height) if _turned(photo) else (height, width)

    def failing(self, photos: Sequence[np.ndarray]) -> dict[int, str]:
        """Places and reasons of the encoded photos (uint8 ``[bytes]``, their headers sound) that cannot be decoded."""
        pixels = [math.prod(self.size(photo.tobytes())) for photo in photos]

        def search(first: int, last: int) -> dict[int, str]:
            """Decode a batch; one that is too large or fails is halved."""
            count = last - first
            if count == 1 or (count <= BATCH and sum(pixels[first:last]) <= PIXELS):
                if self._decodes(photos[first:last]):
                    return {}
                if count == 1:
                    return {first: "cannot be decoded (cut short or damaged)"}
            middle = (first + last) // 2
            return search(first, middle) | search(middle, last)

        return search(0, len(photos)) if len(photos) else {}

    def _decodes(self, photos: Sequence[np.ndarray]) -> bool:
        if self._pipeline is None:
            self._pipeline = validation_graph(32, device=self._device, batch=BATCH, threads=self._threads)
        try:
            self._pipeline.feed_input("encoded", list(photos))
            self._pipeline.schedule_run()
            take(self._pipeline, self._device)
        except RuntimeError:
            return False
        return True


def take(pipeline: Any, device: torch.device) -> Tensor:
    """The oldest batch in flight, copied out of DALI's buffers, fp32 ``[B, 3, S, S]``.

    On a GPU the copy is in the order of the current stream. DALI binds its outputs to that stream, so their memory is
    used again only after the copy. DALI's memory is not passed to PyTorch by DLPack: DALI would call
    cudaDeviceSynchronize in a thread of its own before freeing it, and that breaks the capture of a CUDA graph.
    """
    from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray

    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    (output,) = pipeline.share_outputs(cuda_stream=stream)
    try:
        batch = output.as_tensor()
        return feed_ndarray(batch, torch.empty(batch.shape(), device=device), cuda_stream=stream)
    finally:
        pipeline.release_outputs()


def _turned(photo: bytes) -> bool:
    """Whether the EXIF orientation, which the decoder applies, swaps height and width."""
    if b"Exif\0\0" in photo[:4096]:
        with contextlib.suppress(Exception):  # a damaged EXIF block only makes the crop's shape a little wrong
            return Image.open(io.BytesIO(photo)).getexif().get(0x0112, 1) >= 5
    return False
