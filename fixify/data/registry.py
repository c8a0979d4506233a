"""ImageNet-1k (ILSVRC 2012) in class folders, wherever people keep it."""

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
from timm.data import ImageNetInfo, create_dataset

from fixify.data.class_matching import apply_class_map, read_class_map
from fixify.data.dataset import DataOptions, OpenedData, Split, Subset
from fixify.data.folder import FolderImages, class_folders, find_split, images_below, missing_split, open_folder, scan
from fixify.data.hf import HfdsImages, open_hfds
from fixify.data.idx import FASHION_CLASSES, has_idx_files, open_fashion_mnist, open_idx
from fixify.data.seeding import Stream, permutation
from fixify.data.webdataset import WdsImages, open_wds
from fixify.errors import DataError

FOLDER_NAMES = ("imagenet", "ImageNet", "imagenet-1k", "imagenet1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
_EXPECTED = (
    "Expected a folder with train/ and val/, each with 1,000 class folders named by synset (n01440764 ... n15075141). "
    "The raw validation archive is flat: its 50,000 images have to be moved into class folders first."
)


def imagenet_folders(roots: list[Path]) -> list[Path]:
    """Every folder in which ImageNet is looked for, in order: each root's well-known names, then the root itself."""
    return [folder for root in roots for folder in (*(root / name for name in FOLDER_NAMES), root)]


def open_imagenet(roots: list[Path], split: Split) -> OpenedData:
    """ImageNet-1k from the first place that has the split; its labels are those of every ImageNet-1k classifier.

    Raises:
        DataError: nowhere (the message lists every place), or class folders that are not the 1,000 synsets.
    """
    folders = imagenet_folders(roots)
    found = next((folder for folder in folders if _looks_like_imagenet(folder, split)), None)
    if found is None:
        looked = "\n  ".join(str(folder) for folder in folders)
        raise DataError(
            f"ImageNet is not here. Looked for {split}/ in\n  {looked}",
            hint=f"{_EXPECTED} Say where it is: FIXIFY_DATA=/path/to/imagenet, or --data /path/to/imagenet",
        )
    opened = open_folder(found, split, name="imagenet")
    synsets = ImageNetInfo("imagenet-1k").label_names()
    if list(opened.class_names) != list(synsets):
        missing = sorted(set(synsets) - set(opened.class_names))
        other = sorted(set(opened.class_names) - set(synsets))
        raise DataError(
            f"{opened.location} has {opened.num_classes} class folders, not ImageNet-1k's 1,000: "
            f"{len(missing)} are missing (for example {', '.join(missing[:3]) or 'none'}), "
            f"{len(other)} are not of ImageNet-1k (for example {', '.join(other[:3]) or 'none'}).",
            hint=_EXPECTED,
        )
    return opened


def _looks_like_imagenet(folder: Path, split: Split) -> bool:
    # A root itself (the current folder, say) may have a train/ of something else: one synset has to be there.
    where = find_split(folder, split) if folder.is_dir() else None
    if where is None:
        return False
    return folder.name in {Path(name).name for name in FOLDER_NAMES} or any(where.glob("n0144*"))


# timm's `torch/...` data names: the data sets that torchvision reads and can download.


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


# Is the validation split another one than the training split?


_COMPARED_FILES = 200


def check_separate(train: OpenedData, val: OpenedData) -> None:
    """Refuse a validation split that is the training split: the same folder, links to it, or a copy of it; the same
    shards, or the same table.

    Of folders it looks at up to 200 files spread over the validation split, by device and inode, then by content.

    Raises:
        DataError: they are the same.
    """
    same = f"The validation split {val.location} is the training split {train.location}"
    hint = "Accuracy measured there would mean nothing. Hold some images of every class out into val/."
    ours, theirs = train.images, val.images
    if isinstance(ours, WdsImages) and isinstance(theirs, WdsImages):
        both = {shard.resolve() for shard in ours.shards} & {shard.resolve() for shard in theirs.shards}
        if both:
            raise DataError(f"{same}: both have the shard {min(both)}.", hint=hint)
    if isinstance(ours, HfdsImages) and isinstance(theirs, HfdsImages) and ours.fingerprint == theirs.fingerprint:
        raise DataError(f"{same}: it has no parts.", hint=hint)
    if isinstance(ours, FolderImages) and isinstance(theirs, FolderImages):
        _check_folders(ours, theirs, same, hint)


def _check_folders(train: FolderImages, val: FolderImages, same: str, hint: str) -> None:
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
        if ours.exists():
            if ours.samefile(theirs):
                raise DataError(f"{same}: {theirs} and {ours} are one file.", hint=hint)
            copies += ours.stat().st_size == theirs.stat().st_size and ours.read_bytes() == theirs.read_bytes()
    if copies == len(picked):
        raise DataError(f"{same}: every file compared ({copies}) is a copy.", hint=hint)


# Data names: what may stand behind --data, and where each is looked for.


READERS = ("hfds", "wds", "tfds", "hfids")
"""timm's prefixes of data names; the last two are refused with what to do instead."""
DATA_NAMES = ("imagenet", "fashion-mnist", "cifar10", "cifar100", *(f"torch/{name}" for name in TORCH_NAMES))


def data_roots() -> list[Path]:
    """Where named data is looked for: $FIXIFY_DATA (several, separated like $PATH), ./data, the current folder."""
    given = [Path(part).expanduser() for part in os.environ.get("FIXIFY_DATA", "").split(os.pathsep) if part]
    return [*given, Path("data"), Path()]


def open_data(name: str, *, split: Split, download: bool = False, options: DataOptions | None = None) -> OpenedData:
    """Open one split of the data that `name` stands for.

    Args:
        name: A folder with train/ and val/, or one with MNIST's four files, here or in $FIXIFY_DATA; one of
            `DATA_NAMES`; `hfds/NAME`, a Hugging Face data set; or `wds/FOLDER`, webdataset shards.
        split: "train", "val" (the folder's val/, valid/, validation/, eval/ or test/) or "test".
        download: Whether `torch/...` names may be downloaded. (`hfds/...` names always are, as in timm.)
        options: How labels are read.

    Raises:
        DataError: no such data, no such split, or not laid out as expected.
    """
    options = options or DataOptions()
    return _mapped(_open(name, split, download, options), options)


def open_train_val(
    name: str, *, download: bool = False, options: DataOptions | None = None
) -> tuple[OpenedData, OpenedData]:
    """Open both splits; labels mean the same in both, and the validation images are not the training images.

    Raises:
        DataError: as `open_data`, or the validation split is the training split.
    """
    options = options or DataOptions()
    train = _open(name, "train", download, options)
    val = _open(name, "val", download, options)
    check_separate(train, val)
    return _mapped(train, options), _mapped(val, options)


def _mapped(opened: OpenedData, options: DataOptions) -> OpenedData:
    return opened if options.class_map is None else apply_class_map(opened, read_class_map(options.class_map))


def _open(name: str, split: Split, download: bool, options: DataOptions) -> OpenedData:
    opened = _open_named(name, split, download, options)
    if options.class_order is not None and opened.order == "own":
        raise DataError(
            f"{opened.name} has an order of classes of its own; class_order sorts the names of class folders.",
            hint="Leave it out, or give another order with --class-map FILE.",
        )
    if (options.input_key or options.target_key) and not name.startswith(("hfds/", "wds/")):
        raise DataError("input_key and target_key are for hfds/... and wds/... data.", hint="Leave them out.")
    return opened


def _open_named(name: str, split: Split, download: bool, options: DataOptions) -> OpenedData:
    folder = Path(name).expanduser()
    if name in ("imagenet", "torch/imagenet") and not _is_data_folder(folder, split):
        return open_imagenet(data_roots(), split)
    if name == "imagenet":
        return open_imagenet([folder.parent], split)
    if name in ("fashion-mnist", "fashion_mnist"):
        return open_fashion_mnist(data_roots(), split)
    prefix, slash, rest = name.partition("/")
    if slash and rest and prefix in READERS and not folder.exists():
        if prefix in ("tfds", "hfids"):
            raise DataError(
                f"{prefix}/ names are not read: their order is that of a stream, which cannot be continued exactly.",
                hint="Take the same data as hfds/..., as wds/... shards, or as a folder.",
            )
        return (open_hfds if prefix == "hfds" else open_wds)(rest, data_roots(), split, options)
    bare = name.removeprefix("torch/").lower()
    if name.startswith("torch/") and not folder.is_dir():
        if bare not in TORCH_NAMES:
            raise _unknown(name)
        return open_torch(bare, data_roots(), split, download=download)
    if bare in ("cifar10", "cifar100") and not _is_data_folder(folder, split):
        return open_torch(bare, data_roots(), split, download=download)
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
    raise _unknown(name)


def find_folder(name: str) -> Path:
    """The folder of that name, here or in one of `data_roots`; a path that does not exist if there is none."""
    here = Path(name).expanduser()
    return here if here.exists() else next((root / name for root in data_roots() if (root / name).is_dir()), here)


def _is_data_folder(folder: Path, split: Split) -> bool:
    return folder.is_dir() and find_split(folder, split) is not None


def _unknown(name: str) -> DataError:
    near = difflib.get_close_matches(name.lower(), DATA_NAMES, n=1)
    nearest = f" Did you mean {near[0]!r}?" if near else ""
    return DataError(
        f"There is no folder {name!r}, and no data set of that name.{nearest}",
        hint=f"Give a folder with train/ and val/, or one of: {', '.join(DATA_NAMES)}, hfds/NAME, wds/FOLDER",
    )


# Images without labels: any folder of images, for training on another model's answers and for calibrating.


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
