"""Give the labels of a data set the meaning that a checkpoint's labels have.

`match_classes` matches by class name, wherever both sides have names. `apply_class_map` follows a file in which the
user says which class has which label.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset

from fixify._values import counted
from fixify.checkpoints.labels import read_class_indices
from fixify.data.dataset import OpenedData, Relabelled, Subset, sort_classes
from fixify.errors import DataError, SourceError

_MANY_CLASSES = 100  # from this number of classes, a few may have other names and are taken for other spellings
_RENAMED = 10  # fewer than one class in 10


@dataclass(frozen=True)
class Matched:
    """Data whose labels are those of a checkpoint.

    Attributes:
        data: The data with the checkpoint's labels, and with its class names if it has some.
        label_of: The checkpoint's label of each label of the original data.
        note: What the user should know about how labels were matched; None if there is no doubt.
    """

    data: OpenedData
    label_of: tuple[int, ...]
    note: str | None

    @property
    def moved(self) -> bool:
        """Whether any label has changed."""
        return self.label_of != tuple(range(len(self.label_of)))


def match_classes(
    opened: OpenedData,
    num_classes: int,
    *stored: Sequence[str] | None,
    subset: bool = False,
) -> Matched:
    """Give data the labels of a checkpoint, by the names of the classes.

    Args:
        opened: The data.
        num_classes: Number of classes of the checkpoint's classifier.
        stored: Vocabularies of the checkpoint: names of its classes in label order, or None. If there are several
            (folder names, descriptions), the first one that has the data's names is used. A checkpoint without
            other names, and with as many classes as a version of ImageNet, gets that version's synsets and
            descriptions.
        subset: Whether the data may lack some of the checkpoint's classes. Class names that are numbers are then the
            checkpoint's labels.

    Raises:
        DataError: only some of the names are the checkpoint's; the names cannot be compared and the numbers of classes
            differ; or the class order that was asked for, or a class map, contradicts the checkpoint's names.
    """
    vocabularies = _vocabularies(num_classes, stored)
    found = opened.class_names
    if opened.order == "map":
        return _match_by_map(opened, num_classes, vocabularies)
    for names in vocabularies:
        if found == names:
            return _matched(opened, range(len(found)), names)
        label_of = _unique_labels(names)
        if set(found) <= label_of.keys():
            labels = [label_of[name] for name in found]
            if len(found) < num_classes and not subset:
                raise _classes_missing(opened, names)
            if opened.order != "own" and not opened.assumed and labels != sorted(labels):
                raise _contradiction(opened, names, f"--class-order {opened.order}")
            return _matched(opened, labels, names, _note_by_name(labels, opened, num_classes))
    given = [tuple(names) for names in stored if names is not None]  # without the vocabularies that are only assumed
    numbers = _names_as_labels(found, num_classes)
    for names in given:
        if _same_but_for_spelling(found, names):
            label = _first_difference(found, names)
            note = f"some class names differ from the checkpoint's: {found[label]!r}, not {names[label]!r}"
            return _matched(opened, range(len(found)), names, note)
        if set(found) & set(names) and not numbers:
            raise _names_differ(opened, names)
    if len(found) < num_classes and numbers and subset:
        names = vocabularies[0] if vocabularies else tuple(map(str, range(num_classes)))
        note = f"{len(found):,} of the checkpoint's {counted(num_classes, 'class', 'classes')}"
        note += "; the class names are its labels"
        return _matched(opened, numbers, names, note)
    if len(found) != num_classes:
        raise DataError(
            f"The checkpoint has {counted(num_classes, 'class', 'classes')} and the data at {opened.location} has "
            f"{len(found)}.",
            hint="Use the data that the checkpoint was trained on, or give a --class-map FILE."
            # A classifier of one class is refused: it has nothing to tell apart.
            + (
                f" To convert again for this label set: fixify convert SOURCE --num-classes {len(found)}"
                if len(found) > 1
                else ""
            ),
        )
    return _matched(opened, range(num_classes), found, _note_by_order(opened, given))


def check_classes(opened: OpenedData, num_classes: int, *stored: Sequence[str] | None) -> None:
    """Check that the data's labels, as they are, mean what a checkpoint's labels mean; see `match_classes`.

    Raises:
        DataError: as `match_classes`, or the same names are in another order.
    """
    matched = match_classes(opened, num_classes, *stored)
    if matched.moved:
        label = next(label for label, other in enumerate(matched.label_of) if label != other)
        raise DataError(
            f"The classes are in another order: label {label} is {matched.data.class_names[label]!r} in the checkpoint "
            f"and {opened.class_names[label]!r} in the data.",
            hint="Both must give a class the same label.",
        )


def read_class_map(path: str | Path) -> dict[str, int]:
    """Read which class has which label from a file, as `fixify.checkpoints.labels.read_class_indices` does.

    Raises:
        DataError: the file cannot be read, or is not a class map.
    """
    try:
        return read_class_indices(Path(path))
    except SourceError as error:
        raise DataError(error.message, hint=error.hint) from error


def apply_class_map(opened: OpenedData, labels: Mapping[str, int]) -> OpenedData:
    """Give data the labels of a class map; as in timm, images of classes that it does not name are left out.

    Args:
        opened: The data.
        labels: Label of each class name.

    Raises:
        DataError: the class map names none of the data's classes.
    """
    known = [name in labels for name in opened.class_names]
    if not any(known):
        raise DataError(
            f"The class map names none of the classes of {opened.location}. The class map has {next(iter(labels))!r} "
            f"..., the data has {opened.class_names[0]!r} ...",
            hint="A class map has the names of the class folders: one per line in label order, or with their labels.",
        )
    names = [f"label {label}" for label in range(max(labels.values()) + 1)]
    for name, label in labels.items():
        names[label] = name
    images, description = opened.images, opened.description
    if not all(known):
        kept = np.flatnonzero(np.array(known)[cast(Any, images).labels])
        images = Subset(images, kept.tolist())
        description = (
            f"{counted(len(kept), 'image')} of {counted(sum(known), 'class', 'classes')} that the class map names, "
            f"out of {description} (left out: {counted(known.count(False), 'class', 'classes')})"
        )
    label_of = np.array([labels.get(name, -1) for name in opened.class_names], dtype=np.int64)
    return replace(
        opened,
        images=Relabelled(images, label_of),
        class_names=tuple(names),
        description=description,
        order="map",
        assumed=False,
    )


def _match_by_map(opened: OpenedData, num_classes: int, vocabularies: Sequence[tuple[str, ...]]) -> Matched:
    """Keep the labels of a class map, which takes precedence unless it contradicts the checkpoint's class names."""
    found = opened.class_names
    if len(found) > num_classes:
        classes = counted(num_classes, "class", "classes")
        raise DataError(f"The class map has label {len(found) - 1}, but the checkpoint has {classes}.")
    for names in vocabularies:
        label_of = _unique_labels(names)
        if any(label_of.get(name, label) != label for label, name in enumerate(found)):
            raise _contradiction(opened, names, "the class map")
    names = vocabularies[0] if vocabularies else (*found, *map(str, range(len(found), num_classes)))
    return _matched(opened, range(len(found)), names)


def _matched(opened: OpenedData, labels: Iterable[int], names: Sequence[str], note: str | None = None) -> Matched:
    label_of = tuple(labels)
    images = opened.images
    if label_of != tuple(range(len(label_of))):
        images = Relabelled(images, np.array(label_of, dtype=np.int64))
    description = opened.description if note is None else f"{opened.description}; {note}"
    data = replace(opened, images=images, class_names=tuple(names), description=description)
    return Matched(data, label_of, note)


def _vocabularies(num_classes: int, stored: Iterable[Sequence[str] | None]) -> list[tuple[str, ...]]:
    known = [tuple(names) for names in stored if names is not None and len(names) == num_classes]
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is not None:
        info = ImageNetInfo(subset)
        imagenet = [tuple(info.label_names()), tuple(info.label_descriptions())]
        if all(names in imagenet for names in known):
            known += [names for names in imagenet if names not in known]
    return known


def _unique_labels(names: Sequence[str]) -> dict[str, int]:
    """Return the label of each name that only one class has; ImageNet has two classes called crane."""
    count = Counter(names)
    return {name: label for label, name in enumerate(names) if count[name] == 1}


def _names_as_labels(names: Sequence[str], num_classes: int) -> list[int]:
    """Read the class names as labels if they are different numbers from 0 to C - 1; otherwise return nothing."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return []
    labels = [int(name) for name in names]
    return labels if len(set(labels)) == len(labels) and max(labels) < num_classes else []


def _same_but_for_spelling(found: Sequence[str], names: Sequence[str]) -> bool:
    if len(found) != len(names) or len(names) < _MANY_CLASSES:
        return False
    differ = [pair for pair in zip(found, names, strict=True) if pair[0] != pair[1]]
    agree = {ours for ours, theirs in zip(found, names, strict=True) if ours == theirs}
    # A name that differs must not be the name of another label, because that would be another order.
    elsewhere = {ours for ours, _ in differ} & (set(names) - agree)
    return _RENAMED * len(differ) < len(names) and not elsewhere


def _first_difference(found: Sequence[str], names: Sequence[str]) -> int:
    return next(label for label, pair in enumerate(zip(found, names, strict=True)) if pair[0] != pair[1])


def _note_by_name(labels: Sequence[int], opened: OpenedData, num_classes: int) -> str | None:
    if len(labels) < num_classes:
        return f"{len(labels):,} of the checkpoint's {counted(num_classes, 'class', 'classes')}, matched by name"
    if list(labels) == sorted(labels):
        return None
    order = "the data set's own" if opened.order == "own" else opened.order
    return f"labels matched to the checkpoint's by class name; they would differ in {order} order"


def _note_by_order(opened: OpenedData, given: Sequence[tuple[str, ...]]) -> str | None:
    notes = []
    if given:
        notes.append(
            f"the checkpoint has other class names; its label 0 ({given[0][0]!r}) is assumed to be "
            f"{opened.class_names[0]!r}"
        )
    if opened.assumed:
        ours, theirs = list(opened.class_names), sort_classes(opened.class_names, "lexical")
        if ours != theirs:
            label = _first_difference(ours, theirs)
            notes.append(
                f"the checkpoint has no class names, so labels are in natural order, as timm sorts folders (label "
                f"{label} is {ours[label]!r}); torchvision's order is --class-order lexical ({theirs[label]!r})"
            )
    return "; ".join(notes) or None


def _contradiction(opened: OpenedData, names: Sequence[str], what: str) -> DataError:
    label_of = _unique_labels(names)
    label, name = next(item for item in enumerate(opened.class_names) if label_of.get(item[1], item[0]) != item[0])
    return DataError(
        f"In the checkpoint {name!r} is label {label_of[name]}; by {what} it is label {label}. "
        f"The checkpoint's order: {_shorten(names)}. The other: {_shorten(opened.class_names)}.",
        hint="Leave the option out: classes are matched by name.",
    )


def _classes_missing(opened: OpenedData, names: Sequence[str]) -> DataError:
    missing = [name for name in names if name not in set(opened.class_names)]
    return DataError(
        f"The data at {opened.location} has {opened.num_classes:,} of the checkpoint's "
        f"{counted(len(names), 'class', 'classes')}. Without images: {_shorten(missing)}.",
        hint="A model that is trained on some classes unlearns the others. For a model of these classes alone, convert "
        f"again: fixify convert SOURCE --num-classes {opened.num_classes}",
    )


def _names_differ(opened: OpenedData, stored: Sequence[str]) -> DataError:
    shared = set(stored) & set(opened.class_names)
    missing = [name for name in stored if name not in shared]
    extra = [name for name in opened.class_names if name not in shared]
    lacks = f"the data lacks {len(missing):,} of the checkpoint's {counted(len(stored), 'class', 'classes')}"
    others = f"The checkpoint lacks {len(extra):,} of the data's {counted(opened.num_classes, 'class', 'classes')}"
    also = f"; {lacks}: {_shorten(missing)}" if missing else ""
    return DataError(
        f"{others}: {_shorten(extra)}{also}.",
        hint="Use the class folders that the checkpoint was trained on, say which folder has which label with "
        "--class-map FILE, or convert again with --num-classes.",
    )


def _shorten(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
