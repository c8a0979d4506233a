"""Finite fields, only as far as the Hadamard and Kerdock constructions need them.

Elements of GF(p^k) are the integers 0 .. p^k - 1, whose base-p digits (lowest first) are the coefficients of a
polynomial over GF(p). The modulus is the first irreducible polynomial in counting order (for GF(2^m): the first
primitive one), so every machine builds the same field.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in itertools.chain((2,), range(3, int(q**0.5) + 1, 2)) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _digits(values: np.ndarray, p: int, k: int) -> np.ndarray:
    """Base-p digits, lowest first: int64 [..., k]."""
    return values[..., None] // p ** np.arange(k) % p


def _monic(index: int, p: int, degree: int) -> list[int]:
    """The `index`-th monic polynomial of that degree over GF(p), coefficients lowest first."""
    return [*(int(d) for d in _digits(np.array(index), p, degree)), 1]


def _remainder(dividend: list[int], divisor: list[int], p: int) -> list[int]:
    """Remainder of `dividend` by the monic `divisor`, coefficients lowest first, over GF(p)."""
    rest = list(dividend)
    shift = len(divisor) - 1
    for top in range(len(rest) - 1, shift - 1, -1):
        lead = rest[top]
        if lead:
            for i, c in enumerate(divisor):
                rest[top - shift + i] = (rest[top - shift + i] - lead * c) % p
    return rest[:shift]


def _irreducible(p: int, k: int) -> list[int]:
    """First monic irreducible polynomial of degree k over GF(p)."""
    divisors = [_monic(i, p, d) for d in range(1, k // 2 + 1) for i in range(p**d)]
    for index in range(p**k):
        candidate = _monic(index, p, k)
        if all(any(_remainder(candidate, divisor, p)) for divisor in divisors):
            return candidate
    raise AssertionError(f"an irreducible polynomial of degree {k} over GF({p}) exists")  # unreachable


def jacobsthal(p: int, k: int) -> np.ndarray:
    """Jacobsthal matrix of GF(q), q = p^k odd: entry (i, j) is the quadratic character of a_i - a_j.

    Returns:
        int8 [q, q]; 0 on the diagonal, +1 where the difference is a nonzero square, -1 elsewhere.
    """
    q = p**k
    digits = _digits(np.arange(q), p, k)
    character = np.full(q, -1, dtype=np.int8)
    if k == 1:
        character[np.arange(q, dtype=np.int64) ** 2 % q] = 1
    else:
        square = np.zeros((q, 2 * k - 1), dtype=np.int64)
        for i in range(k):
            square[:, i : i + k] += digits[:, i : i + 1] * digits
        square %= p
        modulus = np.array(_irreducible(p, k))
        for top in range(2 * k - 2, k - 1, -1):
            square[:, top - k : top + 1] = (square[:, top - k : top + 1] - square[:, top : top + 1] * modulus) % p
        character[square[:, :k] @ p ** np.arange(k)] = 1
    character[0] = 0
    difference = np.zeros((q, q), dtype=np.int32)
    for i, column in enumerate(digits.T.astype(np.int32)):
        difference += (column[:, None] - column) % p * p**i
    return character[difference]


@lru_cache(maxsize=8)
def _tables(m: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of a primitive element of GF(2^m) and their logarithms (log of 0 is -1); int64 [2^m - 1], [2^m]."""
    order = 2**m - 1
    for modulus in range(2**m + 1, 2 ** (m + 1), 2):
        powers, value = [], 1
        for _ in range(order):
            powers.append(value)
            value <<= 1
            if value >> m:
                value ^= modulus
            if value == 1:
                break
        if len(powers) == order:
            exp = np.array(powers, dtype=np.int64)
            log = np.full(2**m, -1, dtype=np.int64)
            log[exp] = np.arange(order)
            return exp, log
    raise AssertionError(f"a primitive polynomial of degree {m} exists")  # unreachable


def multiply_gf2(m: int, scalar: int, values: np.ndarray) -> np.ndarray:
    """Products of `scalar` with every element of `values` in GF(2^m)."""
    exp, log = _tables(m)
    if scalar == 0:
        return np.zeros_like(values)
    return np.where(values == 0, 0, exp[(log[scalar] + log[values]) % len(exp)])


def power_gf2(m: int, values: np.ndarray, exponent: int) -> np.ndarray:
    """`values ** exponent` in GF(2^m), exponent > 0."""
    exp, log = _tables(m)
    return np.where(values == 0, 0, exp[log[values] * exponent % len(exp)])


def trace_gf2(m: int, values: np.ndarray) -> np.ndarray:
    """Absolute trace x + x^2 + x^4 + ... of elements of GF(2^m): 0 or 1, int64."""
    total = np.zeros_like(values)
    for j in range(m):
        total ^= power_gf2(m, values, 2**j)
    return total
