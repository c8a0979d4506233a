"""What a data name resolves to: images, labels, and the class names that fix what each label means."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
