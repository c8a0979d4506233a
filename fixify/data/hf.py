"""timm's `hfds/...` data names: Hugging Face datasets, from their Hub or from a folder."""

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

from fixify.data.class_matching import natural_order
from fixify.data.dataset import DataOptions, OpenedData, Split, decode
from fixify.data.folder import SPLIT_FOLDERS
from fixify.errors import DataError

_SAVED = ("dataset_dict.json", "dataset_info.json")  # what `save_to_disk` leaves


class HfdsImages:
    """The images of one split.

    Args:
        table: A `datasets.Dataset` whose column of images is not decoded.
        image_key: That column.
        labels: int64 [num_images].
        name: Of the data, for messages.
    """

    def __init__(self, table: Any, image_key: str, labels: NDArray[np.int64], name: str) -> None:
        self.table = table
        self.image_key = image_key
        self.labels = labels
        self.name = name

    @property
    def fingerprint(self) -> str:
        """Of the table; two tables with the same one are the same."""
        return str(self.table._fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        held = self.table[index][self.image_key] or {}
        where = f"number {index:,} of {self.name}" + (f" ({Path(held['path']).name})" if held.get("path") else "")
        if held.get("bytes"):
            image = decode(io.BytesIO(held["bytes"]), where)
        elif held.get("path"):
            image = decode(Path(held["path"]), where)
        else:
            raise DataError(f"Cannot read the image {where}: it is empty.")
        return image, int(self.labels[index])

    def listing(self) -> Iterator[bytes]:
        # The same rows on another machine have the same fingerprint if they were read from the same files.
        yield f"{self.name} {len(self)}".encode() + hashlib.sha256(self.labels.astype("<i8").tobytes()).digest()


def open_hfds(name: str, roots: Sequence[Path], split: Split, options: DataOptions) -> OpenedData:
    """Open one split of a Hugging Face data set.

    Args:
        name: Of a data set on the Hub, which is downloaded to Hugging Face's cache unless it is there; or a folder,
            here or in one of the roots: what `save_to_disk` wrote, or Parquet, Arrow or image files as `load_dataset`
            takes.
        roots: Folders to look in.
        split: "val" is the data set's val, valid, validation, eval or test.
        options: Which columns, if it is not the only one of images and the only one of labels.

    Raises:
        DataError: the package `datasets` is missing, there is no such data set or split, or columns leave it open.
    """
    datasets = _import()
    local = next((path for path in (Path(name).expanduser(), *(root / name for root in roots)) if path.is_dir()), None)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        parts = _Parts(datasets, name, local)
        part = parts.find(split)
        table = parts.read(part)
        image_key = _image_key(datasets, table, options.input_key)
        # As bytes: the workers decode, and an image that is damaged can be named.
        table = table.cast_column(image_key, datasets.Image(decode=False))
        class_names, labels = _labels(datasets, table, parts, options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"Cannot read hfds/{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            hint="Give a name on https://huggingface.co/datasets, or a folder that datasets.load_dataset reads.",
        ) from error
    kept = np.flatnonzero(labels >= 0)
    missing = len(labels) - len(kept)
    if not len(kept):
        raise DataError(f"None of the {missing:,} images of the part {part} of hfds/{name} has a label.")
    if missing:
        table, labels = table.select(kept), labels[kept]
    short = local.resolve().name if local is not None else name
    return OpenedData(
        images=HfdsImages(table, image_key, labels, f"hfds/{short} {part}"),
        class_names=class_names,
        location=f"hfds/{name}",
        description=f"{len(labels):,} images of {len(class_names):,} classes, the part {part} of hfds/{short}"
        + (f" ({missing:,} more have no label)" if missing else ""),
        name=f"hfds/{short}",
        split=split,
        labelled=options.need_labels,
    )


class _Parts:
    """The splits of a data set, read when asked for."""

    def __init__(self, datasets: Any, name: str, local: Path | None) -> None:
        self.name = name
        self.saved: dict[str, Any] | None = None
        self.datasets = datasets
        self.path = name if local is None else str(local.resolve())
        if local is not None and any((local / file).is_file() for file in _SAVED):
            found = datasets.load_from_disk(self.path)
            # One table has no splits: it is whatever it is asked to be; that it is not both is checked elsewhere.
            self.saved = dict(found) if isinstance(found, dict) else {"": found}
            self.names = list(self.saved)
        else:
            self.names = list(datasets.get_dataset_split_names(self.path))

    def find(self, split: Split) -> str:
        if self.names == [""]:
            return ""
        for name in SPLIT_FOLDERS[split]:
            if name in self.names:
                return name
        raise DataError(
            f"hfds/{self.name} has no {split} split (looked for {', '.join(SPLIT_FOLDERS[split])}); it has "
            f"{', '.join(self.names)}."
        )

    def read(self, part: str) -> Any:
        return self.datasets.load_dataset(self.path, split=part) if self.saved is None else self.saved[part]


def _image_key(datasets: Any, table: Any, given: str | None) -> str:
    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if given is not None and given not in columns:
        raise DataError(f"--input-key {given} is no column of images; those are {', '.join(columns) or 'none'}.")
    if given is None and "image" not in columns and len(columns) != 1:
        raise DataError(
            f"Which column holds the images? Those of images are {', '.join(columns) or 'none'}.",
            hint="Say it with --input-key NAME." if columns else None,
        )
    return given or ("image" if "image" in columns else columns[0])


def _labels(
    datasets: Any, table: Any, parts: _Parts, options: DataOptions
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and the label of each image; -1 where it has none."""
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
        raise DataError(f"The column {key} holds no labels: they are whole numbers or text.")
    # Text: the training part says which classes there are, so that one without validation images shifts nothing.
    train = parts.read(parts.find("train")) if parts.names != [""] else table
    names = natural_order({value for value in train.unique(key) if value is not None})
    place = {name: label for label, name in enumerate(names)}
    if unknown := sorted({value for value in values if value is not None} - place.keys()):
        raise DataError(f"{unknown[0]!r} in the column {key} is no class of the training part.")
    return tuple(names), np.array([-1 if value is None else place[value] for value in values], dtype=np.int64)


def _target_key(datasets: Any, table: Any, given: str | None) -> str:
    if given is not None:
        if given not in table.features:
            raise DataError(f"There is no column {given!r}; there are {', '.join(table.features)}.")
        return given
    if "label" in table.features:
        return "label"
    classes = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    columns = f"Those of classes are {', '.join(classes)}" if classes else f"There are {', '.join(table.features)}"
    raise DataError(
        f"Which column holds the labels? {columns}.",
        hint="Say it with --target-key NAME.",
    )


def _integers(values: list[Any]) -> NDArray[np.int64]:
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


def _import() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "hfds/... names are read with the package datasets, which is not installed.", hint="pip install datasets"
        ) from error
    return datasets
