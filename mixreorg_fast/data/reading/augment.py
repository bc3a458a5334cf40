"""Augmentation: its random numbers drawn on the host, its pixels computed by DALI.

``draw`` turns (seed, position) into one row of parameters per image; ``training_graph`` is the DALI graph that takes
those rows as inputs beside the encoded images. The graph draws nothing. The recipe is GroupViT's (timm's
``rand-m9-mstd0.5-inc1``): random resized crop, flip, RandAugment or colour jitter, normalise, random erasing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...config import AugmentConfig
from ...images import IMAGENET_MEAN, IMAGENET_STD
from .order import Purpose, uniforms

MAGNITUDES = 31  # RandAugment's scale: 0 … 30
MAGNITUDE_NOISE = 1.5  # standard deviation on that scale: timm's mstd0.5 of 10
ATTEMPTS = 10  # at a crop or an erased rectangle that fits, as in torchvision and timm
ERASED_AREA = (0.02, 1 / 3)  # timm's
ERASED_RATIO = (0.3, 1 / 0.3)
JITTER = ("brightness", "contrast", "saturation", "hue")


def draw(config: AugmentConfig, seed: int, position: int, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters of the images at positions position … position + B - 1, by the graph's input names; `sizes` are the
    heights and widths of the photos, int ``[B, 2]``."""
    count = len(sizes)
    start, extent = crop_boxes(uniforms(seed, Purpose.CROP, position, count, 2 * ATTEMPTS + 2), sizes, config)
    flips = uniforms(seed, Purpose.FLIP, position, count, 1)[:, 0] < config.flip
    drawn = {"start": start, "extent": extent, "flip": flips.astype(np.int32)}
    if config.rand_augment_ops:
        drawn |= _operations(config, seed, position, count)
    elif config.color_jitter:
        numbers = 2 * uniforms(seed, Purpose.JITTER, position, count, 4) - 1  # -1 … 1
        factors = np.maximum(0.0, 1 + config.color_jitter * numbers).astype(np.float32)
        # torchvision's usual hue range is a quarter of the other strengths, in turns.
        hue = (360 * min(0.5, config.color_jitter / 4) * numbers[:, 3]).astype(np.float32)
        drawn |= dict(zip(JITTER, (*factors[:, :3].T.copy(), hue), strict=True))
    if config.random_erasing:
        numbers = uniforms(seed, Purpose.ERASE, position, count, 2 * ATTEMPTS + 3)
        drawn["erase_start"], drawn["erase_extent"] = _erased(numbers, config.random_erasing)
    return drawn


def crop_boxes(numbers: np.ndarray, sizes: np.ndarray, config: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's RandomResizedCrop: top-left corner and size of each crop, as shares of the photo.

    `numbers` are uniform ``[B, 22]``, `sizes` heights and widths, int ``[B, 2]``. Corners and sizes are float32
    ``[B, 2]`` (vertical, horizontal).
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    low, high = config.crop_scale
    area = height * width * (low + (high - low) * numbers[:, :ATTEMPTS])
    low, high = np.log(config.crop_ratio)
    ratio = np.exp(low + (high - low) * numbers[:, ATTEMPTS : 2 * ATTEMPTS])
    crop_h, crop_w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))  # [B, attempts]
    fits = (crop_h >= 1) & (crop_w >= 1) & (crop_h <= height) & (crop_w <= width)
    first, rows = fits.argmax(axis=1), np.arange(len(sizes))
    chosen = np.stack([crop_h[rows, first], crop_w[rows, first]], axis=1)
    # If none fits: the middle of the photo, as large as the ratios allow.
    middle_w = np.minimum(width, np.rint(height * config.crop_ratio[1]))
    middle_h = np.minimum(height, np.rint(width / config.crop_ratio[0]))
    none = ~fits.any(axis=1)
    chosen[none] = np.concatenate([middle_h, middle_w], axis=1)[none]
    shift = np.floor(numbers[:, -2:] * (sizes - chosen + 1))
    shift[none] = np.floor((sizes - chosen) / 2)[none]
    return (shift / sizes).astype(np.float32), (chosen / sizes).astype(np.float32)


def _operations(config: AugmentConfig, seed: int, position: int, count: int) -> dict[str, np.ndarray]:
    """RandAugment's choices, int32 ``[B, operations]`` each: operation, magnitude and sign."""
    depth = config.rand_augment_ops
    numbers = uniforms(seed, Purpose.RAND_AUGMENT, position, count, 5 * depth).reshape(count, depth, 5)
    # Box and Muller; 1 - u is never 0.
    normal = np.sqrt(-2 * np.log(1 - numbers[..., 0])) * np.cos(2 * np.pi * numbers[..., 1])
    magnitude = np.rint(config.rand_augment_magnitude + MAGNITUDE_NOISE * normal).clip(0, MAGNITUDES - 1)
    kinds = 1 + np.floor(numbers[..., 2] * (len(_suite()) - 1))  # 0 leaves the image as it is
    applied = numbers[..., 3] < config.rand_augment_probability
    return {
        "operation": np.where(applied, kinds, 0).astype(np.int32),
        "magnitude": magnitude.astype(np.int32),
        "sign": (numbers[..., 4] < 0.5).astype(np.int32),
    }


def _erased(numbers: np.ndarray, probability: float) -> tuple[np.ndarray, np.ndarray]:
    """timm's RandomErasing: corner and size of each rectangle as shares of the image, ``[B, 2]``; size 0 for none."""
    low, high = ERASED_AREA
    area = low + (high - low) * numbers[:, :ATTEMPTS]
    low, high = np.log(ERASED_RATIO)
    ratio = np.exp(low + (high - low) * numbers[:, ATTEMPTS : 2 * ATTEMPTS])
    boxes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=-1)  # [B, attempts, 2]
    fits = (boxes < 1).all(axis=-1)
    extent = boxes[np.arange(len(boxes)), fits.argmax(axis=1)]
    extent[~fits.any(axis=-1) | (numbers[:, -1] >= probability)] = 0
    start = numbers[:, -3:-1] * (1 - extent)
    return start.astype(np.float32), extent.astype(np.float32)


def training_graph(
    config: AugmentConfig, size: int, *, device: torch.device, hw_decoder_load: float | None = None, **options: int
) -> Any:
    """The built DALI pipeline from encoded photos and drawn parameters to fp32 ``[3, size, size]``.

    Its inputs are ``encoded`` and the keys of :func:`draw`. Only the crop is decoded.

    Args:
        hw_decoder_load: share of the JPEGs that a GPU's JPEG hardware decodes, where it has some; None: DALI's own.
        options: batch, threads and depth (batches in flight).
    """
    from nvidia.dali.auto_aug.core import select, signed_bin

    fn, types = _dali()

    def source(name: str, kind: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=kind, ndim=ndim)

    def graph() -> Any:
        images = fn.decoders.image_slice(
            source("encoded", types.UINT8, 1),
            rel_start=source("start", types.FLOAT, 1),
            rel_shape=source("extent", types.FLOAT, 1),
            axes=(0, 1),
            **_decoder(device, hw_decoder_load),
        )
        images = fn.resize(images, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.flip(images, horizontal=source("flip", types.INT32, 0))
        if config.rand_augment_ops:
            operation = source("operation", types.INT32, 1)
            magnitude = signed_bin(source("magnitude", types.INT32, 1), source("sign", types.INT32, 1))
            settings = {"num_magnitude_bins": MAGNITUDES, "shape": (size, size), "fill_value": 128}
            for level in range(config.rand_augment_ops):
                images = select(_suite(), operation[level], data=images, magnitude_bin=magnitude[level], **settings)
        elif config.color_jitter:
            images = fn.color_twist(images, **{name: source(name, types.FLOAT, 0) for name in JITTER})
        images = _normalised(images)
        if config.random_erasing:
            start, extent = source("erase_start", types.FLOAT, 1), source("erase_extent", types.FLOAT, 1)
            # 0 is the mean colour.
            images = fn.erase(images, anchor=start, shape=extent, normalized=True, axis_names="HW", fill_value=0.0)
        return images

    return _built(graph, device, **options)


def validation_graph(size: int, *, device: torch.device, hw_decoder_load: float | None = None, **options: int) -> Any:
    """As :func:`training_graph` with the one input ``encoded``: short side to `size`, the middle square."""
    fn, types = _dali()

    def graph() -> Any:
        images = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(images, **_decoder(device, hw_decoder_load))
        images = fn.resize(images, resize_shorter=size, interp_type=types.INTERP_CUBIC, antialias=True)
        return _normalised(images, crop=(size, size))

    return _built(graph, device, depth=1, **options)


def _dali() -> tuple[Any, Any]:
    """DALI's operators and constants, which its annotations leave out."""
    from nvidia.dali import fn, types

    return fn, types


def _decoder(device: torch.device, hw_decoder_load: float | None) -> dict[str, Any]:
    """Arguments of DALI's decoders."""
    return {
        "device": "mixed" if device.type == "cuda" else "cpu",
        "jpeg_fancy_upsampling": True,  # else a GPU's interpolates colours more coarsely than a CPU's
        "hw_decoder_load": hw_decoder_load,
    }


def _normalised(images: Any, **crop: Any) -> Any:
    fn, types = _dali()
    mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, **crop)


def _built(graph: Callable, device: torch.device, *, batch: int, threads: int, depth: int) -> Any:
    from nvidia.dali.pipeline import pipeline_def

    pipeline: Any = pipeline_def(enable_conditionals=True)(graph)(
        batch_size=batch,
        num_threads=threads,
        device_id=device.index,  # None: no GPU
        prefetch_queue_depth=depth,
        # This executor continues after a photo that cannot be decoded; the older one stays in its error.
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


@functools.cache
def _suite() -> list[Any]:
    """Identity, and timm's fifteen "increasing" operations, by DALI."""
    from nvidia.dali import fn
    from nvidia.dali.auto_aug import augmentations, core, rand_augment

    augmentation: Any = core.augmentation

    # DALI's own versions of these two call operators by names it has since deprecated, and warn each time.
    @augmentation(
        mag_range=(0, 0.9), randomly_negate=True, mag_to_param=augmentations.sharpness_kernel, param_device="auto"
    )
    def sharpness(data: Any, kernel: Any) -> Any:
        return fn.filter(data, kernel)

    @augmentation
    def equalize(data: Any, _: Any) -> Any:
        return fn.equalize(data)

    ours = {"sharpness": sharpness, "equalize": equalize}
    usual = [ours.get(a.name, a) for a in rand_augment.get_rand_augment_suite(use_shape=True) if a.name != "identity"]
    return [augmentations.identity, *usual, augmentations.invert, augmentations.solarize_add]
