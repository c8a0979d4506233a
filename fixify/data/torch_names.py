"""timm's `torch/...` data names: the data sets that torchvision reads and can download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset

from fixify.data.opened import OpenedData, Split
from fixify.errors import DataError

TORCH_NAMES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist")


class TorchImages:
    """A torchvision data set whose items are (PIL image, label)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.asarray(self.dataset.targets, dtype=np.int64)

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return image, int(label)

    def listing(self) -> Iterator[bytes]:
        # All of `TORCH_NAMES` hold their images and labels in memory, as arrays, tensors or lists.
        for held in (self.dataset.data, self.dataset.targets):
            array = np.asarray(held)
            yield str(array.shape).encode() + hashlib.sha256(array.tobytes()).digest()


def open_torch(name: str, roots: Sequence[Path], split: Split, *, download: bool) -> OpenedData:
    """Open "cifar10" and the like from the first root that has it.

    Args:
        name: One of `TORCH_NAMES`.
        roots: Folders to look in; a download goes to the first.
        split: "val" and "test" are both the test images.
        download: Fetch it if no root has it.

    Raises:
        DataError: no root has it, or the download failed.
    """
    for root in roots:
        try:
            dataset = create_dataset(f"torch/{name}", root=str(root), split=_split(split), download=False)
        except RuntimeError:  # torchvision's "Dataset not found or corrupted"
            continue
        return _opened(name, dataset, root, split)
    if not download:
        raise DataError(
            f"torch/{name} is not here; looked in {' and '.join(str(root.resolve()) for root in roots)}.",
            hint="Add --download, or say where it is with FIXIFY_DATA=/folder/that/holds/it",
        )
    try:
        dataset = create_dataset(f"torch/{name}", root=str(roots[0]), split=_split(split), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"Cannot download torch/{name} to {roots[0]}: {error}.") from error
    return _opened(name, dataset, roots[0], split)


def _split(split: Split) -> str:
    return "train" if split == "train" else "validation"


def _opened(name: str, dataset: Any, root: Path, split: Split) -> OpenedData:
    class_names = tuple(str(class_name) for class_name in dataset.classes)
    part = "training" if split == "train" else "test"
    return OpenedData(
        images=TorchImages(dataset),
        class_names=class_names,
        location=str(root),
        description=f"{len(dataset):,} images of {len(class_names)} classes, the {part} part of torch/{name}",
        name=f"torch/{name}",
        split=split,
    )
