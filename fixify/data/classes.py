"""Do the labels of a data set mean what the labels of a checkpoint mean?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fixify.data.opened import OpenedData
from fixify.errors import DataError


def natural_order(names: Sequence[str]) -> list[str]:
    """Folder names in timm's order: digits compare as numbers and case is ignored, so class10 follows class9.

    torchvision sorts the same names lexically (class10 before class2). timm's order leaves names that differ only
    in case in an arbitrary order; here the name itself breaks the tie.
    """
    return sorted(names, key=lambda name: (_natural_key(name), name))


def _natural_key(name: str) -> list[int | str]:
    # `re.split` alternates words and numbers, so that equal positions always compare equal types.
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"(\d+)", name.lower()))]


def check_classes(opened: OpenedData, num_classes: int, stored_class_names: Sequence[str] | None = None) -> None:
    """Refuse data whose labels do not mean what the checkpoint's labels mean.

    Args:
        opened: The data.
        num_classes: Classes of the checkpoint's classifier.
        stored_class_names: Class names in label order as the checkpoint records them, or None if it has none.
            Names of another vocabulary (words in the checkpoint, folder names here) cannot be compared and pass.

    Raises:
        DataError: the number of classes differs, or the same names stand in another order, or some names differ.
    """
    if opened.num_classes != num_classes:
        raise DataError(
            f"The checkpoint has {num_classes} classes and the data at {opened.location} has {opened.num_classes}.",
            hint="Use the data that the checkpoint was trained on, or convert anew for this label set: "
            f"fixify convert SOURCE --num-classes {opened.num_classes}",
        )
    if stored_class_names is None:
        return
    stored, found = list(stored_class_names), list(opened.class_names)
    if stored == found:
        return
    shared = set(stored) & set(found)
    if len(shared) == len(set(stored)) == len(set(found)):
        label = next(i for i, pair in enumerate(zip(stored, found, strict=True)) if pair[0] != pair[1])
        lexical = " (the checkpoint's order is lexical, as torchvision sorts)" if stored == sorted(found) else ""
        raise DataError(
            f"The data has the checkpoint's classes in another order{lexical}: label {label} is "
            f"{stored[label]!r} in the checkpoint and {found[label]!r} here.",
            hint="Rename the class folders so that their natural order is the checkpoint's: "
            "for example zero-padded numbers in front of the names.",
        )
    if shared:
        missing = [name for name in stored if name not in shared]
        extra = [name for name in found if name not in shared]
        raise DataError(
            f"{len(missing)} of the checkpoint's {num_classes} classes are not in the data: {_some(missing)}; "
            f"the data has instead: {_some(extra)}.",
            hint="Use the class folders that the checkpoint was trained on, or convert anew with --num-classes.",
        )


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
