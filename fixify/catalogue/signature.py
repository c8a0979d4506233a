"""Describe an architecture by the names and shapes of its tensors, and by what it computes.

A signature holds the names and shapes without the dimensions that whoever trained a checkpoint chose: the number of
classes, of input channels, and (where position embeddings depend on it) the image size. These free dimensions are found
by building the architecture on the meta device with different choices and comparing the shapes (`fixify.models.built`).

Two architectures can have the same names and shapes and still compute different things: timm's `efficientnet_b0` pads
evenly, `tf_efficientnet_b0` as TensorFlow does. Traits (activation, padding, strides, epsilons, ...) tell these apart.

Importing this module needs neither torch nor timm.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Shape = tuple[int, ...]
# (digest of the values in the order of the modules, the distinct values as text)
Trait = tuple[str, str]


@dataclass(frozen=True)
class FreeDimensions:
    """Dimensions that depend on one choice in the same way.

    Attributes:
        choice: "num_classes", or the builder's argument: "in_chans", "img_size", "image_size".
        samples: (choice, dimension) pairs. The dimension is the polynomial through them: two pairs where it grows
            linearly, three for the image size (tokens and relative positions grow with its square).
        places: (index of the key in sorted order, index of the key in the state dict's order, axis).
    """

    choice: str
    samples: tuple[tuple[int, int], ...]
    places: tuple[tuple[int, int, int], ...]

    def solve(self, dimension: int) -> set[int]:
        """Return the positive integer choices that give this dimension."""
        near = {round(root) for root in _roots(self.samples, dimension)}
        return {choice for choice in near if choice > 0 and self.at(choice) == dimension}

    def at(self, choice: int) -> int:
        """Return the dimension that a choice gives; -1 if that is no integer."""
        found = _interpolate(self.samples, choice)
        return int(found) if found.denominator == 1 else -1


@dataclass(frozen=True)
class Signature:
    """Digests of an architecture's names and shapes, without BatchNorm's counters.

    Attributes:
        num_tensors: Number of tensors.
        keys: Digest of the sorted names.
        named: Digest of the names with their shapes, sorted by name, free dimensions masked.
        ordered: Digest of the shapes in the state dict's order, free dimensions masked.
        headless: Like `named`, without the classifier's tensors.
        free: The free dimensions.
        defaults: The architecture's default for each choice except the number of classes.
    """

    num_tensors: int
    keys: str
    named: str
    ordered: str
    headless: str
    free: tuple[FreeDimensions, ...]
    defaults: Mapping[str, int]


class StateShapes:
    """Names and shapes of a state dict without BatchNorm's counters, prepared for comparison with many signatures.

    Args:
        shapes: Name -> shape, in the order in which the tensors are stored.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.ordered = [(key, tuple(shape)) for key, shape in shapes.items() if not is_counter(key)]
        self.sorted = sorted(self.ordered)
        self.keys = _digest(key for key, _ in self.sorted)

    def named(self, free: Iterable[FreeDimensions]) -> str:
        """Compute `Signature.named` for these shapes."""
        return _digest(f"{key} {shape}" for key, shape in _masked(self.sorted, free, 0))

    def headless(self, free: Sequence[FreeDimensions]) -> str:
        """Compute `Signature.headless` for these shapes, taken as a model without its classifier."""
        entries = list(self.sorted)
        head = head_positions(free)
        for position in head:
            entries.insert(position, ("", ()))
        return headless_digest(entries, free, head)

    def by_order(self, free: Iterable[FreeDimensions]) -> str:
        """Compute `Signature.ordered` for these shapes."""
        return _digest(str(shape) for _, shape in _masked(self.ordered, free, 1))

    def choices(self, free: Iterable[FreeDimensions]) -> dict[str, int] | None:
        """Read the choices from the free dimensions; None if the dimensions contradict each other.

        Args:
            free: The free dimensions of the signature that has the same names.
        """
        possible: dict[str, set[int]] = {}
        for group in free:
            for place in group.places:
                shape = self.sorted[place[0]][1]
                found = group.solve(shape[place[2]]) if place[2] < len(shape) else set()
                possible[group.choice] = possible.get(group.choice, found) & found
        if not all(possible.values()):
            return None
        return {choice: min(values) for choice, values in possible.items()}


def is_counter(key: str) -> bool:
    """Return whether a state dict's key is the batch counter of a BatchNorm layer.

    Old checkpoints and ports from other frameworks lack the counters, and no prediction depends on them.

    >>> is_counter("layer1.0.bn1.num_batches_tracked"), is_counter("layer1.0.bn1.weight")
    (True, False)
    """
    return key.rpartition(".")[2] == "num_batches_tracked"


def head_positions(free: Iterable[FreeDimensions]) -> list[int]:
    """Return the positions of the classifier's tensors among the sorted names."""
    return sorted({place[0] for group in free if group.choice == "num_classes" for place in group.places})


def headless_digest(entries: Sequence[tuple[str, Shape]], free: Sequence[FreeDimensions], head: Sequence[int]) -> str:
    """Compute `Signature.headless` from the names and shapes of a whole model.

    Args:
        entries: The names and shapes, sorted by name.
        free: The free dimensions.
        head: Positions of the classifier's tensors; see `head_positions`.
    """
    others = [group for group in free if group.choice != "num_classes"]
    kept = [entry for position, entry in enumerate(_masked(entries, others, 0)) if position not in set(head)]
    return _digest(f"{key} {shape}" for key, shape in kept)


def _masked(
    entries: Sequence[tuple[str, Shape]], free: Iterable[FreeDimensions], column: int
) -> list[tuple[str, Shape]]:
    masked = list(entries)
    for group in free:
        for place in group.places:
            key, shape = masked[place[column]]
            masked[place[column]] = (key, tuple(-1 if dim == place[2] else d for dim, d in enumerate(shape)))
    return masked


def _interpolate(samples: Sequence[tuple[int, int]], x: int) -> Fraction:
    """Evaluate the polynomial through the samples at x, exactly (Lagrange)."""
    total = Fraction(0)
    for index, (xi, yi) in enumerate(samples):
        others = [xj for position, (xj, _) in enumerate(samples) if position != index]
        total += yi * Fraction(math.prod(x - xj for xj in others), math.prod(xi - xj for xj in others))
    return total


def _roots(samples: Sequence[tuple[int, int]], y: int) -> list[float]:
    """Find where the polynomial of degree 1 or 2 through the samples equals y."""
    c = float(_interpolate(samples, 0)) - y
    at_one, at_minus_one = (float(_interpolate(samples, x)) - y for x in (1, -1))
    a, b = (at_one + at_minus_one) / 2 - c, (at_one - at_minus_one) / 2
    if abs(a) < 1e-12 * max(abs(b), 1.0):
        return [-c / b] if b else []
    discriminant = b * b - 4 * a * c
    if discriminant < 0:
        return []
    root = math.sqrt(discriminant)
    return [(-b - root) / (2 * a), (-b + root) / (2 * a)]


def _digest(lines: Iterable[str]) -> str:
    """Hash the lines to 64 bits, enough to tell the architectures of a few libraries apart."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
