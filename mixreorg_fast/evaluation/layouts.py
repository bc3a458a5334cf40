"""The folder layouts of VOC 2012, Pascal Context, COCO, ADE20K and Cityscapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from . import classes as names
from .metrics import IGNORE


@dataclass(frozen=True)
class Layout:
    """Where a benchmark keeps its files, and what its mask values mean.

    ``{split}`` in a folder stands for the split's folder; names of photos and masks are a stem plus a suffix, and a
    stem may hold sub-folders. `remap` turns raw mask values (index) into class ids (value).
    """

    classes: tuple[str, ...]
    images: str = "images/{split}"
    masks: str = "annotations/{split}"
    split_file: str | None = None  # None: every photo of the folder belongs to the split
    homes: tuple[str, ...] = ("",)  # where, under the root, the dataset may start
    image_suffixes: tuple[str, ...] = (".jpg",)
    mask_suffixes: Mapping[str, np.ndarray | None] = field(default_factory=lambda: {".png": None})
    threshold: float | None = None
    split_folders: dict[str, str] = field(default_factory=dict)
    setup: str = ""  # for errors: how to get masks that need a conversion
    class_file: str | None = None  # names the classes, where no list here does
    class_count: int = 0  # in the class file


def _remap(raw: Sequence[int]) -> np.ndarray:
    """The raw ids listed are classes 0, 1, ...; every other value is ignored."""
    remap = np.full(256, IGNORE, dtype=np.uint8)
    remap[raw] = np.arange(len(raw))
    return remap


# COCO's 91 + 91 raw ids (pixel value = category - 1) without the eleven categories that never occur.
_STUFF_IDS = [i for i in range(182) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
# COCO-Object has the things, raw ids up to 89, as classes 1 to 80. All else is background, as in GroupViT's protocol.
_OBJECT = _remap([i for i in _STUFF_IDS if i < 91]) + np.uint8(1)  # IGNORE wraps around to 0
# The labels of the Cityscapes scripts that are scored.
_CITY_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]

_VOC = Layout(
    names.VOC,
    images="JPEGImages",
    masks="SegmentationClass",
    split_file="ImageSets/Segmentation/{split}.txt",
    homes=("", "VOC2012", "VOCdevkit/VOC2012"),
    threshold=0.95,
)
_CONTEXT = Layout(
    names.CONTEXT,
    images="JPEGImages",
    masks="SegmentationClassContext",
    split_file="ImageSets/SegmentationContext/{split}.txt",
    homes=("", "VOC2010", "VOCdevkit/VOC2010"),
    threshold=0.35,
    setup=" (examples/pascal_context.py makes them from the dataset's .mat files)",
)
_NO_BACKGROUND = {".png": _remap(range(1, 255))}  # 0 is ignored

LAYOUTS: dict[str, Layout] = {
    "voc2012": _VOC,
    "voc20": replace(_VOC, classes=names.VOC[1:], mask_suffixes=_NO_BACKGROUND),
    "context": _CONTEXT,
    "context59": replace(_CONTEXT, classes=names.CONTEXT[1:], mask_suffixes=_NO_BACKGROUND),
    "context459": replace(
        _CONTEXT,
        classes=(),
        masks="annotations_detectron2/pc459_{split}",
        mask_suffixes={".tif": None},
        class_file="labels.txt",
        class_count=459,
    ),
    "coco_object": Layout(
        names.COCO_OBJECT,
        mask_suffixes={"_instanceTrainIds.png": None, ".png": _OBJECT},
        threshold=0.95,
        split_folders={"val": "val2017", "train": "train2017"},
        homes=("", "coco"),
    ),
    "coco_stuff": Layout(
        names.COCO_STUFF,
        mask_suffixes={"_labelTrainIds.png": None, ".png": _remap(_STUFF_IDS)},
        split_folders={"val": "val2017", "train": "train2017"},
        homes=("", "coco_stuff164k", "coco"),
    ),
    "ade20k": Layout(
        names.ADE20K,
        mask_suffixes=_NO_BACKGROUND,
        split_folders={"val": "validation", "train": "training"},
        homes=("", "ADEChallengeData2016", "ade/ADEChallengeData2016"),
    ),
    "ade847": Layout(
        (),
        images="images_detectron2/{split}",
        masks="annotations_detectron2/{split}",
        mask_suffixes={".tif": None},
        split_folders={"val": "validation", "train": "training"},
        homes=("", "ADE20K_2021_17_01"),
        setup=" (MaskFormer's datasets/prepare_ade20k_full_sem_seg.py makes them)",
        class_file="classes.txt",
        class_count=847,
    ),
    "cityscapes": Layout(
        names.CITYSCAPES,
        images="leftImg8bit/{split}",
        masks="gtFine/{split}",
        image_suffixes=("_leftImg8bit.png",),
        mask_suffixes={"_gtFine_labelTrainIds.png": None, "_gtFine_labelIds.png": _remap(_CITY_IDS)},
        homes=("", "cityscapes"),
    ),
}
