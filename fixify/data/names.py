"""Data names: what may stand behind --data, and where each is looked for."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from fixify.data.class_map import apply_class_map, read_class_map
from fixify.data.folder import find_split, open_folder
from fixify.data.hfds import open_hfds
from fixify.data.idx import FASHION_CLASSES, has_idx_files, open_fashion_mnist, open_idx
from fixify.data.imagenet import open_imagenet
from fixify.data.opened import OpenedData, Split
from fixify.data.options import DataOptions
from fixify.data.separate import check_separate
from fixify.data.torch_names import TORCH_NAMES, open_torch
from fixify.data.wds import open_wds
from fixify.errors import DataError

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
