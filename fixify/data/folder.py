"""Folders of class folders: DATA/train/<class>/*.jpg and DATA/val/<class>/*.jpg."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from fixify.data.classes import natural_order
from fixify.data.opened import OpenedData, Split
from fixify.errors import DataError

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "test"),
    "test": ("test",),
}
_COMPARED_FILES = 200


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
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Pillow's decoders raise SyntaxError and ValueError for files that are damaged inside.
            reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
            raise DataError(
                f"Cannot read the image {path}: {reason}.", hint="Replace the file or move it out of the data folder."
            ) from error
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


def open_folder(root: Path, split: Split, *, name: str | None = None) -> OpenedData:
    """Open one split of a folder that has train/ and val/ (or validation/, test/) with one folder a class.

    A class is a folder directly below the split, with every image at any depth below it. Labels follow the natural
    order of the *training* folder's class names (timm's order) whichever split is opened, so that a class without
    validation images cannot shift the labels behind it.

    Raises:
        DataError: no such split, loose images, an empty class folder, or a class that training does not have.
    """
    root = root.expanduser()
    folder = find_split(root, split)
    if folder is None:
        raise DataError(missing_split(root, split), hint=_LAYOUT)
    train = find_split(root, "train")
    class_names = class_folders(train if train is not None else folder)
    own_names = class_names if folder == train else class_folders(folder)
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
    )


def check_separate(train: OpenedData, val: OpenedData) -> None:
    """Refuse a validation split that is the training split: the same folder, links to it, or a copy of it.

    Looks at up to 200 files spread over the validation split, by device and inode, then by content.

    Raises:
        DataError: they are the same.
    """
    if not (isinstance(train.images, FolderImages) and isinstance(val.images, FolderImages)):
        return
    train_root, val_root = train.images.root.resolve(), val.images.root.resolve()
    same = f"The validation split {val.location} is the training split {train.location}"
    hint = "Accuracy measured there would mean nothing. Hold some images of every class out into val/."
    if train_root == val_root or train_root in val_root.parents or val_root in train_root.parents:
        raise DataError(f"{same} (the same folder).", hint=hint)
    picked = np.unique(np.linspace(0, len(val) - 1, num=min(len(val), _COMPARED_FILES)).astype(int))
    copies = 0
    for index in picked:
        theirs = val.images.path(int(index))
        ours = train.images.root / os.fsdecode(val.images.paths[index])
        if theirs.resolve().is_relative_to(train_root):
            raise DataError(f"{same}: {theirs} is a link into it.", hint=hint)
        if ours.exists():
            if ours.samefile(theirs):
                raise DataError(f"{same}: {theirs} and {ours} are one file.", hint=hint)
            copies += ours.stat().st_size == theirs.stat().st_size and ours.read_bytes() == theirs.read_bytes()
    if copies == len(picked):
        raise DataError(f"{same}: every file compared ({copies}) is a copy.", hint=hint)


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
