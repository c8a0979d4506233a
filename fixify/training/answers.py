"""The answers of a model on the validation images, and how they differ from those of another model.

Two models that are measured on the same images are compared image by image (McNemar, 1947): images that both answer
alike say nothing about which one is better.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator
from torch import Tensor

from fixify._values import Count
from fixify.metrics import Confusions, count_confusions


def _is_base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("it is no base64") from error
    return text


@dataclass(frozen=True)
class RightImages:
    """Which images a model gets right, one bit per image.

    Attributes:
        num_images: Number of images that could be read.
        parts: In how many parts the images stand one after the other: 1 if they have the data's order, else the number
            of processes that measured the model.
        packed: The bits of all images, in base64.
    """

    num_images: Count
    parts: Count
    packed: Annotated[str, AfterValidator(_is_base64)]

    def __post_init__(self) -> None:
        if len(base64.b64decode(self.packed)) != -(-self.num_images // 8):
            raise ValueError(f"there are not {self.num_images} bits")

    @classmethod
    def of(cls, right: NDArray[np.bool_], parts: int = 1) -> RightImages:
        """Pack whether each image is right, [num_images].

        >>> RightImages.of(np.array([True, False, True]))
        RightImages(num_images=3, parts=1, packed='oA==')
        """
        return cls(len(right), parts, base64.b64encode(np.packbits(right).tobytes()).decode("ascii"))

    def flags(self) -> NDArray[np.bool_]:
        """Return whether each image is right, [num_images]."""
        packed = np.frombuffer(base64.b64decode(self.packed), np.uint8)
        return np.unpackbits(packed, count=self.num_images).astype(np.bool_)

    def changes_to(self, later: RightImages) -> tuple[int, int] | None:
        """Count the images that only the later model gets right, and those that only this one gets right.

        None if the images are not the same ones in the same order: a run went on in another number of processes, or an
        image can no longer be read.

        >>> before, later = (RightImages.of(np.array(right)) for right in ([True, False, False], [False, True, True]))
        >>> before.changes_to(later)
        (2, 1)
        """
        if (self.num_images, self.parts) != (later.num_images, later.parts):
            return None
        ours, theirs = self.flags(), later.flags()
        return int((theirs & ~ours).sum()), int((ours & ~theirs).sum())


@dataclass(frozen=True)
class Answers:
    """The label and the predicted class of every validation image that could be read.

    Attributes:
        pairs: int32 [2, num_images]. The images have the data's order if all of them could be read; else those of each
            process stand together.
        num_classes: C.
        parts: As in `RightImages`.
    """

    pairs: Tensor
    num_classes: int
    parts: int

    @classmethod
    def of(cls, shards: Sequence[Tensor], num_images: int, num_classes: int) -> Answers:
        """Put the answers of all processes together.

        Args:
            shards: The pairs of each process, int32 [2, n]; process r has the images r, r + world size, ...
            num_images: Number of images of the data.
            num_classes: C.
        """
        count = len(shards)
        pairs = torch.cat(tuple(shards), dim=1)
        if pairs.shape[1] != num_images:
            return cls(pairs, num_classes, count)
        ordered = torch.empty_like(pairs)
        for rank, shard in enumerate(shards):
            ordered[:, rank::count] = shard
        return cls(ordered, num_classes, 1)

    def right(self) -> RightImages:
        """Return which images are right."""
        labels, predicted = self.pairs
        return RightImages.of((labels == predicted).numpy(), self.parts)

    def confusions(self) -> Confusions:
        """Count the predictions per class."""
        return count_confusions(self.pairs.numpy(), self.num_classes)
