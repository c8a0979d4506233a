"""Write scikit-learn's handwritten digits as a folder of images, for the recipe digits-resnet20.

    python tests/benchmarks/digits.py digits

1,797 gray images of 8 x 8 by 43 people, the test set of UCI's "Optical recognition of handwritten digits". They are in
the order of writing, so the last 360, the validation set, are mostly by other people. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_VAL = 360


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = folder / ("val" if number >= len(labels) - NUM_VAL else "train") / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    train = pixels[:-NUM_VAL] / 255
    print(f"{folder}: {len(train)} and {NUM_VAL} images; mean {train.mean():.3f}, std {train.std():.3f}")


if __name__ == "__main__":
    main()
