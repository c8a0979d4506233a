"""What a built model shows: its names and shapes, its signature, and its traits."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules import activation, conv, pooling

from fixify.catalogue.signature import (
    FreeDimensions,
    Shape,
    Signature,
    StateShapes,
    Trait,
    head_positions,
    headless_digest,
)
from fixify.errors import ArchitectureError
from fixify.models.architectures import Architecture, build, preprocessing

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
        headless=headless_digest(state.sorted, free, head_positions(free)),
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
