"""The stored projection of a `binary` head: few directions of the features, and how many signs each of them has.

With many more classes than features, d directions of N numbers of 8 bits are a small part of what the classes store,
and where the features and the class vectors vary in few directions, so few coordinates say nearly all. A coordinate
that varies more has finer levels: the first of the `planes` counts the coordinates that have a first sign, the second
those of them that have a second, and so on, the coordinates that vary most first. A level of b signs is the sum
2^(b-1) s_1 + ... + s_b, so a class is a row of signs, and the features are read once for each sign of a coordinate.
`fixify.heads.projection_search` chooses directions and planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fixify.errors import HeadSpecError

LARGEST_ENTRY = 127
"""Entries of the directions are integers from minus this to this."""


def bits_of(planes: Sequence[int]) -> np.ndarray:
    """Count the signs of each coordinate: int64 [d].

    >>> bits_of((3, 1)).tolist()
    [2, 1, 1]
    """
    return (np.arange(planes[0])[:, None] < np.asarray(planes)).sum(axis=1)


def coordinates_of(planes: Sequence[int]) -> np.ndarray:
    """List the coordinate that each sign belongs to, plane by plane: int64 [T].

    >>> coordinates_of((3, 1)).tolist()
    [0, 1, 2, 0]
    """
    return np.concatenate([np.arange(plane) for plane in planes])


def weights_of(planes: Sequence[int]) -> np.ndarray:
    """List what each sign counts in its level, plane by plane: float32 [T].

    >>> weights_of((3, 1)).tolist()
    [2.0, 1.0, 1.0, 1.0]
    """
    bits = bits_of(planes)
    return np.concatenate([2.0 ** (bits[:plane] - 1 - i) for i, plane in enumerate(planes)]).astype(np.float32)


def signs_of_levels(levels: np.ndarray, planes: Sequence[int]) -> np.ndarray:
    """Write levels as the signs that they are sums of, packed.

    Args:
        levels: Odd integers [k, d], within -(2^b - 1) .. 2^b - 1 for a coordinate of b signs.
        planes: The planes.

    Returns:
        uint8 [k, ceil(T / 8)]; bit 1 is a minus sign, first sign in the highest bit, unused bits 0.

    >>> signs_of_levels(np.array([[-1, 1]]), (2, 1)).tolist()  # -1 = -2 + 1
    [[128]]
    """
    bits = bits_of(planes)
    ones = (2**bits - 1 - levels.astype(np.int64)) // 2  # bit i of it is the minus sign of weight 2^i
    parts = [ones[:, :plane] >> (bits[:plane] - 1 - i) & 1 for i, plane in enumerate(planes)]
    return np.packbits(np.concatenate(parts, axis=1).astype(bool), axis=1)


def levels_of_signs(packed: np.ndarray, planes: Sequence[int]) -> np.ndarray:
    """Sum the packed signs of classes to levels: uint8 [k, ceil(T / 8)] to int16 [k, d].

    >>> levels_of_signs(np.array([[128]], dtype=np.uint8), (2, 1)).tolist()
    [[-1, 1]]
    """
    signs = 1 - 2 * np.unpackbits(packed, axis=1, count=sum(planes)).astype(np.int16)
    levels, start = np.zeros((len(packed), planes[0]), dtype=np.int16), 0
    for plane in planes:
        levels[:, :plane] *= 2
        levels[:, :plane] += signs[:, start : start + plane]
        start += plane
    return levels


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map of the features to the numbers that the signs of a class multiply.

    Attributes:
        planes: Coordinates with a first, a second, ... sign; they do not increase.
        directions: int8 [d, N].
        steps: What a unit of each direction is worth, float32 [d], positive.
    """

    planes: tuple[int, ...]
    directions: np.ndarray
    steps: np.ndarray

    def __post_init__(self) -> None:
        d = self.planes[0]
        if self.directions.ndim != 2 or len(self.directions) != d or self.directions.dtype != np.int8:
            raise HeadSpecError(
                f"A projection to {d} coordinates is int8 [{d}, N], got {self.directions.dtype} "
                f"{list(self.directions.shape)}."
            )
        if self.steps.shape != (d,) or not bool((np.isfinite(self.steps) & (self.steps > 0)).all()):
            raise HeadSpecError(f"A projection has {d} steps, positive and finite.")

    @property
    def num_kept(self) -> int:
        """Number of signs of a class, T."""
        return sum(self.planes)

    def rows(self) -> np.ndarray:
        """Build what the features are multiplied with, one row per coordinate: float32 [d, N]."""
        made: np.ndarray = self.directions * self.steps.astype(np.float32)[:, None]
        return made

    def basis(self) -> np.ndarray:
        """Build what the features are multiplied with, one column per sign: float32 [N, T]."""
        made: np.ndarray = (self.rows()[coordinates_of(self.planes)] * weights_of(self.planes)[:, None]).T
        return made
