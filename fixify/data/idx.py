"""MNIST's file format (idx), and Fashion-MNIST where Debian, torchvision or the user put it."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fixify._values import counted
from fixify.data.dataset import OpenedData, Split
from fixify.errors import DataError

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION_FOLDERS = ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "FashionMNIST")
_STEMS: dict[Split, str] = {"train": "train", "val": "t10k", "test": "t10k"}


class ArrayImages:
    """Images held in memory.

    Args:
        pixels: uint8 [num_images, height, width] for gray images, [num_images, height, width, 3] for RGB.
        labels: int64 [num_images].
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ImageSource.load`."""
        return Image.fromarray(self.pixels[index]), int(self.labels[index])

    def where(self, index: int) -> str:
        """See `ImageSource.where`."""
        return f"number {index:,}"

    def listing(self) -> Iterator[bytes]:
        """Identify the images by the hash of all pixels and the hash of all labels."""
        for array in (self.pixels, self.labels.astype("<i8")):
            yield str(array.shape).encode() + hashlib.sha256(array.tobytes()).digest()


def open_idx(folder: Path, split: Split, *, name: str, class_names: tuple[str, ...] | None) -> OpenedData:
    """Open a folder with train-images-idx3-ubyte(.gz), train-labels-..., t10k-images-... and t10k-labels-...

    Args:
        folder: Holds both files of the split; see `has_idx_files`.
        split: "val" and "test" both mean the t10k files.
        name: Data name for the record.
        class_names: Names of the labels. None numbers the classes.

    Raises:
        DataError: a file is missing or damaged, or images and labels do not match.
    """
    images_path, labels_path = _find(folder, split, "images-idx3"), _find(folder, split, "labels-idx1")
    if images_path is None or labels_path is None:
        stem = _STEMS[split]
        raise DataError(f"{folder} has no {stem}-images-idx3-ubyte(.gz) with {stem}-labels-idx1-ubyte(.gz).")
    pixels, labels = read_idx(images_path), read_idx(labels_path).astype(np.int64)
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels) or len(labels) == 0:
        raise DataError(f"{images_path} and {labels_path} do not match: {pixels.shape} and {labels.shape}.")
    if class_names is None:
        # Both splits must have the same classes, so the training labels decide how many there are.
        train_labels = _find(folder, "train", "labels-idx1")
        highest = int((labels if train_labels is None else read_idx(train_labels)).max())
        class_names = tuple(str(label) for label in range(highest + 1))
    if labels.max() >= len(class_names):
        known = counted(len(class_names), "class", "classes")
        raise DataError(f"{labels_path} has label {labels.max()}, but the data has {known}.")
    return OpenedData(
        images=ArrayImages(pixels, labels),
        class_names=class_names,
        location=str(folder),
        description=f"{counted(len(labels), 'image')} of {counted(len(class_names), 'class', 'classes')} from "
        f"{images_path.name}",
        name=name,
        split=split,
    )


def open_fashion_mnist(roots: list[Path], split: Split) -> OpenedData:
    """Open Fashion-MNIST in the first place that has it: the usual folders of each root, then Debian's package.

    Raises:
        DataError: it is in none of the places; the message lists them.
    """
    folders = [root / name for root in roots for name in _FASHION_FOLDERS] + [DEBIAN_FOLDER]
    for folder in folders:
        if has_idx_files(folder, split):
            return open_idx(folder, split, name="fashion-mnist", class_names=FASHION_CLASSES)
    looked = "\n  ".join(str(folder) for folder in folders)
    raise DataError(
        f"Fashion-MNIST was not found. Looked for train-images-idx3-ubyte(.gz) and its three companions in\n  {looked}",
        hint="On Debian: apt install dataset-fashion-mnist. Elsewhere: --data torch/fashion_mnist --download",
    )


def has_idx_files(folder: Path, split: Split) -> bool:
    """Check that the folder has the images and the labels of the split, gzipped or not."""
    return all(_find(folder, split, kind) is not None for kind in ("images-idx3", "labels-idx1"))


def _find(folder: Path, split: Split, kind: str) -> Path | None:
    stem = f"{_STEMS[split]}-{kind}-ubyte"
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read the array of unsigned bytes in an idx file, gzipped or not (http://yann.lecun.com/exdb/mnist).

    Raises:
        DataError: the file is unreadable, is not idx, does not hold unsigned bytes, or is shorter than its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {path}: {error}.", hint="Download or install the file again.") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an idx file of unsigned bytes.")
    num_dimensions = data[3]
    shape = np.frombuffer(data[4 : 4 + 4 * num_dimensions], dtype=">u4").astype(np.int64)
    body = data[4 + 4 * num_dimensions :]
    if len(shape) != num_dimensions or len(body) != int(np.prod(shape)):
        raise DataError(
            f"{path} is damaged: its header says {shape.tolist()}, but it holds {counted(len(body), 'byte')}."
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def write_idx(folder: Path, split: Split, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Write the two files of a split, as `open_idx` reads them.

    Args:
        folder: Where to write.
        split: Whose names the files have.
        pixels: Gray images, [num_images, height, width].
        labels: [num_images].
    """
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
        with (folder / f"{_STEMS[split]}-{kind}-ubyte").open("wb") as file:
            file.write(header)
            array.tofile(file)
