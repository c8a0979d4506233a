"""Seeded random streams that are the same on every machine and in every version of NumPy.

The distributions of NumPy and the `randn` of frameworks may change between releases. The raw 64-bit output of the
counter-based generator Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) may not, so
everything random in a codebook is derived from it. A stream is addressed by (seed, purpose, index): streams do not
depend on each other or on the order in which they are read. No global random state is touched.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """The use of a stream. The numbers are part of the stored format: never reuse or renumber them."""

    BLOCK_SIGNS = 1
    GAUSSIAN = 2
    SKETCH = 3
    SAMPLE = 4
    NEW_CODES = 5


def raw(seed: int, purpose: Purpose, index: int, count: int) -> np.ndarray:
    """Read the first words of the stream (seed, purpose, index).

    Args:
        seed: 0 <= seed < 2^64.
        purpose: The use of the stream.
        index: Number of the stream among those with the same seed and purpose.
        count: Number of words.

    Returns:
        uint64 [count].

    >>> int(raw(0, Purpose.SAMPLE, 0, 1)[0])
    7916537264935705218
    """
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def sign_bits(seed: int, purpose: Purpose, index: int, count: int) -> np.ndarray:
    """Read fair bits from a stream, lowest bit of the first word first.

    Args:
        seed: See `raw`.
        purpose: See `raw`.
        index: See `raw`.
        count: Number of bits.

    Returns:
        uint8 [count] of 0 and 1.
    """
    words = raw(seed, purpose, index, -(-count // 64)).astype("<u8")
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:count]


def gaussian(seed: int, purpose: Purpose, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard normal numbers by Box-Muller, with 53 random bits each.

    Args:
        seed: See `raw`.
        purpose: See `raw`.
        index: See `raw`.
        shape: Shape of the result, which is filled in C order.

    Returns:
        float64 of that shape.
    """
    count = int(np.prod(shape))
    pairs = -(-count // 2)
    uniform = (raw(seed, purpose, index, 2 * pairs) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((uniform[0::2] + 1.0) * 2.0**-53))  # in (0, 1], so the logarithm is finite
    angle = 2.0 * np.pi * 2.0**-53 * uniform[1::2]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1)[:count].reshape(shape)
