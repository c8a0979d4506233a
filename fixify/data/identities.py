"""Synthetic identities, as many as one likes, for runs with very many classes: `identities/CLASSES[/IMAGES]`.

An identity is a point in 512 dimensions. Its image of 16 x 16 x 3 values is a fixed random nonlinear function of the
point, with noise, brightness and contrast that differ from image to image. No file is read or written: an image is made
from its number when it is loaded, and is the same every time.

The points are the codes of a Hadamard head of 512 features (seed 0). So a fixed head knows where identities are that
training never showed, and a learned one has to see each of them. This measures the cost of very many classes; it says
nothing about the accuracy on real faces.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fixify._values import counted
from fixify.data.dataset import OpenedData, Split
from fixify.data.seeding import permutation
from fixify.errors import DataError
from fixify.heads.codes import HadamardRows
from fixify.heads.constructions import factorise
from fixify.heads.kinds import default_codes
from fixify.heads.streams import Purpose, gaussian

NUM_FEATURES = 512
"""Dimensions of the points; the network needs as many features, or its head has other codes."""
SIDE = 16
_VALUES = SIDE * SIDE * 3
_MOST = 1 << 27
_VALIDATED = 1024  # images, of random identities
_STREAMS: dict[Split, int] = {"train": 1, "val": 2, "test": 3}
_NOISE, _BRIGHTNESS, _CONTRAST = 0.3, 0.2, 0.2
_RANGE = 2.0  # values beyond it are clipped


class IdentityImages:
    """Images of random identities, made when they are loaded.

    Args:
        num_classes: Number of identities.
        num_images: Number of images. No identity has two more than another.
        split: Decides which identities are shown, and the noise.
    """

    def __init__(self, num_classes: int, num_images: int, split: Split) -> None:
        self.num_classes, self.num_images, self.split = num_classes, num_images, split
        order = permutation(0, _STREAMS[split], count=num_classes)
        self.labels = np.resize(order, num_images)
        self._codes = HadamardRows(factorise(NUM_FEATURES), 0, default_codes(NUM_FEATURES, num_classes))

    def __len__(self) -> int:
        return self.num_images

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ImageSource.load`."""
        label = int(self.labels[index])
        noise = gaussian(_STREAMS[self.split], Purpose.SAMPLE, index, (_VALUES + 2,)).astype(np.float32)
        values = np.tanh(self.point(label) @ _rendering())
        values = values * (1 + _CONTRAST * noise[-1]) + _BRIGHTNESS * noise[-2] + _NOISE * noise[:-2]
        pixels = ((values / _RANGE + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(pixels.reshape(SIDE, SIDE, 3)), label

    def point(self, label: int) -> NDArray[np.float32]:
        """Return the point of an identity, +-1, float32 [512]."""
        signs: NDArray[np.float32] = self._codes.select(np.array([label])).signs()[0].astype(np.float32)
        return signs

    def where(self, index: int) -> str:
        """See `ImageSource.where`."""
        return f"number {index:,}"

    def listing(self) -> Iterator[bytes]:
        """Identify the images by the numbers that they are made from."""
        yield f"fixify-identities:1:{self.num_classes}:{self.num_images}:{self.split}".encode()


@cache
def _rendering() -> NDArray[np.float32]:
    """Draw the map from points to values, float32 [512, values]; the variance of each value is 1 before the tanh."""
    drawn = gaussian(0, Purpose.GAUSSIAN, 0, (NUM_FEATURES, _VALUES)) * NUM_FEATURES**-0.5
    return drawn.astype(np.float32)


@lru_cache(maxsize=1)
def _names(num_classes: int) -> tuple[str, ...]:
    # Both splits share the names: a million of them take 65 MB.
    return tuple(map(str, range(num_classes)))


def open_identities(name: str, split: Split) -> OpenedData:
    """Open one split of `identities/CLASSES` or `identities/CLASSES/IMAGES`.

    Args:
        name: What follows `identities/`: the number of identities; and the number of training images, by default one of
            each identity. Validation has 1,024 other images.
        split: "val" and "test" are different images.

    Raises:
        DataError: the name is no such numbers.
    """
    parts = name.split("/")
    if not 1 <= len(parts) <= 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise _refused(name)
    num_classes, num_images = int(parts[0]), int(parts[-1])
    if not 2 <= num_classes <= _MOST or not 1 <= num_images <= _MOST:
        raise _refused(name)
    images = IdentityImages(num_classes, num_images if split == "train" else _VALIDATED, split)
    identities = counted(num_classes, "synthetic identity", "synthetic identities")
    return OpenedData(
        images=images,
        class_names=_names(num_classes),
        location=f"identities/{name}",
        description=f"{counted(len(images), 'image')} of {identities}",
        name=f"identities/{name}",
        split=split,
        numbered=True,
    )


def _refused(name: str) -> DataError:
    return DataError(
        f"identities/{name} is not identities/CLASSES or identities/CLASSES/IMAGES with 2 to {_MOST:,} classes.",
        hint="For example identities/100000, or identities/1000000/6400 for 6,400 training images.",
    )
