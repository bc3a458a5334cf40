"""Segment a photo by class names.

    python examples/segment_photo.py photo.jpg --weights nvidia/groupvit-gcc-yfcc --classes "cat, dog" --out overlay.png

Weights: a folder, a run of your own training, or a name on the Hugging Face hub (docs/weights.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import mixreorg_fast


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Write the overlay; print and return the share of the photo that each class covers."""
    parser = argparse.ArgumentParser(description="Segment a photo by class names.")
    parser.add_argument("photo")
    parser.add_argument("--weights", required=True, metavar="DIR")
    parser.add_argument("--classes", required=True, help='names, such as "cat, dog, sofa"')
    parser.add_argument("--out", default="overlay.png", metavar="FILE")
    options = parser.parse_args(argv)

    model = mixreorg_fast.load(options.weights)
    result = model.segment(options.photo, options.classes)
    result.save(options.out)
    for name, share in result.areas.items():
        print(f"{name}: {share:.1%}")
    return result.areas


if __name__ == "__main__":
    main()
