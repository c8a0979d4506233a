"""Building a model without initial values: for its names and shapes only, or because its weights are loaded next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_STORAGE = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.empty_strided}
_VALUES = {torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.eye, torch.randperm}
# What weight initialisation does to a tensor in place: most of the time of a build, for values that on the meta device
# do not exist, and that otherwise are overwritten when weights are loaded. Names, because torch.nn.init's functions and
# the methods of Tensor are to be skipped alike.
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
        target = _initialised(func, args, kwargs)
        return target if target is not None and target.is_meta else func(*args, **kwargs)


class _BlankBuild(TorchFunctionMode):
    """Parameters keep whatever was in their memory; everything else is computed as ever."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = _initialised(func, args, kwargs)
        return target if isinstance(target, nn.Parameter) else func(*args, **kwargs)


def _initialised(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that `func` would give initial values, if that is what it does."""
    if getattr(func, "__name__", None) not in _INITIALISATION:
        return None
    target = args[0] if args else kwargs.get("tensor")
    return target if isinstance(target, torch.Tensor) else None


def build_blank(constructor: Callable[[], nn.Module]) -> nn.Module:
    """Call `constructor` without drawing initial weights: ten times as fast for a large vision transformer.

    The parameters have no values: every one of them is to be loaded from a state dict, as `load_state_dict` makes sure
    of. Buffers, those that no state dict has included, are as ever.
    """
    # What is drawn after all comes from the global generator; whoever seeded it gets it back as it was.
    with torch.random.fork_rng(devices=[]), _BlankBuild():
        return constructor()


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


# Putting weights that are known to fit into a model.


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict of the model's own names and shapes, strictly; only BatchNorm's counters may be missing.

    A state dict of torch carries the version of each module, by which modules translate older ones; a safetensors file
    does not, and torchvision's MNASNet refuses to be loaded without. What fits is taken to be of today's version.

    Raises:
        RuntimeError: torch's, if anything is missing, unknown or of another shape.
    """
    own = model.state_dict()
    state = OrderedDict(tensors)
    for path, module in model.named_modules():
        counter = f"{path}.num_batches_tracked"
        if isinstance(module, nn.modules.batchnorm._NormBase) and counter in own:
            state.setdefault(counter, own[counter])
    state._metadata = own._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)
