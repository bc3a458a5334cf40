"""From files, Pillow images and arrays to what the network takes, and the errors of bad pictures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError, nearest

MAX_PIXELS = 178_956_970  # the size at which Pillow itself takes a file for a decompression bomb (half a GiB as RGB)
MAX_LONG_SIDE = 2048  # GroupViT's test pipeline: short side 448, but no side above 2048
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def load_image(source: Any, *, upright: bool = True, max_pixels: int | None = None) -> Image.Image:
    """A picture as 8-bit RGB, upright as its EXIF orientation says (unless `upright` is off).

    Grey, palette, CMYK and 16-bit pictures are converted (16 bits keep their upper byte), transparency is laid over
    white. The size is checked from the header, before anything is decoded.

    Args:
        source: a path, a Pillow image, or an array-like ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]`` of
            uint8, uint16 or of floats in 0..1.
        max_pixels: what a file may hold; None: `MAX_PIXELS`.
    Raises:
        UserError: no such file; no picture; truncated; too many pixels; another shape or dtype.
    """
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if isinstance(source, Image.Image):
        return _rgb(source, upright)
    if not isinstance(source, (str, Path)):
        return _rgb(_from_array(source), upright)
    path = Path(source)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise UserError(f"no picture {path}{close if 'did you mean' in close else ''}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides, below
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                return _rgb(image, upright)
    except Image.DecompressionBombError:
        raise UserError(f"{path}: too large to decode (at most {max_pixels / 1e6:.0f} million pixels)") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture (expected JPEG, PNG, WebP, BMP, TIFF or GIF)") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        # Pillow's decoders report damage by any of these.
        raise UserError(f"{path}: damaged picture ({error})") from None


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """The pictures that `sources` (files and folders) name; a folder stands for its pictures in order of name.

    Raises:
        UserError: nothing there, or a folder without pictures.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if not source.is_dir():
            found.append(source)
            continue
        inside = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES)
        if not inside:
            raise UserError(f"no pictures ({' '.join(SUFFIXES)}) in folder {source}")
        found += inside
    return found


def network_size(size: tuple[int, int], short_side: int, patch: int, long_side: int = MAX_LONG_SIDE) -> tuple[int, int]:
    """Height and width at which the network sees a photo of `size` = (height, width).

    The short side becomes `short_side` unless the long one would pass `long_side`; then both are rounded to the
    nearest multiple of the patch, so that the patches cover the whole photo (GroupViT drops what is left over).
    """
    scale = min(short_side / min(size), max(long_side, short_side) / max(size))
    height, width = (max(patch, round(side * scale / patch) * patch) for side in size)
    return height, width


def to_tensor(
    image: Image.Image,
    short_side: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    long_side: int = MAX_LONG_SIDE,
) -> Tensor:
    """An RGB picture at its :func:`network_size`, normalised: fp32 ``[3, h, w]`` = (RGB in 0..1 - mean) / std.

    Resizing is bilinear over the area that a pixel covers (Pillow's), which does not alias when it shrinks.
    """
    height, width = network_size((image.height, image.width), short_side, patch, long_side)
    if image.size != (width, height):
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
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"expected a path, a Pillow image or an array, got {type(source).__name__}") from None
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise UserError(f"an image array must be [H, W], [H, W, 3] or [H, W, 4], got {list(array.shape)}")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise UserError(f"an image array of {list(array.shape)} is too large (at most {MAX_PIXELS / 1e6:.0f} Mpixel)")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UserError("an image array of floats must hold values in 0..1 (for 0..255, use uint8)")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise UserError(f"an image array must be uint8, uint16 or floats in 0..1, got {array.dtype}")
    return Image.fromarray(array)
