"""Images without labels: any folder of images, for training on another model's answers and for calibrating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fixify.data.folder import (
    FolderImages,
    class_folders,
    find_split,
    images_below,
    missing_split,
    scan,
)
from fixify.data.idx import has_idx_files
from fixify.data.names import DATA_NAMES, find_folder, open_data, open_train_val
from fixify.data.opened import OpenedData, Subset
from fixify.data.options import DataOptions
from fixify.data.seeding import Stream, permutation
from fixify.data.separate import check_separate
from fixify.errors import DataError

_HELD_OUT, _MOST_HELD_OUT = 0.1, 5000


def open_unlabelled(
    name: str,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    download: bool = False,
    options: DataOptions | None = None,
) -> tuple[OpenedData, OpenedData]:
    """Open training images whose labels, if there are any, will not be used, and images to validate on.

    Of a folder, every image at any depth below its train/ is taken, or below the folder itself if it is not split.
    Its val/ is labelled if it holds class folders. Without a val/ a tenth of the images is held out, at most 5,000.

    Args:
        name: A folder, or a name as for `open_data`.
        class_names: Names of the checkpoint's classes in label order.
        seed: Chooses the images that are held out.
        download: Whether `torch/...` names may be downloaded.
        options: How the labels of validation images are read, where there are some.

    Returns:
        Training and validation data; `labelled` says which has labels that mean something.

    Raises:
        DataError: no such data, no images, or validation images that are the training images.
    """
    root = find_folder(name)
    if name in DATA_NAMES or not root.is_dir() or has_idx_files(root, "train"):
        return open_train_val(name, download=download, options=options)
    folder, val_folder = find_split(root, "train"), find_split(root, "val")
    if folder is None and val_folder is not None:
        raise DataError(
            missing_split(root, "train"), hint="Put the images to train on into train/; they need no labels."
        )
    folder = root if folder is None else folder
    train = _without_labels(folder, root, class_names)
    if val_folder is None:
        return _held_out(train, seed)
    val = _labelled(val_folder, root, class_names) or _without_labels(val_folder, root, class_names)
    check_separate(train, val)
    return train, val


def draw_images(name: str, *, count: int, seed: int = 0) -> OpenedData:
    """Draw some images, whatever they show: labels, if there are any, will not be used.

    Of a folder with train/ every image at any depth below that, of another folder every image below it.

    Args:
        name: A folder, or a name as for `open_data`, whose training images are taken.
        count: How many; all, if there are fewer.
        seed: Which, and in which order.

    Raises:
        DataError: no such data, or no images.
    """
    root = find_folder(name)
    if name in DATA_NAMES or not root.is_dir() or has_idx_files(root, "train"):
        data = open_data(name, split="train", options=DataOptions(need_labels=False))
    else:
        data = _without_labels(find_split(root, "train") or root, root, ())
    order = permutation(seed, 0, Stream.DRAW, count=len(data))[:count]
    return replace(data, images=Subset(data.images, order.tolist()), labelled=False)


def _without_labels(folder: Path, root: Path, class_names: Sequence[str]) -> OpenedData:
    paths = images_below(folder)
    if not paths:
        raise DataError(f"{folder} holds no images.", hint="Give a folder of images, or one with train/ and val/.")
    return OpenedData(
        images=FolderImages(folder, paths, [0] * len(paths)),
        class_names=tuple(class_names),
        location=str(folder),
        description=f"{len(paths):,} images without labels from {folder.name}/",
        name=root.resolve().name,
        split="train",
        labelled=False,
    )


def _labelled(folder: Path, root: Path, class_names: Sequence[str]) -> OpenedData | None:
    """The validation images, if they are in class folders."""
    if not any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        return None
    found = class_folders(folder)
    # The checkpoint's order where its names are the folders', as some classes may have no images here.
    names = list(class_names) if set(found) <= set(class_names) else found
    paths, labels = scan(folder, found, {name: label for label, name in enumerate(names)})
    return OpenedData(
        images=FolderImages(folder, paths, labels),
        class_names=tuple(names),
        location=str(folder),
        description=f"{len(paths):,} images of {len(found):,} classes from {folder.name}/",
        name=root.resolve().name,
        split="val",
    )


def _held_out(data: OpenedData, seed: int) -> tuple[OpenedData, OpenedData]:
    if len(data) < 2:
        raise DataError(f"{data.location} holds one image; some are needed for training and some for validation.")
    order = permutation(seed, 0, Stream.HOLD_OUT, count=len(data))
    held = min(max(1, round(_HELD_OUT * len(data))), _MOST_HELD_OUT)
    folder = Path(data.location).name
    parts = []
    for indices, split, text in (
        (sorted(order[held:].tolist()), "train", f"images without labels from {folder}/"),
        (sorted(order[:held].tolist()), "val", f"other images from {folder}/"),
    ):
        description = f"{len(indices):,} {text}"
        parts.append(
            OpenedData(
                images=Subset(data.images, indices),
                class_names=data.class_names,
                location=data.location,
                description=description,
                name=data.name,
                split=split,  # type: ignore[arg-type]
                labelled=False,
            )
        )
    return parts[0], parts[1]
