"""Codes that are real numbers: `orthogonal` (the paper's random projection, section 2.2) and `simplex`.

They come from floating-point linear algebra, whose last bits differ between machines, so they are recognised by a
sketch compared within a tolerance and not by a hash.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.linalg import helmert

from fixify.heads import random

SKETCH_NUMBERS = 32
SKETCH_TOLERANCE = 1e-4
"""In units of sqrt(C), the spread of a sketch's numbers. Two LAPACKs differ by 1e-6 at most in float32; a codebook of
another seed agrees in one number by chance once in 10,000, and in all 32 never."""


def _orthonormal_columns(matrix: np.ndarray) -> np.ndarray:
    """Gram-Schmidt of the columns. Signs fixed by a positive diagonal of R: then the result is unique."""
    q, r = np.linalg.qr(matrix)
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)


@lru_cache(maxsize=2)  # a head needs its codes twice in a row: to verify the spec, and to multiply with
def codes(kind: str, num_features: int, num_classes: int, seed: int) -> np.ndarray:
    """Codes of a dense kind.

    `orthogonal`: a seeded Gaussian matrix made orthonormal; C <= N: orthonormal rows. C > N: orthonormal columns, then
    rows rescaled to unit norm. `simplex` (C <= N + 1): C unit vectors with all cosines -1/(C - 1), the smallest
    possible (Rankin), in a seeded random orientation.

    Returns:
        float32 [C, N], unit rows, read-only.
    """
    n, c = num_features, num_classes
    if kind == "orthogonal":
        gaussian = random.gaussian(seed, random.Purpose.GAUSSIAN, 0, (max(n, c), min(n, c)))
        result = _orthonormal_columns(gaussian)
        result = result.T if c <= n else result / np.linalg.norm(result, axis=1, keepdims=True)
    else:
        axes = _orthonormal_columns(random.gaussian(seed, random.Purpose.GAUSSIAN, 0, (n, max(c - 1, 1))))
        corners = helmert(c).T * np.sqrt(c / (c - 1)) if c > 1 else np.ones((1, 1))
        result = corners @ axes.T
    result = np.ascontiguousarray(result, dtype=np.float32)
    result.flags.writeable = False
    return result


def _signs(index: int, count: int) -> np.ndarray:
    return 1.0 - 2.0 * random.sign_bits(0, random.Purpose.SKETCH, index, count)


def sketch(matrix: np.ndarray) -> str:
    """32 numbers u^T Q v with fixed sign vectors u and v, written as "sketch:1.2345,...".

    Args:
        matrix: Codebook, float32 [C, N].
    """
    c, n = matrix.shape
    numbers = [
        _signs(2 * i, c) @ (matrix @ _signs(2 * i + 1, n).astype(np.float32)).astype(np.float64)
        for i in range(SKETCH_NUMBERS)
    ]
    return "sketch:" + ",".join(f"{number:.5f}" for number in numbers)


def same_sketch(first: str, second: str, num_classes: int) -> bool:
    """Whether two sketches are of the same codebook, up to rounding."""
    a, b = (np.array([float(x) for x in text.removeprefix("sketch:").split(",")]) for text in (first, second))
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= SKETCH_TOLERANCE * num_classes**0.5))
