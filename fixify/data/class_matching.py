"""Class maps: which class of a data set has which label."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset

from fixify.checkpoints.labels import read_class_indices
from fixify.data.dataset import ClassOrder, OpenedData, Relabelled, Subset
from fixify.errors import DataError, SourceError


def read_class_map(path: str | Path) -> dict[str, int]:
    """Class name -> label, from a file as for `fixify.checkpoints.labels.read_class_indices`.

    Raises:
        DataError: it cannot be read, or holds no class map.
    """
    try:
        return read_class_indices(Path(path))
    except SourceError as error:
        raise DataError(error.message, hint=error.hint) from error


def apply_class_map(opened: OpenedData, labels: Mapping[str, int]) -> OpenedData:
    """The data under the labels of a class map; images of classes that it does not name are left out, as in timm.

    Raises:
        DataError: it names none of the data's classes.
    """
    known = [name in labels for name in opened.class_names]
    if not any(known):
        raise DataError(
            f"The class map names none of the classes of {opened.location}: it has {next(iter(labels))!r} ..., "
            f"the data {opened.class_names[0]!r} ...",
            hint="A class map has the names of the class folders, one a line in label order, or with their labels.",
        )
    names = [f"label {label}" for label in range(max(labels.values()) + 1)]
    for name, label in labels.items():
        names[label] = name
    images, description = opened.images, opened.description
    if not all(known):
        kept = np.flatnonzero(np.array(known)[cast(Any, images).labels])
        images = Subset(images, kept.tolist())
        description = (
            f"{len(kept):,} images of {sum(known):,} classes that the class map names ({known.count(False):,} are left "
            f"out) of {description}"
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


# Do the labels of a data set mean what the labels of a checkpoint mean? By name, wherever both have names.


_FEW_RENAMED = 0.9  # of many classes, the share that has to agree for the rest to be taken for other spellings
_MANY = 100


def natural_order(names: Iterable[str]) -> list[str]:
    """Folder names in timm's order: digits compare as numbers and case is ignored, so class10 follows class9.

    torchvision sorts the same names lexically (class10 before class2). timm's order leaves names that differ only
    in case in an arbitrary order; here the name itself breaks the tie.
    """
    return sorted(names, key=lambda name: (_natural_key(name), name))


def in_order(names: Iterable[str], order: ClassOrder | None) -> list[str]:
    """Class names in timm's order (natural, the default) or in torchvision's (lexical)."""
    return sorted(names) if order == "lexical" else natural_order(names)


def _natural_key(name: str) -> list[int | str]:
    # `re.split` alternates words and numbers, so that equal positions always compare equal types.
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"(\d+)", name.lower()))]


@dataclass(frozen=True)
class Matched:
    """Data whose labels are those of a checkpoint.

    Attributes:
        data: The data under the checkpoint's labels, with its class names where it has some.
        label_of: The checkpoint's label of each of the data's own labels.
        note: What a person should know of how labels were matched; None if there is no doubt.
    """

    data: OpenedData
    label_of: tuple[int, ...]
    note: str | None

    @property
    def moved(self) -> bool:
        """Whether the data's own labels are other ones."""
        return self.label_of != tuple(range(len(self.label_of)))


def match_classes(
    opened: OpenedData,
    num_classes: int,
    *stored: Sequence[str] | None,
    subset: bool = False,
) -> Matched:
    """Give data the labels that a checkpoint means, by the names of the classes.

    Args:
        opened: The data.
        num_classes: Classes of the checkpoint's classifier.
        stored: Names of the checkpoint's classes in label order, as far as it has them; of several vocabularies (folder
            names, words for people) the first that has the data's names counts. A checkpoint of as many classes as a
            version of ImageNet, and with no other names, has that version's synsets and words.
        subset: Whether the data may lack some of the checkpoint's classes. Those that are numbers then are its labels.

    Raises:
        DataError: some names are the checkpoint's and some are not; the names say nothing and the number of classes
            differs; or the order that was asked for, or a class map, contradicts the checkpoint's names.
    """
    vocabularies = _vocabularies(num_classes, stored)
    found = opened.class_names
    if opened.order == "map":
        return _by_map(opened, num_classes, vocabularies)
    for names in vocabularies:
        if found == names:
            return _matched(opened, range(len(found)), names)
        place = _places(names)
        if set(found) <= place.keys():
            labels = [place[name] for name in found]
            if len(found) < num_classes and not subset:
                raise _fewer(opened, names)
            if opened.order != "own" and not opened.assumed and labels != sorted(labels):
                raise _contradiction(opened, names, f"--class-order {opened.order}")
            return _matched(opened, labels, names, _note_by_name(labels, opened, num_classes))
    said = [tuple(names) for names in stored if names is not None]  # not what was only assumed
    for names in said:
        if _few_renamed(found, names):
            differ = next(label for label, pair in enumerate(zip(found, names, strict=True)) if pair[0] != pair[1])
            note = f"some classes are named otherwise than in the checkpoint, {found[differ]!r} not {names[differ]!r}"
            return _matched(opened, range(len(found)), names, note)
        if set(found) & set(names) and not _numbers(found, num_classes):
            raise _some_names(opened, names)
    numbers = _numbers(found, num_classes)
    if len(found) < num_classes and numbers and subset:
        names = vocabularies[0] if vocabularies else tuple(map(str, range(num_classes)))
        note = f"{len(found):,} of the checkpoint's {num_classes:,} classes, named by their labels"
        return _matched(opened, numbers, names, note)
    if len(found) != num_classes:
        raise DataError(
            f"The checkpoint has {num_classes} classes and the data at {opened.location} has {len(found)}.",
            hint="Use the data that the checkpoint was trained on, give a --class-map FILE, "
            f"or convert anew for this label set: fixify convert SOURCE --num-classes {len(found)}",
        )
    return _matched(opened, range(num_classes), found, _note_of_order(opened, said))


def check_classes(opened: OpenedData, num_classes: int, *stored: Sequence[str] | None) -> None:
    """Refuse data whose labels, as they are, do not mean what a checkpoint's labels mean; see `match_classes`.

    Raises:
        DataError: as `match_classes`, or the same names stand in another order.
    """
    matched = match_classes(opened, num_classes, *stored)
    if matched.moved:
        label = next(label for label, other in enumerate(matched.label_of) if label != other)
        raise DataError(
            f"Its classes are in another order: label {label} is {matched.data.class_names[label]!r} there and "
            f"{opened.class_names[label]!r} here.",
            hint="Both have to give the same label to a class.",
        )


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
        own = [tuple(info.label_names()), tuple(info.label_descriptions())]
        if all(names in own for names in known):
            known += [names for names in own if names not in known]
    return known


def _places(names: Sequence[str]) -> dict[str, int]:
    """The label of each name that only one class has; two classes of ImageNet are called crane."""
    count = Counter(names)
    return {name: label for label, name in enumerate(names) if count[name] == 1}


def _numbers(names: Sequence[str], num_classes: int) -> list[int]:
    """The class names as labels, if they are different numbers from 0 to C - 1; else nothing."""
    if not all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        return []
    labels = [int(name) for name in names]
    return labels if len(set(labels)) == len(labels) and max(labels) < num_classes else []


def _few_renamed(found: Sequence[str], names: Sequence[str]) -> bool:
    if len(found) != len(names) or len(names) < _MANY:
        return False
    differ = [pair for pair in zip(found, names, strict=True) if pair[0] != pair[1]]
    agree = {ours for ours, theirs in zip(found, names, strict=True) if ours == theirs}
    # None that differs may be the name of another label: that would be another order.
    elsewhere = {ours for ours, _ in differ} & (set(names) - agree)
    return len(differ) <= (1 - _FEW_RENAMED) * len(names) and not elsewhere


def _note_by_name(labels: Sequence[int], opened: OpenedData, num_classes: int) -> str | None:
    if len(labels) < num_classes:
        return f"{len(labels):,} of the checkpoint's {num_classes:,} classes, matched by name"
    if list(labels) == sorted(labels):
        return None
    return f"labels by name, as in the checkpoint; in {_ordered(opened)} order they would differ"


def _note_of_order(opened: OpenedData, said: Sequence[tuple[str, ...]]) -> str | None:
    notes = []
    if said:
        notes.append(
            f"the checkpoint has other names for its classes, and label 0 ({said[0][0]!r}) is taken to be "
            f"{opened.class_names[0]!r}"
        )
    if opened.assumed:
        ours, theirs = list(opened.class_names), in_order(opened.class_names, "lexical")
        if ours != theirs:
            label = next(label for label, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
            notes.append(
                f"labels in natural order, as timm sorts folders (label {label} is {ours[label]!r}), since the "
                f"checkpoint has no class names; torchvision's order is --class-order lexical ({theirs[label]!r})"
            )
    return "; ".join(notes) or None


def _by_map(opened: OpenedData, num_classes: int, vocabularies: Sequence[tuple[str, ...]]) -> Matched:
    """A class map says what each label is: its word counts, unless the checkpoint knows the very names otherwise."""
    found = opened.class_names
    if len(found) > num_classes:
        raise DataError(f"The class map has label {len(found) - 1}, and the checkpoint {num_classes} classes.")
    for names in vocabularies:
        place = _places(names)
        if any(place.get(name, label) != label for label, name in enumerate(found)):
            raise _contradiction(opened, names, "the class map")
    names = vocabularies[0] if vocabularies else (*found, *map(str, range(len(found), num_classes)))
    return _matched(opened, range(len(found)), names)


def _ordered(opened: OpenedData) -> str:
    return "their own" if opened.order == "own" else opened.order


def _contradiction(opened: OpenedData, names: Sequence[str], what: str) -> DataError:
    place = _places(names)
    label, name = next(item for item in enumerate(opened.class_names) if place.get(item[1], item[0]) != item[0])
    return DataError(
        f"The checkpoint says that {name!r} is label {place[name]}; by {what} it is label {label}. "
        f"The checkpoint's order: {_some(names)}. The other: {_some(opened.class_names)}.",
        hint="Leave the option out: classes are matched by their names.",
    )


def _fewer(opened: OpenedData, names: Sequence[str]) -> DataError:
    missing = [name for name in names if name not in set(opened.class_names)]
    return DataError(
        f"The data at {opened.location} has {opened.num_classes} of the checkpoint's {len(names)} classes; without "
        f"images are {_some(missing)}.",
        hint="Training on some classes unlearns the others. For a model of these alone, convert anew: "
        f"fixify convert SOURCE --num-classes {opened.num_classes}",
    )


def _some_names(opened: OpenedData, stored: Sequence[str]) -> DataError:
    shared = set(stored) & set(opened.class_names)
    missing = [name for name in stored if name not in shared]
    extra = [name for name in opened.class_names if name not in shared]
    lacks = f"{len(missing)} of the checkpoint's {len(stored)} classes are not in the data: {_some(missing)}; "
    return DataError(
        f"{lacks if missing else ''}{len(extra)} of the data's classes are not in the checkpoint: {_some(extra)}.",
        hint="Use the class folders that the checkpoint was trained on, say which folder is which label with "
        "--class-map FILE, or convert anew with --num-classes.",
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
