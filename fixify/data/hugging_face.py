"""timm's `hfds/...` data names: Hugging Face data sets, from the Hub or from a folder."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fixify._values import counted
from fixify.data.dataset import DataOptions, OpenedData, Split, natural_order
from fixify.data.decoding import decode
from fixify.data.folder import SPLIT_NAMES
from fixify.errors import DataError

_SAVED = ("dataset_dict.json", "dataset_info.json")  # files that `save_to_disk` writes


class HuggingFaceImages:
    """The images of one split.

    Args:
        table: A `datasets.Dataset` whose image column is not decoded.
        image_key: The image column.
        labels: int64 [num_images].
        name: Name of the data, for messages and for `listing`.
    """

    def __init__(self, table: Any, image_key: str, labels: NDArray[np.int64], name: str) -> None:
        self.table = table
        self.image_key = image_key
        self.labels = labels
        self.name = name

    def is_same(self, other: object) -> bool:
        """Check that `other` has the same table; equal fingerprints mean equal tables."""
        return isinstance(other, HuggingFaceImages) and bool(self.table._fingerprint == other.table._fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ImageSource.load`."""
        stored = self.table[index][self.image_key] or {}
        where = self._name(index, stored)
        if stored.get("bytes"):
            image = decode(io.BytesIO(stored["bytes"]), where)
        elif stored.get("path"):
            image = decode(Path(stored["path"]), where)
        else:
            raise DataError(f"Cannot read the image {where}: it is empty.")
        return image, int(self.labels[index])

    def where(self, index: int) -> str:
        """See `ImageSource.where`."""
        return self._name(index, self.table[index][self.image_key] or {})

    def _name(self, index: int, stored: dict[str, Any]) -> str:
        return f"number {index:,} of {self.name}" + (f" ({Path(stored['path']).name})" if stored.get("path") else "")

    def listing(self) -> Iterator[bytes]:
        """Identify the data by its name, its length and its labels."""
        # Not by its fingerprint: equal rows have equal fingerprints on two machines only if they come from equal files.
        yield f"{self.name} {len(self)}".encode() + hashlib.sha256(self.labels.astype("<i8").tobytes()).digest()


def open_hugging_face(name: str, roots: Sequence[Path], split: Split, options: DataOptions) -> OpenedData:
    """Open one split of a Hugging Face data set.

    Args:
        name: A data set on the Hub, which is downloaded to Hugging Face's cache if it is not there; or a folder, in
            the current folder or in one of the roots, that `save_to_disk` wrote or that `load_dataset` reads (Parquet,
            Arrow or image files).
        roots: Folders to look in.
        split: "val" is the data set's val, valid, validation, eval or test.
        options: Which columns to read, if there are several of images or of labels.

    Raises:
        DataError: the package `datasets` is missing, there is no such data set or split, or the columns are ambiguous.
    """
    datasets = _import_datasets()
    local = next((path for path in (Path(name).expanduser(), *(root / name for root in roots)) if path.is_dir()), None)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        splits = _Splits(datasets, name, local)
        found = splits.find(split)
        table = splits.read(found)
        image_key = _image_key(datasets, table, options.input_key)
        # Keep the encoded bytes: the workers decode them, and a damaged image can be named.
        table = table.cast_column(image_key, datasets.Image(decode=False))
        class_names, labels = _read_labels(datasets, table, splits, options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"Cannot read hfds/{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            hint="Give a name on https://huggingface.co/datasets, or a folder that datasets.load_dataset reads.",
        ) from error
    kept = np.flatnonzero(labels >= 0)
    missing = len(labels) - len(kept)
    if not len(kept):
        raise DataError(f"No image of the split {found} of hfds/{name} has a label ({counted(missing, 'image')}).")
    if missing:
        table, labels = table.select(kept), labels[kept]
    short = local.resolve().name if local is not None else name
    return OpenedData(
        images=HuggingFaceImages(table, image_key, labels, f"hfds/{short} {found}"),
        class_names=class_names,
        location=f"hfds/{name}",
        description=f"{counted(len(labels), 'image')} of {counted(len(class_names), 'class', 'classes')}, the split "
        f"{found} of hfds/{short}" + (f" ({missing:,} more without a label)" if missing else ""),
        name=f"hfds/{short}",
        split=split,
        labelled=options.need_labels,
    )


class _Splits:
    """The splits of a data set. A split is read when it is asked for.

    Attributes:
        names: Names of the splits; [""] for a single table without splits.
    """

    def __init__(self, datasets: Any, name: str, local: Path | None) -> None:
        self.name = name
        self.saved: dict[str, Any] | None = None
        self.datasets = datasets
        self.path = name if local is None else str(local.resolve())
        if local is not None and any((local / file).is_file() for file in _SAVED):
            found = datasets.load_from_disk(self.path)
            # A single table serves as any split. `check_disjoint` refuses it as training and validation data at once.
            self.saved = dict(found) if isinstance(found, dict) else {"": found}
            self.names = list(self.saved)
        else:
            self.names = list(datasets.get_dataset_split_names(self.path))

    def find(self, split: Split) -> str:
        """Return the name that the data set gives to a split."""
        if self.names == [""]:
            return ""
        for name in SPLIT_NAMES[split]:
            if name in self.names:
                return name
        raise DataError(
            f"hfds/{self.name} has no {split} split (looked for {', '.join(SPLIT_NAMES[split])}); it has "
            f"{', '.join(self.names)}."
        )

    def read(self, name: str) -> Any:
        """Return the table of a split."""
        return self.datasets.load_dataset(self.path, split=name) if self.saved is None else self.saved[name]


def _image_key(datasets: Any, table: Any, given: str | None) -> str:
    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if given is not None and given not in columns:
        raise DataError(f"--input-key {given} is not an image column. Image columns: {', '.join(columns) or 'none'}.")
    if given is None and "image" not in columns and len(columns) != 1:
        raise DataError(
            f"It is not clear which column holds the images. Image columns: {', '.join(columns) or 'none'}.",
            hint="Choose one: --input-key NAME" if columns else None,
        )
    return given or ("image" if "image" in columns else columns[0])


def _read_labels(
    datasets: Any, table: Any, splits: _Splits, options: DataOptions
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the class names, and the label of each image, -1 where there is none."""
    if not options.need_labels:
        return (), np.zeros(len(table), dtype=np.int64)
    key = _target_key(datasets, table, options.target_key)
    feature, values = table.features[key], list(table.select_columns([key])[:][key])
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names), _integers(values)
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values if value is not None):
        labels = _integers(values)
        return tuple(map(str, range(int(labels.max(initial=0)) + 1))), labels
    if not all(isinstance(value, str) for value in values if value is not None):
        raise DataError(f"The column {key} holds no labels. Labels are whole numbers or text.")
    # Text: the training split defines the classes, so that a class without validation images shifts no label.
    train = splits.read(splits.find("train")) if splits.names != [""] else table
    names = natural_order({value for value in train.unique(key) if value is not None})
    label_of = {name: label for label, name in enumerate(names)}
    if unknown := sorted({value for value in values if value is not None} - label_of.keys()):
        raise DataError(f"{unknown[0]!r} in the column {key} is not a class of the training split.")
    return tuple(names), np.array([-1 if value is None else label_of[value] for value in values], dtype=np.int64)


def _target_key(datasets: Any, table: Any, given: str | None) -> str:
    if given is not None:
        if given not in table.features:
            raise DataError(f"There is no column {given!r}. Columns: {', '.join(table.features)}.")
        return given
    if "label" in table.features:
        return "label"
    classes = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    columns = f"Class columns: {', '.join(classes)}" if classes else f"Columns: {', '.join(table.features)}"
    raise DataError(
        f"It is not clear which column holds the labels. {columns}.",
        hint="Choose one: --target-key NAME",
    )


def _integers(values: list[Any]) -> NDArray[np.int64]:
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "hfds/... names need the package datasets, which is not installed.", hint="pip install datasets"
        ) from error
    return datasets
