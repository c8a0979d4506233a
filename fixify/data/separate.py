"""Is the validation split another one than the training split?"""

from __future__ import annotations

import os

import numpy as np

from fixify.data.folder import FolderImages
from fixify.data.hfds import HfdsImages
from fixify.data.opened import OpenedData
from fixify.data.wds import WdsImages
from fixify.errors import DataError

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
