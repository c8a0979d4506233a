"""What a data name resolves to: images, their labels, and the class names that say what each label means."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "val", "test"]
ClassOrder = Literal["natural", "lexical"]


@dataclass(frozen=True)
class DataOptions:
    """How to read the labels of a data set. The names are timm's where timm has one.

    Attributes:
        class_order: How to sort the names of class folders: "natural" is timm's order (2 before 10), "lexical" is
            torchvision's. None means natural.
        class_map: A file that gives each class its label; see `fixify.data.class_matching.read_class_map`. Images of
            classes that it does not name are left out.
        input_key: Image column (`hfds/...`) or file extensions (`wds/...`, for example "jpg;png"). None detects it.
        target_key: Label column (`hfds/...`), or the field of the JSON file beside each image (`wds/...`). None
            detects it.
        need_labels: False also accepts data without labels; every label is then 0.
    """

    class_order: ClassOrder | None = None
    class_map: str | Path | None = None
    input_key: str | None = None
    target_key: str | None = None
    need_labels: bool = True


class ImageSource(Protocol):
    """A random-access collection of labelled images. It must pickle, because loader workers get a copy."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decode image `index` and return it with its label.

        Raises:
            DataError: the image cannot be read; the message names it.
        """
        ...

    def where(self, index: int) -> str:
        """Return how to name image `index` in a message."""
        ...

    def listing(self) -> Iterable[bytes]:
        """Return what identifies these images without decoding them; see `listing_digest`.

        The result has one entry per image, or fewer entries for larger parts (a table, an array). The order of the
        entries does not matter; their content must be the same on every machine.
        """
        ...


@dataclass(frozen=True)
class OpenedData:
    """One split of one data set.

    Attributes:
        images: The labelled images.
        class_names: Name of each label, in label order. Two data sets agree on labels exactly if these are equal.
        location: Where the data was found, for messages. It is a path of this machine and never goes into a checkpoint.
        description: One line for people: which folder is used as which split, how many images and classes.
        name: The data name without any path of this machine, as a checkpoint may record it.
        split: The split that was asked for.
        labelled: False if the labels mean nothing.
        order: Where the order of the classes comes from: "own" is the data set's own order, "map" is a class map, and
            the others are ways of sorting the names of class folders.
        assumed: True if `order` is a default that nobody asked for.
        asides: Files that were not read, in words; the description has them too.
        numbered: True if the class names are only the labels as text. Nothing records them then: a checkpoint of a
            million classes would hold more names than weights.
    """

    images: ImageSource
    class_names: tuple[str, ...]
    location: str
    description: str
    name: str
    split: Split
    labelled: bool = True
    order: ClassOrder | Literal["own", "map"] = "own"
    assumed: bool = False
    asides: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def recorded_names(self) -> list[str] | None:
        """The class names as runs and checkpoints record them; None if they are only the labels."""
        return None if self.numbered else list(self.class_names)

    def __len__(self) -> int:
        return len(self.images)


class Subset:
    """Some images of a source, in the given order."""

    def __init__(self, images: ImageSource, indices: list[int]) -> None:
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ImageSource.load`."""
        return self.images.load(self.indices[index])

    def where(self, index: int) -> str:
        """See `ImageSource.where`."""
        return self.images.where(self.indices[index])

    def listing(self) -> Iterator[bytes]:
        """Identify the images of the source and the indices."""
        yield from self.images.listing()
        yield hashlib.sha256(np.array(self.indices, dtype="<i8").tobytes()).digest()


class Relabelled:
    """The images of a source with other labels.

    Args:
        images: The source.
        labels: The new label of each label of the source, int64 [number of old labels].
    """

    def __init__(self, images: ImageSource, labels: NDArray[np.int64]) -> None:
        self.images = images
        self.label_of = labels

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ImageSource.load`."""
        image, label = self.images.load(index)
        return image, int(self.label_of[label])

    def where(self, index: int) -> str:
        """See `ImageSource.where`."""
        return self.images.where(index)

    def listing(self) -> Iterator[bytes]:
        """Identify the images of the source and the new labels."""
        yield from self.images.listing()
        yield hashlib.sha256(self.label_of.astype("<i8").tobytes()).digest()


def listing_digest(data: OpenedData) -> str:
    """Compute the SHA-256 of the class names and the list of images, as 64 hexadecimal digits.

    For files, the list has their names relative to the split's folder, their sizes and their labels, in sorted order: a
    copy of the folder elsewhere has the same digest. Reading a million names and sizes takes seconds; reading the
    images would take an hour. Images that are held in memory are hashed whole.

    Raises:
        DataError: an image file has disappeared since the list was made.
    """
    digest = hashlib.sha256()
    for entry in (*(name.encode() for name in data.class_names), *sorted(data.images.listing())):
        digest.update(len(entry).to_bytes(8, "little") + entry)
    return digest.hexdigest()


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names in timm's order: digits compare as numbers, and case is ignored.

    timm leaves names that differ only in case in an arbitrary order; here the name itself breaks the tie.

    >>> natural_order(["class10", "class9", "Class1"])
    ['Class1', 'class9', 'class10']
    """
    return sorted(names, key=lambda name: (_natural_key(name), name))


def sort_classes(names: Iterable[str], order: ClassOrder | None) -> list[str]:
    """Sort class names in timm's order (natural, the default) or in torchvision's (lexical).

    >>> sort_classes(["class10", "class9"], "lexical")
    ['class10', 'class9']
    """
    return sorted(names) if order == "lexical" else natural_order(names)


def _natural_key(name: str) -> list[int | str]:
    # `re.split` alternates text and numbers, so equal positions always compare equal types.
    return [int(part) if position % 2 else part for position, part in enumerate(re.split(r"(\d+)", name.lower()))]
