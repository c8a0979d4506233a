"""Exact Hadamard matrices at the order itself, and the sign vectors that make many blocks of one matrix.

`fixify.heads.constructions` says which orders there are, and of which factors they are made.

More than 2N codes come from further blocks H diag(D) with sign vectors D: Kerdock's where N = 4^k, else seeded ones.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fixify.errors import HeadSpecError
from fixify.heads import streams
from fixify.heads.constructions import (
    Construction,
    Factor,
    elementary,
    factorise,
    format_construction,
    has_kerdock_set,
    order_of,
    prime_power,
)

# --- Finite fields -------------------------------------------------------------------------------------------------
#
# Elements of GF(p^k) are the integers 0 .. p^k - 1, whose base-p digits (lowest first) are the coefficients of a
# polynomial over GF(p). The modulus is the first irreducible polynomial in counting order (for GF(2^m): the first
# primitive one), so every machine builds the same field.


def _digits(values: np.ndarray, p: int, k: int) -> np.ndarray:
    """Split integers into base-p digits, lowest first: int64 [..., k]."""
    return values[..., None] // p ** np.arange(k) % p


def _monic(index: int, p: int, degree: int) -> list[int]:
    """Return monic polynomial number `index` of a degree over GF(p), coefficients lowest first."""
    return [*(int(d) for d in _digits(np.array(index), p, degree)), 1]


def _remainder(dividend: list[int], divisor: list[int], p: int) -> list[int]:
    """Divide polynomials over GF(p) by a monic divisor and return the remainder, coefficients lowest first."""
    rest = list(dividend)
    shift = len(divisor) - 1
    for top in range(len(rest) - 1, shift - 1, -1):
        lead = rest[top]
        if lead:
            for i, c in enumerate(divisor):
                rest[top - shift + i] = (rest[top - shift + i] - lead * c) % p
    return rest[:shift]


def _irreducible(p: int, k: int) -> list[int]:
    """Find the first monic irreducible polynomial of degree k over GF(p)."""
    divisors = [_monic(i, p, d) for d in range(1, k // 2 + 1) for i in range(p**d)]
    for index in range(p**k):
        candidate = _monic(index, p, k)
        if all(any(_remainder(candidate, divisor, p)) for divisor in divisors):
            return candidate
    raise AssertionError(f"an irreducible polynomial of degree {k} over GF({p}) exists")  # unreachable


def jacobsthal(p: int, k: int) -> np.ndarray:
    """Build the Jacobsthal matrix of GF(q), q = p^k odd: entry (i, j) is the quadratic character of a_i - a_j.

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
    """Tabulate powers of a primitive element of GF(2^m) and logarithms (-1 for 0); int64 [2^m - 1] and [2^m]."""
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


def _multiply_gf2(m: int, scalar: int, values: np.ndarray) -> np.ndarray:
    """Multiply every element of `values` by `scalar` in GF(2^m)."""
    exp, log = _tables(m)
    if scalar == 0:
        return np.zeros_like(values)
    return np.where(values == 0, 0, exp[(log[scalar] + log[values]) % len(exp)])


def _power_gf2(m: int, values: np.ndarray, exponent: int) -> np.ndarray:
    """Raise every element of `values` to a power > 0 in GF(2^m)."""
    exp, log = _tables(m)
    return np.where(values == 0, 0, exp[log[values] * exponent % len(exp)])


def _trace_gf2(m: int, values: np.ndarray) -> np.ndarray:
    """Compute the absolute trace x + x^2 + x^4 + ... of elements of GF(2^m): 0 or 1, int64."""
    total = np.zeros_like(values)
    for j in range(m):
        total ^= _power_gf2(m, values, 2**j)
    return total


# --- Matrices -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def factor_matrix(factor: Factor) -> np.ndarray:
    """Build the Hadamard matrix of one factor.

    Returns:
        int8 [n, n] of +-1, first row all ones, read-only.
    """
    if factor.family == "sylvester":
        matrix = np.ones((1, 1), dtype=np.int8)
        while len(matrix) < factor.order:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    else:
        first = factor.family == "paley1"
        q = factor.order - 1 if first else factor.order // 2 - 1
        power = prime_power(q)
        if power is None:
            raise HeadSpecError(f"There is no {factor.family} matrix of order {factor.order}.")
        bordered = np.zeros((q + 1, q + 1), dtype=np.int8)
        bordered[0, 1:] = 1
        bordered[1:, 0] = -1 if first else 1
        bordered[1:, 1:] = jacobsthal(*power)
        identity = np.eye(q + 1, dtype=np.int8)
        if first:
            matrix = bordered + identity
        else:
            plus = np.array([[1, 1], [1, -1]], dtype=np.int8)
            minus = np.array([[1, -1], [-1, -1]], dtype=np.int8)
            matrix = np.kron(bordered, plus) + np.kron(identity, minus)
    matrix = matrix * matrix[:1]  # flip columns until the first row is all ones
    matrix.flags.writeable = False
    return matrix


def rows(construction: Construction, indices: np.ndarray) -> np.ndarray:
    """Build some rows of a Hadamard matrix without building the rest.

    Args:
        construction: The factors, of orders n_1, n_2, ... with product n.
        indices: Row numbers 0 .. n - 1, integers [k].

    Returns:
        int8 [k, n] of +-1. Row 0 is all ones.
    """
    result = np.ones((len(indices), 1), dtype=np.int8)
    below = order_of(construction)
    for factor in elementary(construction):
        below //= factor.order
        picked = factor_matrix(factor)[indices // below % factor.order]
        result = (result[:, :, None] * picked[:, None, :]).reshape(len(indices), -1)
    return result


def hadamard(n: int) -> np.ndarray:
    """Build an exact Hadamard matrix of order n: H @ H.T = n I in integers.

    Returns:
        int8 [n, n] of +-1; the first row is all ones.

    Raises:
        HeadSpecError: No construction of that order is known here.

    >>> hadamard(4)
    array([[ 1,  1,  1,  1],
           [ 1, -1,  1, -1],
           [ 1,  1, -1, -1],
           [ 1, -1, -1,  1]], dtype=int8)
    """
    return rows(factorise(n), np.arange(n))


# --- Blocks --------------------------------------------------------------------------------------------------------


def kerdock_bits(n: int, start: int, stop: int) -> np.ndarray:
    """Build sign vectors D_start .. D_(stop - 1) of the Kerdock set of order n = 4^k.

    The set has n/2 sign vectors D_a such that any row of +-H diag(D_a) and any row of +-H diag(D_b), a != b, have
    |cosine| exactly 1/sqrt(n), where H is Sylvester's matrix. These are n^2 codes; no larger set with that angle
    exists. Kerdock, "A class of low-rate nonlinear binary codes" (1972), in the form of MacWilliams & Sloane, "The
    theory of error-correcting codes", chapter 15, section 5: position x + eps n/2 of D_a is (-1)^Q_a(x, eps) with, for
    x and a in GF(2^(m - 1)) and m = 2k,

        Q_a(x, eps) = sum over j = 1 .. (m - 2)/2 of Tr((a x)^(2^j + 1)), plus eps Tr(a x).

    Args:
        n: A power of four.
        start: First vector, within 0 .. n/2. Vector 0 is all plus.
        stop: End of the range of vectors.

    Returns:
        uint8 [stop - start, n]; 1 is a minus sign.
    """
    degree = n.bit_length() - 2
    elements = np.arange(n // 2, dtype=np.int64)
    linear = _trace_gf2(degree, elements)
    quadratic = np.zeros_like(elements)
    for j in range(1, (degree - 1) // 2 + 1):
        quadratic ^= _trace_gf2(degree, _power_gf2(degree, elements, 2**j + 1))
    bits = np.empty((stop - start, n), dtype=np.uint8)
    for a in range(start, stop):
        product = _multiply_gf2(degree, a, elements)
        bits[a - start, : n // 2] = quadratic[product]
        bits[a - start, n // 2 :] = quadratic[product] ^ linear[product]
    return bits


def block_bits(construction: Construction, seed: int, blocks: np.ndarray) -> np.ndarray:
    """Build the sign vectors of some blocks. They depend on the matrix, the seed and the block's number alone.

    Block 0 is all plus. Blocks below N/2 are Kerdock's where N = 4^k and the matrix is Sylvester's; all others are
    read from the seeded stream.

    Args:
        construction: The Hadamard matrix, of order N.
        seed: Seed of the head spec.
        blocks: Block numbers, integers [k].

    Returns:
        uint8 [k, N]; 1 is a minus sign.
    """
    n = order_of(construction)
    kerdock = has_kerdock_set(n) and format_construction(construction) == f"sylvester-{n}"
    bits = np.zeros((len(blocks), n), dtype=np.uint8)
    for i, block in enumerate(blocks.tolist()):
        if kerdock and block < n // 2:
            bits[i] = kerdock_bits(n, block, block + 1)[0]
        elif block:
            bits[i] = streams.sign_bits(seed, streams.Purpose.BLOCK_SIGNS, block, n)
    return bits


def block_signs(construction: Construction, seed: int, blocks: np.ndarray) -> np.ndarray:
    """Build the sign vectors of some blocks as numbers: float32 [k, N] of +-1. See `block_bits`."""
    return 1.0 - 2.0 * block_bits(construction, seed, blocks).astype(np.float32)
