"""Folders of class folders: DATA/train/<class>/*.jpg and DATA/val/<class>/*.jpg."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from fixify.data.class_matching import in_order, natural_order
from fixify.data.dataset import ClassOrder, OpenedData, Split, decode
from fixify.errors import DataError

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "test"),
    "test": ("test",),
}


class FolderImages:
    """The image files of class folders. Paths are kept as one NumPy array: a million `str` objects would be copied
    into every loader worker, page by page, as their reference counts change."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.root = root
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        path = self.path(index)
        image = decode(path, path, hint="Replace the file or move it out of the data folder.")
        return image, int(self.labels[index])

    def listing(self) -> Iterator[bytes]:
        """Name below the folder, size and label of each file."""
        root = os.fsencode(self.root)
        for name, label in zip(self.paths.tolist(), self.labels.tolist(), strict=True):
            try:
                size = os.stat(os.path.join(root, name)).st_size  # noqa: PTH116, PTH118 (millions)
            except OSError as error:
                raise DataError(f"Cannot read the image {self.root / os.fsdecode(name)}: {error.strerror}.") from error
            yield b"%s\0%d\0%d" % (name, size, label)


def find_split(root: Path, split: Split) -> Path | None:
    """The folder of `root` that holds the split, or None. For "val" the names are tried in order, test/ last."""
    return next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)


def open_folder(
    root: Path, split: Split, *, name: str | None = None, class_order: ClassOrder | None = None
) -> OpenedData:
    """Open one split of a folder that has train/ and val/ (or validation/, test/) with one folder a class.

    A class is a folder directly below the split, with every image at any depth below it. Labels follow the natural
    order of the *training* folder's class names (timm's order; or their lexical one) whichever split is opened, so that
    a class without validation images cannot shift the labels behind it. A folder that is not split, but holds class
    folders itself, does for images to evaluate on.

    Raises:
        DataError: no such split, loose images, an empty class folder, or a class that training does not have.
    """
    root = root.expanduser()
    folder = find_split(root, split)
    if folder is None and split != "train" and _is_unsplit(root):
        folder = root
    if folder is None:
        raise DataError(missing_split(root, split), hint=_LAYOUT)
    train = find_split(root, "train")
    class_names = in_order(class_folders(train if train is not None else folder), class_order)
    own_names = class_folders(folder)
    unknown = [own for own in own_names if own not in set(class_names)]
    if unknown and train is not None:
        raise DataError(
            f"{folder} has {len(unknown)} class folders that {train} has not: {', '.join(unknown[:5])}.",
            hint="Both splits need the same class folder names.",
        )
    paths, labels = scan(folder, own_names, {name: label for label, name in enumerate(class_names)})
    missing = len(class_names) - len(own_names)
    description = f"{len(paths):,} images of {len(class_names):,} classes from {folder.name}/" + (
        f" ({missing} classes have no images there)" if missing else ""
    )
    return OpenedData(
        images=FolderImages(folder, paths, labels),
        class_names=tuple(class_names),
        location=str(folder),
        description=description,
        name=name if name is not None else root.resolve().name,
        split=split,
        order=class_order or "natural",
        assumed=class_order is None,
    )


def _is_unsplit(root: Path) -> bool:
    """Whether the folder holds class folders, and none that is a split."""
    if any((root / name).is_dir() for names in SPLIT_FOLDERS.values() for name in names):
        return False
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")] if root.is_dir() else []
    folders = [entry for entry in entries if entry.is_dir()]
    return bool(folders) and all(any(_is_image(file.name) for file in folder.iterdir()) for folder in folders)


_LAYOUT = (
    "Expected one folder a class in each split: DATA/train/<class>/*.jpg and DATA/val/<class>/*.jpg "
    "(val/ may also be called valid/, validation/, eval/ or test/)."
)


def missing_split(root: Path, split: Split) -> str:
    """The sentence that says what was looked for, and what is there instead."""
    wanted = "/, ".join(SPLIT_FOLDERS[split]) + "/"
    try:
        inside = natural_order([entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(root)])
    except OSError as error:
        return f"Cannot read the folder {root}: {error.strerror}."
    if not inside:
        return f"The folder {root} is empty."
    shown = ", ".join(inside[:5]) + (f" and {len(inside) - 5} more" if len(inside) > 5 else "")
    what = "training" if split == "train" else "validation" if split == "val" else "test"
    return f"{root} has no {what} split (looked for {wanted}); it holds {shown}."


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders of a split, in natural order.

    Raises:
        DataError: there are none, or images beside them.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    if loose:
        raise DataError(
            f"{folder} holds {len(loose):,} images outside of any class folder, for example {loose[0]}.", hint=_LAYOUT
        )
    if not names:
        raise DataError(f"{folder} holds no class folders.", hint=_LAYOUT)
    return natural_order(names)


def images_below(folder: Path, name: str = "") -> list[str]:
    """Image files at any depth below folder/name, relative to the folder, in natural order."""
    found: list[str] = []
    for parent, subfolders, files in os.walk(folder / name, followlinks=True):
        subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith(".")]
        relative = os.path.relpath(parent, folder)
        found += [os.path.join(relative, file) for file in files if _is_image(file)]  # noqa: PTH118 (millions)
    return natural_order(found)


def scan(folder: Path, class_names: Sequence[str], label_of: dict[str, int]) -> tuple[list[str], list[int]]:
    """Image files of the class folders, relative to the folder, and their labels.

    Raises:
        DataError: a class folder has no images.
    """
    paths: list[str] = []
    labels: list[int] = []
    for name in class_names:
        found = images_below(folder, name)
        if not found:
            raise DataError(
                f"The class folder {folder / name} has no images ({', '.join(IMG_EXTENSIONS)}).",
                hint="Remove the folder if it is not a class.",
            )
        paths += found
        labels += [label_of[name]] * len(found)
    return paths, labels


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
