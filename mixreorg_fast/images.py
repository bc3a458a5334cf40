"""Photos: files, Pillow images and arrays to the network's input, and the errors of bad pictures."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import UserError, nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0..1
MAX_PIXELS = 178_956_970  # Pillow refuses larger files as decompression bombs (half a GiB as RGB)
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError)  # what Pillow's decoders raise for damaged files
MAX_LONG_SIDE = 2048  # GroupViT's test pipeline: short side 448, but no side above 2048
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def load_image(source: Any, *, upright: bool = True, max_pixels: int | None = None) -> Image.Image:
    """A picture as 8-bit RGB, upright as its EXIF orientation says (unless `upright` is off).

    Grey, palette, CMYK and 16-bit pictures are converted (16 bits keep their upper byte), transparency is laid over
    white. The size is checked from the header, before anything is decoded.

    Args:
        source: a path, the bytes of a file, a file opened in binary mode, a Pillow image, or an array or tensor
            ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]`` of uint8, uint16 or of floats in 0..1.
        max_pixels: of a file at most; None: `MAX_PIXELS`.
    Raises:
        UserError: a missing file, not an image, truncated, too many pixels, another shape or dtype.
    """
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if isinstance(source, Image.Image):
        return _decoded(source, str(getattr(source, "filename", "") or "the picture"), upright)
    if isinstance(source, bytes | bytearray | memoryview):
        source, name = io.BytesIO(source), f"{len(source)} bytes"
    elif hasattr(source, "read"):
        name = str(getattr(source, "name", type(source).__name__))
        if isinstance(source, io.TextIOBase):
            raise UserError(f"{name}: opened as text; open(…, 'rb') reads a picture")
    elif isinstance(source, str | os.PathLike):
        source = name = Path(source)
        if not source.is_file():
            siblings = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
            raise UserError(f"no picture {source}{nearest(source.name, siblings, others=False)}")
    else:
        return _rgb(_from_array(source), upright)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides, below
            with Image.open(source) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                return _decoded(image, str(name), upright)
    except Image.DecompressionBombError:
        raise UserError(f"{name}: too large to decode (at most {max_pixels / 1e6:.0f} million pixels)") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a picture (expected JPEG, PNG, WebP, BMP, TIFF or GIF)") from None
    except _DAMAGE as error:
        raise UserError(f"{name}: damaged picture ({error})") from None


def _decoded(image: Image.Image, name: str, upright: bool) -> Image.Image:
    """`image` in RGB; errors name it."""
    try:
        return _rgb(image, upright)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except _DAMAGE as error:
        raise UserError(f"{name}: damaged picture ({error})") from None


def find_images(source: Path, recursive: bool = False) -> list[Path]:
    """`source` itself or, if it is a folder, its pictures in order of name; `recursive`: also those of sub-folders that
    are not hidden. Raises a UserError for a folder without pictures, or one that cannot be read."""
    if not source.is_dir():
        return [source]

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None

    inside: list[Path] = []
    for folder, folders, files in os.walk(source, onerror=fail):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        inside += [Path(folder, name) for name in files if name.lower().endswith(SUFFIXES)]
    if not inside:
        raise UserError(f"no pictures ({' '.join(SUFFIXES)}) in folder {source}")
    return sorted(inside)


def network_size(size: tuple[int, int], short_side: int, patch: int) -> tuple[int, int]:
    """Height and width at which the network sees a photo of `size` = (height, width).

    The short side becomes `short_side` unless the long one would pass `MAX_LONG_SIDE`; then both are rounded to the
    nearest multiple of the patch, so that the patches cover the whole photo (GroupViT drops the remainder).
    """
    scale = min(short_side / min(size), max(MAX_LONG_SIDE, short_side) / max(size))
    height, width = (max(patch, round(side * scale / patch) * patch) for side in size)
    return height, width


def to_tensor(image: Image.Image, short_side: int, patch: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB picture at its :func:`network_size`, normalised: fp32 ``[3, h, w]`` = (RGB in 0..1 - mean) / std.

    Resizing is bilinear over the area that a pixel covers (Pillow's), which does not alias when it shrinks.
    """
    height, width = network_size((image.height, image.width), short_side, patch)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    # In NumPy: reader threads call this, and PyTorch would start a team of threads of its own in each of them.
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = (pixels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The inverse of the normalisation: ``[B, 3, H, W]`` → uint8 ``[B, H, W, 3]``."""
    images = images.detach().float().cpu()
    pixels = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _rgb(image: Image.Image, upright: bool) -> Image.Image:
    if upright and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        image.load()  # a lazily opened file is read here, while its errors can still be named
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)
        shift = 8 if image.mode != "I" or values.max(initial=0) > 255 else 0
        image = Image.fromarray((values.clip(0, 65535) >> shift).astype(np.uint8))
    elif image.mode == "F":
        image = _from_array(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _from_array(source: Any) -> Image.Image:
    expected = "expected a path, bytes, a file, a Pillow image or an array, got"
    try:
        array = np.asarray(source.detach().cpu() if isinstance(source, Tensor) else source)
    except (TypeError, ValueError, RuntimeError):
        kind = f"a tensor of {source.dtype}" if isinstance(source, Tensor) else type(source).__name__
        raise UserError(f"{expected} {kind}") from None
    if array.dtype == object or array.ndim == 0:
        raise UserError(f"{expected} {type(source).__name__}")
    shape = list(array.shape)
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (3, 4))) or not array.size:
        hint = ""
        if array.ndim == 3 and shape[0] in (1, 3, 4):
            order = "permute(1, 2, 0)" if isinstance(source, Tensor) else "transpose(1, 2, 0)"
            hint = f": channels come last, as {order} puts them"
        elif array.ndim == 4:
            hint = ": one image at a time, or a list of them"
        raise UserError(f"an image array must be [H, W], [H, W, 3] or [H, W, 4], got {shape}{hint}")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise UserError(f"an image array of {shape} is too large (at most {MAX_PIXELS / 1e6:.0f} Mpixel)")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # nor NaN
            raise UserError("an image array of floats must hold values in 0..1 (for 0..255, use uint8)")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise UserError(f"an image array must be uint8, uint16 or floats in 0..1, got {array.dtype}")
    return Image.fromarray(array)
