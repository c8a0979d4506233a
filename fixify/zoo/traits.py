"""What a network does that its weights do not show: activation, padding, strides, epsilons and the like.

Two architectures can have the same names and shapes and compute different things: timm's `efficientnet_b0` pads
evenly, `tf_efficientnet_b0` as TensorFlow does. These are the facts by which such architectures are told apart.
"""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn
from torch.nn.modules import activation, conv, pooling

# (digest of the values in the order of the modules, the distinct values for a person)
Trait = tuple[str, str]

# What has no effect on predictions, follows from the choices that a signature leaves free, or is a general trait.
_IRRELEVANT = {
    *("training", "drop_prob", "p", "momentum", "inplace", "drop_rate", "checkpointing", "grad_checkpointing"),
    *("num_classes", "out_features", "out_channels", "num_batches_tracked", "stochastic_depth_prob", "keep_prob"),
    *("scale_by_keep", "fused_attn", "dynamo", "exportable", "scriptable", "fast_attn", "name", "path_drop_prob"),
    *("img_size", "grid_size", "num_patches", "input_resolution", "eps", "padding", "stride", "ceil_mode"),
}
_ACTIVATION_NAMES = {"Swish": "SiLU", "SwishMe": "SiLU", "HardSwish": "Hardswish", "GELUTanh": "GELU (tanh)"}


def traits(model: nn.Module) -> dict[str, Trait]:
    """The facts of a built model.

    Returns:
        The general ones ("activation", "padding", "stride", "epsilon", "pooling"), by which any two networks can be
        compared, and one for each plain attribute of the modules (".class", ".num_heads", ...), by which only networks
        of one library can.
    """
    values: dict[str, list[str]] = {}
    for module in model.modules():
        for name, value in _general(module).items():
            values.setdefault(name, []).append(value)
        values.setdefault(".class", []).append(type(module).__name__)
        for name, attribute in vars(module).items():
            if not name.startswith("_") and name not in _IRRELEVANT and _is_plain(attribute):
                values.setdefault(f".{name}", []).append(repr(attribute))
    return {name: (_digest(found), _distinct(found)) for name, found in values.items()}


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


def _digest(values: list[str]) -> str:
    return hashlib.sha256("\n".join(values).encode()).hexdigest()[:12]
