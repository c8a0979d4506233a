"""Folders with one folder per class: DATA/train/<class>/*.jpg and DATA/val/<class>/*.jpg; ImageNet is one of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from fixify._values import counted
from fixify.data.dataset import ClassOrder, OpenedData, Split, natural_order, sort_classes
from fixify.data.decoding import decode
from fixify.errors import DataError

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "test"),
    "test": ("test",),
}
"""Names that each split may have, the preferred one first."""

IMAGENET_FOLDERS = ("imagenet", "ImageNet", "imagenet-1k", "imagenet1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")

_OTHER_SUFFIXES = (
    *(".gif", ".jfif", ".jpe", ".avif", ".avifs", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".apng", ".svg"),
    *(".ico", ".tga", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".dcm"),
)
"""Suffixes of images that are not read, as in timm and torchvision; such files are counted."""

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

    def where(self, index: int) -> str:
        """See `ImageSource.where`."""
        return str(self.path(index))

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
        DataError: no such split, images outside of class folders, a class folder for training without images, no
            images at all, or a class that the training split does not have.
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
            f"{folder} has {counted(len(unknown), 'class folder')} that {train} does not have: "
            f"{', '.join(unknown[:5])}.",
            hint="Both splits need the same class folder names.",
        )
    found = scan(folder, own_names, {name: label for label, name in enumerate(class_names)}, split)
    asides = [*found.asides]
    if missing := len(class_names) - len(own_names) + len(found.empty):
        asides.insert(0, f"{counted(missing, 'class', 'classes')} {'has' if missing == 1 else 'have'} no images there")
    description = (
        f"{counted(len(found.paths), 'image')} of {counted(len(class_names), 'class', 'classes')} from {folder.name}/"
    )
    return OpenedData(
        images=FolderImages(folder, found.paths, found.labels),
        class_names=tuple(class_names),
        location=str(folder),
        description=description + in_brackets(asides),
        name=name if name is not None else root.resolve().name,
        split=split,
        order=class_order or "natural",
        assumed=class_order is None,
        asides=tuple(found.asides),
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
            f"{opened.location} has {counted(opened.num_classes, 'class folder')}, not the 1,000 of ImageNet-1k: "
            f"missing: {len(missing)} (for example {', '.join(missing[:3]) or 'none'}), "
            f"unknown: {len(other)} (for example {', '.join(other[:3]) or 'none'}).",
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
            f"{folder} holds {counted(len(loose), 'image')} outside of class folders, for example {loose[0]}.",
            hint=_LAYOUT,
        )
    if not names:
        raise DataError(f"{folder} holds no class folders.", hint=_LAYOUT)
    return natural_order(names)


@dataclass
class FoundImages:
    """What `images_below` and `scan` find.

    Attributes:
        paths: The image files, relative to the folder, in natural order within a class.
        labels: The label of each; filled by `scan`.
        skipped: How many images of each suffix are there that are not read.
        loops: Links that lead back to a folder above them; they are not followed.
        empty: Class folders without images.
    """

    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    loops: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    @property
    def asides(self) -> list[str]:
        """What a description says about files that were not read.

        >>> FoundImages(skipped=Counter({".gif": 2}), loops=["val/a/loop"]).asides
        ['not read: 2 .gif', 'not followed, because it leads back to a folder above it: val/a/loop']
        """
        found = []
        if self.skipped:
            most_first = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))  # not in the disk's order
            found.append("not read: " + ", ".join(f"{count:,} {suffix}" for suffix, count in most_first))
        if self.loops:
            more = f" and {len(self.loops) - 1:,} more links" if len(self.loops) > 1 else ""
            found.append(f"not followed, because it leads back to a folder above it: {self.loops[0]}{more}")
        return found


def in_brackets(asides: Sequence[str]) -> str:
    """Join remarks for the end of a description; "" if there are none."""
    return f" ({'; '.join(asides)})" if asides else ""


def images_below(folder: Path, name: str = "") -> FoundImages:
    """List the image files at any depth below folder/name.

    Links to folders are followed, unless they lead back to a folder that they are in.

    Raises:
        DataError: a folder cannot be read.
    """
    found = FoundImages()
    start = os.path.join(folder, name)  # noqa: PTH118 (as below)
    # For each folder the real folders that the way to it has passed: that of the last link, and before it those in
    # which a link was taken. A link to one of them, or to a folder above one, would never end.
    passed: dict[str, tuple[str, ...]] = {start: (os.path.realpath(start),)}
    for parent, subfolders, files in os.walk(start, followlinks=True, onerror=_cannot_read):
        relative = os.path.relpath(parent, folder)
        way = passed.pop(parent)
        kept = []
        for subfolder in subfolders:
            if subfolder.startswith("."):
                continue
            path = os.path.join(parent, subfolder)  # noqa: PTH118 (millions of files)
            if not os.path.islink(path):  # noqa: PTH114
                passed[path] = (*way[:-1], os.path.join(way[-1], subfolder))  # noqa: PTH118
            elif _leads_back(target := os.path.realpath(path), way):
                found.loops.append(os.path.join(folder.name, relative, subfolder))  # noqa: PTH118
                continue
            else:
                passed[path] = (*way, target)
            kept.append(subfolder)
        subfolders[:] = kept
        for file in files:
            if _is_image(file):
                found.paths.append(os.path.join(relative, file))  # noqa: PTH118
            elif not file.startswith(".") and file.lower().endswith(_OTHER_SUFFIXES):
                found.skipped[os.path.splitext(file)[1].lower()] += 1  # noqa: PTH122
    found.paths = natural_order(found.paths)
    found.loops.sort()
    return found


def _leads_back(target: str, way: Sequence[str]) -> bool:
    below = target.rstrip(os.sep) + os.sep
    return any(real == target or real.startswith(below) for real in way)


def _cannot_read(error: OSError) -> None:
    raise DataError(f"Cannot read the folder {error.filename}: {error.strerror}.") from error


def scan(folder: Path, class_names: Sequence[str], label_of: dict[str, int], split: Split) -> FoundImages:
    """List the image files of class folders, relative to `folder`, and the label of each.

    Raises:
        DataError: there are no images; or, in training, a class folder has none.
    """
    total = FoundImages()
    for name in class_names:
        found = images_below(folder, name)
        if not found.paths:
            if split == "train":
                raise DataError(
                    f"The class folder {folder / name} has no images ({', '.join(IMG_EXTENSIONS)})"
                    f"{in_brackets(found.asides)}.",
                    hint="Convert them, for example to PNG." if found.skipped else "Remove it if it is not a class.",
                )
            total.empty.append(name)
        total.paths += found.paths
        total.labels += [label_of[name]] * len(found.paths)
        total.skipped += found.skipped
        total.loops += found.loops
    if not total.paths:
        raise DataError(
            f"The class folders of {folder} have no images ({', '.join(IMG_EXTENSIONS)}){in_brackets(total.asides)}."
        )
    return total


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
