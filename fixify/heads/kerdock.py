"""Kerdock's set: sign vectors that turn one Hadamard matrix into many that meet at the Welch-like angle 1/sqrt(N).

For N = 4^k there are N/2 sign vectors D_a such that any row of +-H diag(D_a) and any row of +-H diag(D_b), a != b,
have |cosine| exactly 1/sqrt(N), where H is Sylvester's matrix: N^2 codes, and no larger set of that angle exists.
Kerdock, "A class of low-rate nonlinear binary codes" (1972); the form used here is MacWilliams & Sloane, "The theory
of error-correcting codes", chapter 15, section 5.
"""

from __future__ import annotations

import numpy as np

from fixify.heads.galois import multiply_gf2, power_gf2, trace_gf2


def has_kerdock_set(n: int) -> bool:
    """Whether n is 4, 16, 64, ..."""
    return n >= 4 and n & (n - 1) == 0 and n.bit_length() % 2 == 1


def kerdock_bits(n: int, start: int, stop: int) -> np.ndarray:
    """Sign vectors D_start .. D_(stop - 1) of the Kerdock set of order n = 4^k.

    Position x + eps n/2 of D_a is (-1)^Q_a(x, eps) with, for x and a in GF(2^(m - 1)), m = 2k:
    Q_a(x, eps) = sum over j = 1 .. (m - 2)/2 of Tr((a x)^(2^j + 1)), plus eps Tr(a x).

    Args:
        n: A power of four.
        start, stop: Which vectors, within 0 .. n/2. Vector 0 is all plus.

    Returns:
        uint8 [stop - start, n]; 1 is a minus sign.
    """
    degree = n.bit_length() - 2
    elements = np.arange(n // 2, dtype=np.int64)
    linear = trace_gf2(degree, elements)
    quadratic = np.zeros_like(elements)
    for j in range(1, (degree - 1) // 2 + 1):
        quadratic ^= trace_gf2(degree, power_gf2(degree, elements, 2**j + 1))
    bits = np.empty((stop - start, n), dtype=np.uint8)
    for a in range(start, stop):
        product = multiply_gf2(degree, a, elements)
        bits[a - start, : n // 2] = quadratic[product]
        bits[a - start, n // 2 :] = quadratic[product] ^ linear[product]
    return bits
