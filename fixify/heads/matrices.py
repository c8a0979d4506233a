"""Exact Hadamard matrices at the order itself, without padding to a power of two and truncating.

An order is built as a Kronecker product of Sylvester's matrices (2^k), Paley's first construction (q + 1, q a prime
power, q = 3 mod 4) and his second (2(q + 1), q = 1 mod 4); see Hedayat & Wallis, "Hadamard matrices and their
applications" (1978), which the paper cites in section 2.3. The construction is a string such as
"sylvester-64*paley1-20", factors in the order of the Kronecker product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from fixify.errors import HeadSpecError
from fixify.heads.galois import jacobsthal, prime_power

MAX_ORDER = 65_536
"""Largest order that is built."""
MAX_PALEY_ORDER = 8_192
"""Largest Paley factor: its matrix is held in full (Sylvester's is split into small factors and never is)."""

_FACTOR = re.compile(r"(sylvester|paley1|paley2)-([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Factor:
    """One factor of a Kronecker product: `kind` is "sylvester", "paley1" or "paley2"."""

    kind: str
    order: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.order}"


Construction = tuple[Factor, ...]


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _paley_kind(order: int) -> str | None:
    """Which of Paley's constructions gives this order (the first where both do), or None."""
    return next((kind for kind in ("paley1", "paley2") if _is_paley_order(kind, order)), None)


def _is_paley_order(kind: str, order: int) -> bool:
    if order % 4 or order > MAX_PALEY_ORDER:
        return False
    q, residue = (order - 1, 3) if kind == "paley1" else (order // 2 - 1, 1)
    return q % 4 == residue and prime_power(q) is not None


@lru_cache(maxsize=4096)
def _paley_orders(n: int) -> tuple[int, ...] | None:
    """Orders of the Paley factors of n, largest first; what is left over is a power of two. None: not constructible.

    Of all ways, the one with the smallest largest factor (the fast product costs its order), then the fewest.
    """
    if _power_of_two(n):
        return ()
    options = []
    for order in range(12, n + 1, 4):
        if n % order or _power_of_two(order) or _paley_kind(order) is None:
            continue
        rest = _paley_orders(n // order)
        if rest is not None:
            options.append(tuple(sorted((order, *rest), reverse=True)))
    return min(options, key=lambda orders: (orders[0], len(orders), orders), default=None)


def is_constructible(n: int) -> bool:
    """Whether a Hadamard matrix of order n can be built here (1 and 2 included)."""
    return 1 <= n <= MAX_ORDER and _paley_orders(n) is not None


def factorise(n: int) -> Construction:
    """The factors from which order n is built: one Sylvester factor (if any), then Paley factors, largest first.

    Raises:
        HeadSpecError: No construction of that order is known here.
    """
    if n > MAX_ORDER:
        raise HeadSpecError(f"Hadamard matrices are built up to order {MAX_ORDER}, got {n}.")
    orders = _paley_orders(n) if n >= 1 else None
    if orders is None:
        raise HeadSpecError(
            f"No Hadamard matrix of order {n} can be built (Sylvester, Paley I and II and their products).",
            hint="Use `--head orthogonal`, or `--head auto`, which picks it where it is needed.",
        )
    sylvester = n
    for order in orders:
        sylvester //= order
    factors = [Factor("sylvester", sylvester)] if sylvester > 1 or not orders else []
    return (*factors, *(Factor(_paley_kind(order) or "", order) for order in orders))


def format_construction(construction: Construction) -> str:
    """The construction as it is written into a head spec, for example "sylvester-64*paley1-20"."""
    return "*".join(map(str, construction))


def parse_construction(text: str, order: int) -> Construction:
    """The construction that `format_construction` wrote. Checked, since it may come from a file.

    Raises:
        HeadSpecError: Not a construction, or not one of that order.
    """
    factors = []
    product = 1
    for part in text.split("*") if len(text) <= 200 else [""]:
        match = _FACTOR.fullmatch(part)
        if match is None:
            raise HeadSpecError(
                f"{text[:60]!r} is not a Hadamard construction; expected factors such as 'sylvester-64*paley1-20'."
            )
        factor = Factor(match[1], int(match[2]))
        product *= factor.order
        if product > order:
            break
        sylvester = factor.kind == "sylvester"
        if not (_power_of_two(factor.order) if sylvester else _is_paley_order(factor.kind, factor.order)):
            raise HeadSpecError(f"There is no {factor.kind} matrix of order {factor.order} ({text!r}).")
        factors.append(factor)
    if product != order:
        raise HeadSpecError(f"The Hadamard construction {text!r} is not of order {order}.")
    return tuple(factors)


def elementary(construction: Construction) -> Construction:
    """The same matrix with every Sylvester factor written as a product of factors of order 2 (Paley's stay whole)."""
    two = Factor("sylvester", 2)
    return tuple(
        part
        for factor in construction
        for part in ((two,) * (factor.order.bit_length() - 1) if factor.kind == "sylvester" else (factor,))
    )


def order_of(construction: Construction) -> int:
    """Product of the orders of the factors."""
    return prod(factor.order for factor in construction)


@lru_cache(maxsize=8)
def factor_matrix(factor: Factor) -> np.ndarray:
    """The Hadamard matrix of one factor: int8 [n, n] of +-1, first row all ones, read-only."""
    if factor.kind == "sylvester":
        matrix = np.ones((1, 1), dtype=np.int8)
        while len(matrix) < factor.order:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    else:
        first = factor.kind == "paley1"
        q = factor.order - 1 if first else factor.order // 2 - 1
        power = prime_power(q)
        if power is None:
            raise HeadSpecError(f"There is no {factor.kind} matrix of order {factor.order}.")
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
    """Some rows of the Kronecker product of the factors, without building the rest.

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
    """An exact Hadamard matrix of order n: H @ H.T = n I in integers.

    Returns:
        int8 [n, n] of +-1; the first row is all ones.

    Raises:
        HeadSpecError: No construction of that order is known here.
    """
    return rows(factorise(n), np.arange(n))
