"""Data names: what may stand behind --data, and where each is looked for."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from fixify.data.folder import check_separate, find_split, open_folder
from fixify.data.idx import FASHION_CLASSES, has_idx_files, open_fashion_mnist, open_idx
from fixify.data.imagenet import open_imagenet
from fixify.data.opened import OpenedData, Split
from fixify.data.torch_names import TORCH_NAMES, open_torch
from fixify.errors import DataError

DATA_NAMES = ("imagenet", "fashion-mnist", "cifar10", "cifar100", *(f"torch/{name}" for name in TORCH_NAMES))


def data_roots() -> list[Path]:
    """Where named data is looked for: $FIXIFY_DATA (several, separated like $PATH), ./data, the current folder."""
    given = [Path(part).expanduser() for part in os.environ.get("FIXIFY_DATA", "").split(os.pathsep) if part]
    return [*given, Path("data"), Path()]


def open_data(name: str, *, split: Split, download: bool = False) -> OpenedData:
    """Open one split of the data that `name` stands for.

    Args:
        name: A folder with train/ and val/, a folder with MNIST's four files, or one of `DATA_NAMES`.
        split: "train", "val" (the folder's val/, valid/, validation/, eval/ or test/) or "test".
        download: Whether `torch/...` names may be downloaded.

    Raises:
        DataError: no such data, no such split, or not laid out as expected.
    """
    folder = Path(name).expanduser()
    if name == "imagenet" and not _is_data_folder(folder, split):
        return open_imagenet(data_roots(), split)
    if name == "imagenet":
        return open_imagenet([folder.parent], split)
    if name in ("fashion-mnist", "fashion_mnist"):
        return open_fashion_mnist(data_roots(), split)
    bare = name.removeprefix("torch/").lower()
    if name.startswith("torch/") and not folder.is_dir():
        if bare not in TORCH_NAMES:
            raise _unknown(name)
        return open_torch(bare, data_roots(), split, download=download)
    if bare in ("cifar10", "cifar100") and not _is_data_folder(folder, split):
        return open_torch(bare, data_roots(), split, download=download)
    if folder.is_dir():
        if has_idx_files(folder, split):
            fashion = any("fashion" in part.lower() for part in folder.resolve().parts[-2:])
            label = "fashion-mnist" if fashion else folder.resolve().name
            return open_idx(folder, split, name=label, class_names=FASHION_CLASSES if fashion else None)
        return open_folder(folder, split)
    if folder.exists():
        raise DataError(
            f"{folder} is a file, not a folder of images.", hint="Give the folder that has train/ and val/."
        )
    raise _unknown(name)


def open_train_val(name: str, *, download: bool = False) -> tuple[OpenedData, OpenedData]:
    """Open both splits; labels mean the same in both, and the validation images are not the training images.

    Raises:
        DataError: as `open_data`, or the validation split is the training split.
    """
    train = open_data(name, split="train", download=download)
    val = open_data(name, split="val", download=download)
    check_separate(train, val)
    return train, val


def _is_data_folder(folder: Path, split: Split) -> bool:
    return folder.is_dir() and find_split(folder, split) is not None


def _unknown(name: str) -> DataError:
    near = difflib.get_close_matches(name.lower(), DATA_NAMES, n=1)
    nearest = f" Did you mean {near[0]!r}?" if near else ""
    return DataError(
        f"There is no folder {name!r}, and no data set of that name.{nearest}",
        hint=f"Give a folder with train/ and val/, or one of: {', '.join(DATA_NAMES)}",
    )
