"""Folders with one folder per class: DATA/train/<class>/*.jpg and DATA/val/<class>/*.jpg; ImageNet is one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from fixify.data.dataset import ClassOrder, OpenedData, Split, decode, natural_order, sort_classes
from fixify.errors import DataError

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "test"),
    "test": ("test",),
}
"""Names that each split may have, the preferred one first."""

IMAGENET_FOLDERS = ("imagenet", "ImageNet", "imagenet-1k", "imagenet1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")

_LAYOUT = (
    "Expected one folder per class in each split: DATA/train/<class>/*.jpg and DATA/val/<class>/*.jpg "
    "(val/ may also be called valid/, validation/, eval/ or test/)."
)
_IMAGENET_LAYOUT = (
    "Expected a folder with train/ and val/, each with 1,000 class folders named by synset (n01440764 ... n15075141). "
    "The raw validation archive is flat: move its 50,000 images into class folders first."
)


class FolderImages:
    """Image files with labels.

    The paths are one NumPy array. A list of a million `str` objects would be copied into every loader worker, page by
    page, because reading an object changes its reference count.

    Args:
        root: The folder that the paths are relative to.
        paths: The image files.
        labels: The label of each.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.root = root
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Return the path of image `index`."""
        return self.root / os.fsdecode(self.paths[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ImageSource.load`."""
        path = self.path(index)
        image = decode(path, path, hint="Replace the file or move it out of the data folder.")
        return image, int(self.labels[index])

    def listing(self) -> Iterator[bytes]:
        """Identify each file by its relative path, its size and its label."""
        root = os.fsencode(self.root)
        for name, label in zip(self.paths.tolist(), self.labels.tolist(), strict=True):
            try:
                size = os.stat(os.path.join(root, name)).st_size  # noqa: PTH116, PTH118 (millions of files)
            except OSError as error:
                raise DataError(f"Cannot read the image {self.root / os.fsdecode(name)}: {error.strerror}.") from error
            yield b"%s\0%d\0%d" % (name, size, label)


def open_folder(
    root: Path, split: Split, *, name: str | None = None, class_order: ClassOrder | None = None
) -> OpenedData:
    """Open one split of a folder that has train/ and val/ (or validation/, test/) with one folder per class.

    A class is a folder directly below the split; its images may lie at any depth. Labels follow the sorted class names
    of the *training* folder, whichever split is opened, so that a class without validation images does not shift the
    labels of the classes after it. A folder without splits that holds class folders itself can be evaluated on.

    Args:
        root: The folder.
        split: The split to open.
        name: Data name for the record. None takes the folder's name.
        class_order: How to sort the class names; None means natural order.

    Raises:
        DataError: no such split, images outside of class folders, an empty class folder, or a class that the training
            split does not have.
    """
    root = root.expanduser()
    folder = find_split(root, split)
    if folder is None and split != "train" and _is_unsplit(root):
        folder = root
    if folder is None:
        raise DataError(missing_split(root, split), hint=_LAYOUT)
    train = find_split(root, "train")
    class_names = sort_classes(class_folders(train if train is not None else folder), class_order)
    own_names = class_folders(folder)
    unknown = [own for own in own_names if own not in set(class_names)]
    if unknown and train is not None:
        raise DataError(
            f"{folder} has {len(unknown)} class folders that {train} does not have: {', '.join(unknown[:5])}.",
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


def open_imagenet(roots: list[Path], split: Split) -> OpenedData:
    """Open ImageNet-1k (ILSVRC 2012) in the first place that has the split.

    The labels are those of every ImageNet-1k classifier.

    Args:
        roots: Folders to look in: each root's `IMAGENET_FOLDERS`, then the root itself.
        split: The split to open.

    Raises:
        DataError: it is in none of the places (the message lists them), or the class folders are not the 1,000 synsets.
    """
    folders = [folder for root in roots for folder in (*(root / name for name in IMAGENET_FOLDERS), root)]
    found = next((folder for folder in folders if _looks_like_imagenet(folder, split)), None)
    if found is None:
        looked = "\n  ".join(str(folder) for folder in folders)
        raise DataError(
            f"ImageNet was not found. Looked for {split}/ in\n  {looked}",
            hint=f"{_IMAGENET_LAYOUT} Say where it is: FIXIFY_DATA=/path/to/imagenet, or --data /path/to/imagenet",
        )
    opened = open_folder(found, split, name="imagenet")
    synsets = ImageNetInfo("imagenet-1k").label_names()
    if list(opened.class_names) != list(synsets):
        missing = sorted(set(synsets) - set(opened.class_names))
        other = sorted(set(opened.class_names) - set(synsets))
        raise DataError(
            f"{opened.location} has {opened.num_classes} class folders, not the 1,000 of ImageNet-1k: "
            f"{len(missing)} are missing (for example {', '.join(missing[:3]) or 'none'}), "
            f"{len(other)} are unknown (for example {', '.join(other[:3]) or 'none'}).",
            hint=_IMAGENET_LAYOUT,
        )
    return opened


def _looks_like_imagenet(folder: Path, split: Split) -> bool:
    where = find_split(folder, split) if folder.is_dir() else None
    if where is None:
        return False
    # A root itself (say, the current folder) may have a train/ of something else, so one synset must be there.
    return folder.name in {Path(name).name for name in IMAGENET_FOLDERS} or any(where.glob("n0144*"))


def find_split(root: Path, split: Split) -> Path | None:
    """Return the folder of `root` that holds the split, or None. Names are tried in the order of `SPLIT_NAMES`."""
    return next((root / name for name in SPLIT_NAMES[split] if (root / name).is_dir()), None)


def _is_unsplit(root: Path) -> bool:
    """Check that the folder holds class folders, and none that is a split."""
    if any((root / name).is_dir() for names in SPLIT_NAMES.values() for name in names):
        return False
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")] if root.is_dir() else []
    folders = [entry for entry in entries if entry.is_dir()]
    return bool(folders) and all(any(_is_image(file.name) for file in folder.iterdir()) for folder in folders)


def missing_split(root: Path, split: Split) -> str:
    """Write the message that says which names were looked for and what the folder holds instead."""
    wanted = "/, ".join(SPLIT_NAMES[split]) + "/"
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
    """List the names of a split's class folders in natural order.

    Raises:
        DataError: there are none, or there are images beside them.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    if loose:
        raise DataError(
            f"{folder} holds {len(loose):,} images outside of class folders, for example {loose[0]}.", hint=_LAYOUT
        )
    if not names:
        raise DataError(f"{folder} holds no class folders.", hint=_LAYOUT)
    return natural_order(names)


def images_below(folder: Path, name: str = "") -> list[str]:
    """List the image files at any depth below folder/name, relative to `folder`, in natural order."""
    found: list[str] = []
    for parent, subfolders, files in os.walk(folder / name, followlinks=True):
        subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith(".")]
        relative = os.path.relpath(parent, folder)
        found += [os.path.join(relative, file) for file in files if _is_image(file)]  # noqa: PTH118 (millions of files)
    return natural_order(found)


def scan(folder: Path, class_names: Sequence[str], label_of: dict[str, int]) -> tuple[list[str], list[int]]:
    """List the image files of class folders, relative to `folder`, and the label of each.

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
