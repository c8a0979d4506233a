"""Describe an architecture by the names and shapes of its tensors, and by what it computes.

A signature holds the names and shapes without the dimensions that whoever trained a checkpoint chose: the number of
classes, of input channels, and (where position embeddings depend on it) the image size. These free dimensions are found
by building the architecture on the meta device with different choices and comparing the shapes.

Two architectures can have the same names and shapes and still compute different things: timm's `efficientnet_b0` pads
evenly, `tf_efficientnet_b0` as TensorFlow does. Traits (activation, padding, strides, epsilons, ...) tell these apart.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn
from torch.nn.modules import activation, conv, pooling

from fixify.errors import ArchitectureError
from fixify.models.architectures import Architecture, build, preprocessing
from fixify.models.build import is_counter

Shape = tuple[int, ...]
# (digest of the values in the order of the modules, the distinct values as text)
Trait = tuple[str, str]

# A number of classes that cannot be confused with any other dimension of a network.
_MANY_CLASSES = 1_000_003
# Attributes that have no effect on predictions, follow from the free dimensions, or are general traits already.
_IRRELEVANT = {
    *("training", "drop_prob", "p", "momentum", "inplace", "drop_rate", "checkpointing", "grad_checkpointing"),
    *("num_classes", "out_features", "out_channels", "num_batches_tracked", "stochastic_depth_prob", "keep_prob"),
    *("scale_by_keep", "fused_attn", "dynamo", "exportable", "scriptable", "fast_attn", "name", "path_drop_prob"),
    *("img_size", "grid_size", "num_patches", "input_resolution", "eps", "padding", "stride", "ceil_mode"),
}
_ACTIVATION_NAMES = {"Swish": "SiLU", "SwishMe": "SiLU", "HardSwish": "Hardswish", "GELUTanh": "GELU (tanh)"}


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
        return _headless(entries, free, head)

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


def head_positions(free: Iterable[FreeDimensions]) -> list[int]:
    """Return the positions of the classifier's tensors among the sorted names."""
    return sorted({place[0] for group in free if group.choice == "num_classes" for place in group.places})


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Return the names and shapes of a model's state dict, in its order."""
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def signature_of(arch: Architecture) -> tuple[Signature, nn.Module] | None:
    """Build an architecture on the meta device with different choices, and compare the shapes.

    Returns:
        Its signature and the model (on the meta device), or None if it cannot be built with a number of classes.
    """
    model = _try(arch)
    if model is None:
        return None
    base = shapes_of(model)
    state = StateShapes(base)
    free = _free(state, "num_classes", [(0, _scaled(base, 0)), (_MANY_CLASSES, base)])
    if not free:
        return None
    defaults: dict[str, int] = {}
    for choice, default, others in _other_choices(arch):
        models = [_try(replace(arch, kwargs={**arch.kwargs, choice: other})) for other in others]
        built = [(default, base)] + [(other, shapes_of(m)) for other, m in zip(others, models, strict=True) if m]
        found = _free(state, choice, built) if len(built) == len(others) + 1 else []
        if found:
            free += found
            defaults[choice] = default
    return Signature(
        num_tensors=len(state.ordered),
        keys=state.keys,
        named=state.named(free),
        ordered=state.by_order(free),
        headless=_headless(state.sorted, free, head_positions(free)),
        free=tuple(free),
        defaults=defaults,
    ), model


def traits(model: nn.Module) -> dict[str, Trait]:
    """Return the traits of a built model.

    Returns:
        The general traits ("activation", "padding", "stride", "epsilon", "pooling"), which any two networks can be
        compared by, and one trait for each plain attribute of the modules (".class", ".num_heads", ...), which only
        networks of the same library can be compared by.
    """
    values: dict[str, list[str]] = {}
    for module in model.modules():
        for name, value in module_traits(module).items():
            values.setdefault(name, []).append(value)
    return {name: (_digest_of(found), _distinct(found)) for name, found in values.items()}


def module_traits(module: nn.Module) -> dict[str, str]:
    """Return the traits of one module, without those of the modules in it; the names are those of `traits`."""
    plain = {
        f".{name}": repr(attribute)
        for name, attribute in vars(module).items()
        if not name.startswith("_") and name not in _IRRELEVANT and _is_plain(attribute)
    }
    return {**_general(module), ".class": type(module).__name__, **plain}


def _other_choices(arch: Architecture) -> list[tuple[str, int, list[int]]]:
    """Return (argument, its default, other values to try) for each choice but the number of classes."""
    channels, height, width = preprocessing(arch)["input_size"]
    sizes = [2 * height, 3 * height]
    if arch.library == "torchvision":
        return [("image_size", height, sizes)]
    return [("in_chans", channels, [channels + 1])] + ([("img_size", height, sizes)] if height == width else [])


def _try(arch: Architecture) -> nn.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about running the model, which is not run here
            return build(arch, num_classes=_MANY_CLASSES, meta=True)
    # The builders raise different errors for an argument that they do not have.
    except (ArchitectureError, TypeError, ValueError, AssertionError, RuntimeError):
        return None


def _scaled(shapes: Mapping[str, Shape], num_classes: int) -> dict[str, Shape]:
    """Return the shapes for another number of classes: dimensions that are multiples of it are scaled."""
    return {
        key: tuple(num_classes * (d // _MANY_CLASSES) if d and d % _MANY_CLASSES == 0 else d for d in shape)
        for key, shape in shapes.items()
    }


def _free(state: StateShapes, choice: str, built: list[tuple[int, dict[str, Shape]]]) -> list[FreeDimensions]:
    """Find the dimensions that differ between builds, grouped by how they depend on the choice."""
    rank = {key: index for index, (key, _) in enumerate(state.sorted)}
    first = built[0][1]
    if any(list(shapes) != list(first) for _, shapes in built):
        return []  # the choice changes which tensors there are, so it makes another architecture
    groups: dict[tuple[tuple[int, int], ...], list[tuple[int, int, int]]] = {}
    for position, (key, _) in enumerate(state.ordered):
        variants = [shapes[key] for _, shapes in built]
        if len({len(shape) for shape in variants}) != 1:
            return []
        for dim, dims in enumerate(zip(*variants, strict=True)):
            if len(set(dims)) > 1:
                samples = tuple((value, d) for (value, _), d in zip(built, dims, strict=True))
                groups.setdefault(samples, []).append((rank[key], position, dim))
    return [FreeDimensions(choice, samples, tuple(places)) for samples, places in groups.items()]


def _headless(entries: Sequence[tuple[str, Shape]], free: Sequence[FreeDimensions], head: Sequence[int]) -> str:
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


def _general(module: nn.Module) -> dict[str, str]:
    if isinstance(module, conv._ConvNd) and max(module.kernel_size) > 1:
        return {"padding": _padding(module), "stride": str(tuple(module.stride))}
    if isinstance(module, (pooling._MaxPoolNd, nn.AvgPool2d)):
        return {"pooling": _pooling(module)}
    if "eps" in vars(module):
        return {"epsilon": f"{module.eps:g}"}
    if _is_activation(module):
        name = type(module).__name__
        return {"activation": _ACTIVATION_NAMES.get(name, name)}
    return {}


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, (nn.MultiheadAttention, nn.Sigmoid, nn.Softmax)):
        return False
    home = type(module).__module__
    return home == activation.__name__ or home.startswith("timm.layers.activations")


def _padding(module: Any) -> str:
    if module.padding == "same" or "Same" in type(module).__name__:
        return "as TensorFlow (same)"
    even = tuple(d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True))
    return "even" if tuple(module.padding) == even else f"{tuple(module.padding)}"


def _pooling(module: Any) -> str:
    rounding = ", ceil" if module.ceil_mode else ""
    return f"{type(module).__name__}({module.kernel_size}, {module.stride}, {module.padding}{rounding})"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _distinct(values: list[str]) -> str:
    found = list(dict.fromkeys(values))
    return ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")


def _digest_of(values: list[str]) -> str:
    return hashlib.sha256("\n".join(values).encode()).hexdigest()[:12]
