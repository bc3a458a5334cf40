"""Masks of Pascal Context for ``mixreorg evaluate``, from the annotations that the dataset's authors offer.

    python examples/pascal_context.py data/VOCdevkit/VOC2010

The folder holds VOC 2010 (JPEGImages, ImageSets) and, from the authors' trainval.tar.gz, trainval/*.mat. For each
annotated photo of VOC 2010's val (--splits names others) this writes:

- SegmentationClassContext/NAME.png: 59 classes from 1, the rest is 0 (--dataset context and context59);
- annotations_detectron2/pc459_SPLIT/NAME.tif: 459 classes from 0, pixels without a label are 65535 (context459);
- ImageSets/SegmentationContext/SPLIT.txt: the names.

Needs SciPy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

# The 59 frequent labels out of 459, in the order of their classes, as in mmsegmentation's pascal_context.py.
FREQUENT = """2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187 189 207
220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420 424 427 440 445 454 458"""


def convert(home: Path, split: str) -> int:
    """Write masks and list of one split, and return the number of its photos."""
    frequent = np.zeros(460, np.uint8)
    frequent[[int(label) for label in FREQUENT.split()]] = np.arange(1, 60)
    few, all_ = home / "SegmentationClassContext", home / "annotations_detectron2" / f"pc459_{split}"
    lists = home / "ImageSets" / "SegmentationContext"
    for folder in (few, all_, lists):
        folder.mkdir(parents=True, exist_ok=True)
    annotated = {path.stem for path in (home / "trainval").glob("*.mat")}
    listed = (home / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    names = [name for name in listed if name in annotated]
    for name in names:
        labels = scipy.io.loadmat(home / "trainval" / f"{name}.mat")["LabelMap"].astype(np.int64)  # 0: none
        Image.fromarray(frequent[labels]).save(few / f"{name}.png")
        Image.fromarray(np.where(labels == 0, 65535, labels - 1).astype(np.uint16)).save(all_ / f"{name}.tif")
    (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return len(names)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, metavar="VOC2010")
    parser.add_argument("--splits", nargs="+", default=["val"], metavar="SPLIT", help="default: val")
    args = parser.parse_args(argv)
    for split in args.splits:
        print(f"{split}: {convert(args.home, split)} photos")


if __name__ == "__main__":
    main()
