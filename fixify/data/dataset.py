"""How a data set's labels are read, where its name alone leaves it open."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fixify.errors import DataError


@dataclass(frozen=True)
class DataOptions:
    """How a data set's labels are read. Names are timm's where timm has one.

    Attributes:
        class_order: How the class folders are sorted: "natural" is timm's order (2 before 10), "lexical" torchvision's;
            None is natural.
        class_map: A file that says which class has which label; see `fixify.data.class_matching.read_class_map`. Images of
            classes that it does not name are left out.
        input_key: The column (`hfds/...`) or the file endings (`wds/...`, "jpg;png") of the images; None finds it.
        target_key: The column of the labels, or the field of the JSON file beside each image; None finds it.
        need_labels: False takes data without labels too; every label is then 0.
    """

    class_order: ClassOrder | None = None
    class_map: str | Path | None = None
    input_key: str | None = None
    target_key: str | None = None
    need_labels: bool = True


# What a data name resolves to: images, labels, and the class names that fix what each label means.


Split = Literal["train", "val", "test"]
ClassOrder = Literal["natural", "lexical"]


class ImageSource(Protocol):
    """A random-access collection of labelled images. It is copied into loader workers, so it has to pickle."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Image `index`, decoded, and its label.

        Raises:
            DataError: the image cannot be read; the message names it.
        """
        ...

    def listing(self) -> Iterable[bytes]:
        """What tells these images from others without decoding them, an entry an image or fewer of larger parts, in
        any order and on any machine the same; see `fixify.data.listing_digest`.
        """
        ...


@dataclass(frozen=True)
class OpenedData:
    """One split of one data set.

    Attributes:
        images: The labelled images.
        class_names: Name of each label, in label order. Two data sets agree on labels exactly if these are equal.
        location: Where it was found, for messages. A path of this machine: never written into a checkpoint.
        description: One line for a person: which folder was used as which split, how many images and classes.
        name: The data name without any path of this machine, as a checkpoint may record it.
        split: What was asked for.
        labelled: False where the labels mean nothing.
        order: Where the order of the classes comes from: the data set itself ("own"), a class map ("map"), or their
            folders' names, sorted.
        assumed: Nobody asked for that order.
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

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.images)


class Subset:
    """Some of the images of a source, in the given order."""

    def __init__(self, images: ImageSource, indices: list[int]) -> None:
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.images.load(self.indices[index])

    def listing(self) -> Iterator[bytes]:
        yield from self.images.listing()
        yield hashlib.sha256(np.array(self.indices, dtype="<i8").tobytes()).digest()


class Relabelled:
    """The images of a source under other labels.

    Args:
        images: The source.
        labels: New label of each of the source's labels.
    """

    def __init__(self, images: ImageSource, labels: NDArray[np.int64]) -> None:
        self.images = images
        self.label_of = labels

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.images.load(index)
        return image, int(self.label_of[label])

    def listing(self) -> Iterator[bytes]:
        yield from self.images.listing()
        yield hashlib.sha256(self.label_of.astype("<i8").tobytes()).digest()


# A fingerprint of which images a data set has: of their list, not of every pixel.


def listing_digest(data: OpenedData) -> str:
    """SHA-256 of the data's list of images, 64 hexadecimal digits.

    Of files the list has the names below the split's folder, sizes and labels, in sorted order, so a copy of the folder
    elsewhere has the same; reading a million names and sizes takes seconds, reading the images would take an hour. What
    is held in memory is taken whole.

    Raises:
        DataError: an image file has gone since the list was made.
    """
    found = hashlib.sha256()
    for entry in (*(name.encode() for name in data.class_names), *sorted(data.images.listing())):
        found.update(len(entry).to_bytes(8, "little") + entry)
    return found.hexdigest()


# Bytes to images.


def decode(file: Path | IO[bytes], where: object, *, hint: str | None = None) -> Image.Image:
    """Decode an image.

    Args:
        file: Its file, or an open one.
        where: What to call it in a message.
        hint: What to do if it is damaged.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise SyntaxError and ValueError for files that are damaged inside.
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"Cannot read the image {where}: {reason}.", hint=hint) from error
    return image
