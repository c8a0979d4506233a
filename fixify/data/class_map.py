"""Class maps: which class of a data set has which label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from fixify.data.opened import OpenedData, Relabelled, Subset
from fixify.errors import DataError, SourceError
from fixify.sources.labels import read_class_indices


def read_class_map(path: str | Path) -> dict[str, int]:
    """Class name -> label, from a file as for `fixify.sources.labels.read_class_indices`.

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
