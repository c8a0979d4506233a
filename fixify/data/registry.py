"""Data names: what `--data` may be, where each name is looked for, and which module reads it."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset

from fixify._values import counted
from fixify.data.class_matching import apply_class_map, read_class_map
from fixify.data.dataset import DataOptions, OpenedData, Split, Subset
from fixify.data.folder import (
    FolderImages,
    class_folders,
    find_split,
    images_below,
    in_brackets,
    missing_split,
    open_folder,
    open_imagenet,
    scan,
)
from fixify.data.hugging_face import HuggingFaceImages, open_hugging_face
from fixify.data.identities import open_identities
from fixify.data.idx import FASHION_CLASSES, has_idx_files, open_fashion_mnist, open_idx
from fixify.data.seeding import Stream, permutation
from fixify.data.webdataset import WebdatasetImages, open_webdataset
from fixify.errors import DataError

TORCHVISION_NAMES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist")
DATA_NAMES = ("imagenet", "fashion-mnist", "cifar10", "cifar100", *(f"torch/{name}" for name in TORCHVISION_NAMES))
_READERS = {"hfds": open_hugging_face, "wds": open_webdataset}  # timm's prefixes of data names
_STREAMS = ("tfds", "hfids")  # timm's prefixes that are refused
_COMPARED_FILES = 200
_HELD_OUT, _MOST_HELD_OUT = 0.1, 5000


def data_roots() -> list[Path]:
    """List the folders to look in for named data.

    These are $FIXIFY_DATA (several folders, separated as in $PATH), ./data and the current folder.
    """
    given = [Path(part).expanduser() for part in os.environ.get("FIXIFY_DATA", "").split(os.pathsep) if part]
    return [*given, Path("data"), Path()]


def open_data(name: str, *, split: Split, download: bool = False, options: DataOptions | None = None) -> OpenedData:
    """Open one split of the data that `name` stands for.

    Args:
        name: A folder with train/ and val/, or one with MNIST's four files, in the current folder or in $FIXIFY_DATA;
            one of `DATA_NAMES`; `hfds/NAME`, a Hugging Face data set; `wds/FOLDER`, webdataset shards; or
            `identities/CLASSES`, see `fixify.data.identities`.
        split: "train", "val" (the folder's val/, valid/, validation/, eval/ or test/) or "test".
        download: Whether `torch/...` names may be downloaded. (`hfds/...` names always are, as in timm.)
        options: How to read the labels.

    Raises:
        DataError: there is no such data or no such split, or it is not laid out as expected.
    """
    options = options or DataOptions()
    return _with_class_map(_open(name, split, download, options), options)


def open_train_val(
    name: str, *, download: bool = False, options: DataOptions | None = None
) -> tuple[OpenedData, OpenedData]:
    """Open both splits; a label means the same in both, and they have no images in common.

    Raises:
        DataError: as `open_data`, or the validation split is the training split.
    """
    options = options or DataOptions()
    train = _open(name, "train", download, options)
    val = _open(name, "val", download, options)
    check_disjoint(train, val)
    return _with_class_map(train, options), _with_class_map(val, options)


def open_unlabelled(
    name: str,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    download: bool = False,
    options: DataOptions | None = None,
) -> tuple[OpenedData, OpenedData]:
    """Open training images whose labels, if there are any, will not be used, and images to validate on.

    For a folder, the training images are all images at any depth below its train/, or below the folder itself if it has
    no splits. Its val/ is labelled if it holds class folders. Without a val/, a tenth of the images is held out, at
    most 5,000.

    Args:
        name: A folder, or a name as for `open_data`.
        class_names: Names of the checkpoint's classes in label order.
        seed: Chooses the images that are held out.
        download: Whether `torch/...` names may be downloaded.
        options: How to read the labels of validation images, where there are any.

    Returns:
        Training and validation data; `labelled` says whether their labels mean anything.

    Raises:
        DataError: there is no such data, there are no images, or the validation images are the training images.
    """
    root = find_folder(name)
    if name in DATA_NAMES or not root.is_dir() or has_idx_files(root, "train"):
        return open_train_val(name, download=download, options=options)
    folder, val_folder = find_split(root, "train"), find_split(root, "val")
    if folder is None and val_folder is not None:
        raise DataError(missing_split(root, "train"), hint="Put the training images into train/. They need no labels.")
    folder = root if folder is None else folder
    train = _open_without_labels(folder, root, class_names)
    if val_folder is None:
        return _hold_out(train, seed)
    val = _open_labelled(val_folder, root, class_names) or _open_without_labels(val_folder, root, class_names)
    check_disjoint(train, val)
    return train, val


def draw_images(name: str, *, count: int, seed: int = 0) -> OpenedData:
    """Draw random images; their labels, if there are any, will not be used.

    They are drawn from all images at any depth below the folder's train/, or below the folder if it has no train/.

    Args:
        name: A folder, or a name as for `open_data`, whose training images are taken.
        count: How many; all, if there are fewer.
        seed: Decides which images, and their order.

    Raises:
        DataError: there is no such data, or there are no images.
    """
    root = find_folder(name)
    if name in DATA_NAMES or not root.is_dir() or has_idx_files(root, "train"):
        data = open_data(name, split="train", options=DataOptions(need_labels=False))
    else:
        data = _open_without_labels(find_split(root, "train") or root, root, ())
    order = permutation(seed, 0, Stream.DRAW, count=len(data))[:count]
    return replace(data, images=Subset(data.images, order.tolist()), labelled=False)


def find_folder(name: str) -> Path:
    """Return the folder of that name, here or in one of `data_roots`; a path that does not exist if there is none."""
    here = Path(name).expanduser()
    return here if here.exists() else next((root / name for root in data_roots() if (root / name).is_dir()), here)


def check_disjoint(train: OpenedData, val: OpenedData) -> None:
    """Check that the training and validation splits do not overlap.

    Folders must not be the same folder, links to each other, or copies: up to 200 files, spread over the validation
    split, are compared by device and inode, then by content. Webdataset splits must have no shard in common, and
    Hugging Face splits must be different tables.

    Raises:
        DataError: they overlap.
    """
    same = f"The validation split {val.location} is the training split {train.location}"
    hint = "Accuracy measured there would mean nothing. Move some images of every class into val/."
    ours, theirs = train.images, val.images
    if isinstance(ours, WebdatasetImages) and isinstance(theirs, WebdatasetImages):
        both = {shard.resolve() for shard in ours.shards} & {shard.resolve() for shard in theirs.shards}
        if both:
            raise DataError(f"{same}: both have the shard {min(both)}.", hint=hint)
    if isinstance(ours, HuggingFaceImages) and ours.is_same(theirs):
        raise DataError(f"{same}: the data set has no splits.", hint=hint)
    if isinstance(ours, FolderImages) and isinstance(theirs, FolderImages):
        _check_disjoint_folders(ours, theirs, same, hint)


def _check_disjoint_folders(train: FolderImages, val: FolderImages, same: str, hint: str) -> None:
    train_root, val_root = train.root.resolve(), val.root.resolve()
    if train_root == val_root or train_root in val_root.parents or val_root in train_root.parents:
        raise DataError(f"{same} (the same folder).", hint=hint)
    picked = np.unique(np.linspace(0, len(val) - 1, num=min(len(val), _COMPARED_FILES)).astype(int))
    copies = 0
    for index in picked:
        theirs = val.path(int(index))
        ours = train.root / os.fsdecode(val.paths[index])
        if theirs.resolve().is_relative_to(train_root):
            raise DataError(f"{same}: {theirs} is a link into it.", hint=hint)
        if ours.is_file() and theirs.is_file():  # a pipe would never be read to its end
            if ours.samefile(theirs):
                raise DataError(f"{same}: {theirs} and {ours} are one file.", hint=hint)
            copies += ours.stat().st_size == theirs.stat().st_size and ours.read_bytes() == theirs.read_bytes()
    if copies == len(picked):
        raise DataError(f"{same}: every file compared ({copies}) is a copy.", hint=hint)


def _with_class_map(opened: OpenedData, options: DataOptions) -> OpenedData:
    return opened if options.class_map is None else apply_class_map(opened, read_class_map(options.class_map))


def _open(name: str, split: Split, download: bool, options: DataOptions) -> OpenedData:
    """Open data without its class map, and refuse options that do not apply to it."""
    opened = _open_by_name(name, split, download, options)
    if options.class_order is not None and opened.order == "own":
        raise DataError(
            f"{opened.name} defines the order of its classes. class_order only sorts the names of class folders.",
            hint="Leave it out, or give another order with --class-map FILE.",
        )
    if (options.input_key or options.target_key) and not name.startswith(("hfds/", "wds/")):
        raise DataError("input_key and target_key are for hfds/... and wds/... data.", hint="Leave them out.")
    return opened


def _open_by_name(name: str, split: Split, download: bool, options: DataOptions) -> OpenedData:
    folder = Path(name).expanduser()
    if name in ("imagenet", "torch/imagenet") and not _is_data_folder(folder, split):
        return open_imagenet(data_roots(), split)
    if name == "imagenet":
        return open_imagenet([folder.parent], split)
    if name in ("fashion-mnist", "fashion_mnist"):
        return open_fashion_mnist(data_roots(), split)
    prefix, _, rest = name.partition("/")
    if rest and not folder.exists():
        if prefix in _STREAMS:
            raise DataError(
                f"{prefix}/ names are not read: they are streams, which cannot be resumed exactly.",
                hint="Use the same data as hfds/..., as wds/... shards, or as a folder.",
            )
        if prefix == "identities":
            return open_identities(rest, split)
        if prefix in _READERS:
            return _READERS[prefix](rest, data_roots(), split, options)
    bare = name.removeprefix("torch/").lower()
    if name.startswith("torch/") and not folder.is_dir():
        if bare not in TORCHVISION_NAMES:
            raise _unknown_name(name)
        return open_torchvision(bare, data_roots(), split, download=download)
    if bare in ("cifar10", "cifar100") and not _is_data_folder(folder, split):
        return open_torchvision(bare, data_roots(), split, download=download)
    folder = find_folder(name)
    if folder.is_dir():
        if has_idx_files(folder, split):
            fashion = any("fashion" in part.lower() for part in folder.resolve().parts[-2:])
            label = "fashion-mnist" if fashion else folder.resolve().name
            return open_idx(folder, split, name=label, class_names=FASHION_CLASSES if fashion else None)
        return open_folder(folder, split, class_order=options.class_order)
    if folder.exists():
        raise DataError(
            f"{folder} is a file, not a folder of images.", hint="Give the folder that has train/ and val/."
        )
    raise _unknown_name(name)


def _is_data_folder(folder: Path, split: Split) -> bool:
    return folder.is_dir() and find_split(folder, split) is not None


def _unknown_name(name: str) -> DataError:
    near = difflib.get_close_matches(name.lower(), DATA_NAMES, n=1)
    nearest = f" Did you mean {near[0]!r}?" if near else ""
    return DataError(
        f"There is no folder {name!r} and no data set of that name.{nearest}",
        hint=f"Give a folder with train/ and val/, or one of: {', '.join(DATA_NAMES)}, hfds/NAME, wds/FOLDER, "
        "identities/CLASSES",
    )


def _open_without_labels(folder: Path, root: Path, class_names: Sequence[str]) -> OpenedData:
    """Open every image below a folder, with label 0."""
    found = images_below(folder)
    if not found.paths:
        raise DataError(
            f"{folder} holds no images{in_brackets(found.asides)}.",
            hint="Give a folder of images, or one with train/ and val/.",
        )
    return OpenedData(
        images=FolderImages(folder, found.paths, [0] * len(found.paths)),
        class_names=tuple(class_names),
        location=str(folder),
        description=f"{counted(len(found.paths), 'image')} without labels from {folder.name}/"
        + in_brackets(found.asides),
        name=root.resolve().name,
        split="train",
        labelled=False,
        asides=tuple(found.asides),
    )


def _open_labelled(folder: Path, root: Path, class_names: Sequence[str]) -> OpenedData | None:
    """Open the validation images if they are in class folders; otherwise return None."""
    if not any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        return None
    folders = class_folders(folder)
    # Use the checkpoint's order if it names the folders, because some classes may have no images here.
    names = list(class_names) if set(folders) <= set(class_names) else folders
    found = scan(folder, folders, {name: label for label, name in enumerate(names)}, "val")
    return OpenedData(
        images=FolderImages(folder, found.paths, found.labels),
        class_names=tuple(names),
        location=str(folder),
        description=f"{counted(len(found.paths), 'image')} of "
        f"{counted(len(folders) - len(found.empty), 'class', 'classes')} from "
        f"{folder.name}/" + in_brackets(found.asides),
        name=root.resolve().name,
        split="val",
    )


def _hold_out(data: OpenedData, seed: int) -> tuple[OpenedData, OpenedData]:
    """Split unlabelled images into training and validation data."""
    if len(data) < 2:
        raise DataError(f"{data.location} holds one image; at least one for training and one for validation is needed.")
    order = permutation(seed, 0, Stream.HOLD_OUT, count=len(data))
    num_held = min(max(1, round(_HELD_OUT * len(data))), _MOST_HELD_OUT)
    folder = Path(data.location).name

    def part(indices: list[int], split: Split, what: str) -> OpenedData:
        description = f"{len(indices):,} {what} from {folder}/"
        return replace(data, images=Subset(data.images, indices), description=description, split=split)

    return (
        part(sorted(order[num_held:].tolist()), "train", "images without labels"),
        part(sorted(order[:num_held].tolist()), "val", "other images"),
    )


class TorchvisionImages:
    """A torchvision data set whose items are (PIL image, label)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of each image, int64 [num_images]."""
        return np.asarray(self.dataset.targets, dtype=np.int64)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ImageSource.load`."""
        image, label = self.dataset[index]
        return image, int(label)

    def where(self, index: int) -> str:
        """See `ImageSource.where`."""
        return f"number {index:,}"

    def listing(self) -> Iterator[bytes]:
        """Identify the images by the hash of all pixels and the hash of all labels."""
        # All of `TORCHVISION_NAMES` hold their images and labels in memory, as arrays, tensors or lists.
        for held in (self.dataset.data, self.dataset.targets):
            array = np.asarray(held)
            yield str(array.shape).encode() + hashlib.sha256(array.tobytes()).digest()


def open_torchvision(name: str, roots: Sequence[Path], split: Split, *, download: bool) -> OpenedData:
    """Open a data set that torchvision reads (timm's `torch/...`) in the first root that has it.

    Args:
        name: One of `TORCHVISION_NAMES`.
        roots: Folders to look in. A download goes to the first.
        split: "val" and "test" both mean the test images.
        download: Whether to download it if no root has it.

    Raises:
        DataError: no root has it, or the download failed.
    """
    part = "train" if split == "train" else "validation"
    for root in roots:
        try:
            dataset = create_dataset(f"torch/{name}", root=str(root), split=part, download=False)
        except RuntimeError:  # torchvision's "Dataset not found or corrupted"
            continue
        return _opened_torchvision(name, dataset, root, split)
    if not download:
        raise DataError(
            f"torch/{name} was not found. Looked in {' and '.join(str(root.resolve()) for root in roots)}.",
            hint="Add --download, or say where it is: FIXIFY_DATA=/folder/that/holds/it",
        )
    try:
        dataset = create_dataset(f"torch/{name}", root=str(roots[0]), split=part, download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"Cannot download torch/{name} to {roots[0]}: {error}.") from error
    return _opened_torchvision(name, dataset, roots[0], split)


def _opened_torchvision(name: str, dataset: Any, root: Path, split: Split) -> OpenedData:
    class_names = tuple(str(class_name) for class_name in dataset.classes)
    part = "training" if split == "train" else "test"
    return OpenedData(
        images=TorchvisionImages(dataset),
        class_names=class_names,
        location=str(root),
        description=f"{counted(len(dataset), 'image')} of {counted(len(class_names), 'class', 'classes')}, the {part} "
        f"split of torch/{name}",
        name=f"torch/{name}",
        split=split,
    )
