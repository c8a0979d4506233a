"""Building a model for its names and shapes only: no memory for its weights, no time for their initial values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_STORAGE = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.empty_strided}
_VALUES = {torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.eye, torch.randperm}
# What weight initialisation does to a tensor in place. On the meta device these change nothing, yet take most of the
# time of a build. Names, because torch.nn.init's functions and the methods of Tensor are to be skipped alike.
_INITIALISATION = {
    *("normal_", "uniform_", "trunc_normal_", "erfinv_", "bernoulli_", "zero_", "fill_", "copy_"),
    *("mul_", "add_", "sub_", "div_", "clamp_", "constant_", "ones_", "zeros_", "orthogonal_"),
    *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
}


class _MetaBuild(TorchFunctionMode):
    """Tensors are made on the meta device, and giving them values is skipped.

    Args:
        with_values: Also make on meta what is made with values (`arange`, `linspace`, ...). False leaves those on
            the CPU, for the constructors that compute their sizes with tensors (torchvision's RegNet).
    """

    def __init__(self, *, with_values: bool) -> None:
        super().__init__()
        self._constructors = _STORAGE | _VALUES if with_values else _STORAGE

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._constructors:
            return func(*args, **{"device": "meta"} | {k: v for k, v in kwargs.items() if v is not None})
        if getattr(func, "__name__", None) in _INITIALISATION:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, torch.Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


def build_on_meta(constructor: Callable[[], nn.Module]) -> nn.Module:
    """Call `constructor` so that every parameter and buffer is on the meta device.

    The model has its modules, names, shapes and dtypes and cannot be run: neither its parameters nor its buffers
    (position indices and the like) have values.
    """
    try:
        with _MetaBuild(with_values=True):
            model = constructor()
    except NotImplementedError:  # torch: "Cannot copy out of meta tensor; no data!"
        with _MetaBuild(with_values=False):
            model = constructor()
    return model.to("meta")
