"""The orders at which exact Hadamard matrices are known, and the factors that they are made of.

The paper's published code pads the order to a power of two and truncates the rows. Here an order is built as it is,
as a Kronecker product of Sylvester's matrices (2^k), Paley's first construction (q + 1, q a prime power, q = 3 mod 4)
and Paley's second (2(q + 1), q = 1 mod 4); see Hedayat & Wallis, "Hadamard matrices and their applications" (1978),
which the paper cites in section 2.3. A construction is written as a string such as "sylvester-64*paley1-20", with the
factors in the order of the Kronecker product.

`fixify.heads.matrices` builds the matrices. This module needs no NumPy, so that reading a head spec is quick.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from fixify.errors import HeadSpecError

MAX_ORDER = 65_536
"""Largest order that is built."""
MAX_PALEY_ORDER = 8_192
"""Largest Paley factor: its matrix is held in full, while Sylvester's is split into small factors."""

_FACTOR = re.compile(r"(sylvester|paley1|paley2)-([1-9][0-9]{0,5})")


def prime_power(q: int) -> tuple[int, int] | None:
    """Write q as p^k with p prime.

    Returns:
        (p, k), or None if q is not a prime power.
    """
    if q < 2:
        return None
    p = next((d for d in itertools.chain((2,), range(3, int(q**0.5) + 1, 2)) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


@dataclass(frozen=True)
class Factor:
    """One factor of a Kronecker product: `family` is "sylvester", "paley1" or "paley2"."""

    family: str
    order: int

    def __str__(self) -> str:
        return f"{self.family}-{self.order}"


Construction = tuple[Factor, ...]


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _paley_family(order: int) -> str | None:
    """Return the Paley construction of an order (the first where both exist), or None."""
    return next((family for family in ("paley1", "paley2") if _is_paley_order(family, order)), None)


def _is_paley_order(family: str, order: int) -> bool:
    if order % 4 or order > MAX_PALEY_ORDER:
        return False
    q, residue = (order - 1, 3) if family == "paley1" else (order // 2 - 1, 1)
    return q % 4 == residue and prime_power(q) is not None


@lru_cache(maxsize=4096)
def _paley_orders(n: int) -> tuple[int, ...] | None:
    """Split off the orders of the Paley factors of n, largest first; the rest is a power of two.

    Of all splits, take the one with the smallest largest factor (the fast product costs its order), then the one with
    the fewest factors.

    Returns:
        The orders, or None if n cannot be built.
    """
    if _is_power_of_two(n):
        return ()
    options = []
    for order in range(12, n + 1, 4):
        if n % order or _is_power_of_two(order) or _paley_family(order) is None:
            continue
        rest = _paley_orders(n // order)
        if rest is not None:
            options.append(tuple(sorted((order, *rest), reverse=True)))
    return min(options, key=lambda orders: (orders[0], len(orders), orders), default=None)


def is_constructible(n: int) -> bool:
    """Check whether a Hadamard matrix of order n can be built here (1 and 2 included).

    >>> is_constructible(1280), is_constructible(386)
    (True, False)
    """
    return 1 <= n <= MAX_ORDER and _paley_orders(n) is not None


def factorise(n: int) -> Construction:
    """Choose the factors of order n: one Sylvester factor (if any), then Paley factors, largest first.

    Raises:
        HeadSpecError: No construction of that order is known here.

    >>> format_construction(factorise(1280))
    'sylvester-64*paley1-20'
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
    return (*factors, *(Factor(_paley_family(order) or "", order) for order in orders))


def format_construction(construction: Construction) -> str:
    """Write a construction as in a head spec, for example "sylvester-64*paley1-20"."""
    return "*".join(map(str, construction))


def parse_construction(text: str, order: int) -> Construction:
    """Read what `format_construction` wrote. The text is checked strictly, since it may come from a file.

    Args:
        text: The construction.
        order: Order that the product of the factors must have.

    Raises:
        HeadSpecError: `text` is no construction, or not one of that order.
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
        sylvester = factor.family == "sylvester"
        if not (_is_power_of_two(factor.order) if sylvester else _is_paley_order(factor.family, factor.order)):
            raise HeadSpecError(f"There is no {factor.family} matrix of order {factor.order} ({text!r}).")
        factors.append(factor)
    if product != order:
        raise HeadSpecError(f"The Hadamard construction {text!r} is not of order {order}.")
    return tuple(factors)


def elementary(construction: Construction) -> Construction:
    """Split every Sylvester factor into factors of order 2; Paley factors stay whole. The matrix is the same."""
    two = Factor("sylvester", 2)
    return tuple(
        part
        for factor in construction
        for part in ((two,) * (factor.order.bit_length() - 1) if factor.family == "sylvester" else (factor,))
    )


def order_of(construction: Construction) -> int:
    """Multiply the orders of the factors."""
    return prod(factor.order for factor in construction)


def power_of_two_from(n: int) -> int:
    """Return the smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def has_kerdock_set(n: int) -> bool:
    """Check whether n is a power of four from 4 on."""
    return n >= 4 and n & (n - 1) == 0 and n.bit_length() % 2 == 1
