"""Seeded streams that are the same on every machine and version.

NumPy's distributions and the frameworks' `randn` may change between releases; the raw 64-bit output of the
counter-based generator Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) may not.
Everything random in a codebook is read from it. A stream is addressed by (seed, purpose, index), so streams are
independent of each other and of the order in which they are read. No global random state is touched.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of the format: never reuse or renumber."""

    BLOCK_SIGNS = 1
    GAUSSIAN = 2
    SKETCH = 3
    SAMPLE = 4


def raw(seed: int, purpose: Purpose, index: int, count: int) -> np.ndarray:
    """The first `count` words of the stream (seed, purpose, index): uint64 [count]."""
    key = np.array([seed, int(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def sign_bits(seed: int, purpose: Purpose, index: int, count: int) -> np.ndarray:
    """`count` fair bits: uint8 [count], lowest bit of the first word first."""
    words = raw(seed, purpose, index, -(-count // 64)).astype("<u8")
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:count]


def gaussian(seed: int, purpose: Purpose, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float64 numbers by Box-Muller, 53 random bits each, in C order."""
    count = int(np.prod(shape))
    pairs = -(-count // 2)
    uniform = (raw(seed, purpose, index, 2 * pairs) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((uniform[0::2] + 1.0) * 2.0**-53))  # (0, 1]: the logarithm is finite
    angle = 2.0 * np.pi * 2.0**-53 * uniform[1::2]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1)[:count].reshape(shape)
