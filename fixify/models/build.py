"""Build a model without initial values, and load weights into it.

A model is built without values for two reasons: only its names and shapes are needed (`build_on_meta`), or a whole
state dict is loaded next (`build_blank`, `load_weights`). Both skip weight initialisation, which takes most of the time
of a build.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from fixify.catalogue.signature import is_counter
from fixify.errors import ArchitectureError

_STORAGE = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.empty_strided}
_VALUES = {torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.eye, torch.randperm}
# The in-place functions that initialise weights. They are listed by name because the functions of torch.nn.init and the
# methods of Tensor are skipped alike.
_INITIALISATION = {
    *("normal_", "uniform_", "trunc_normal_", "erfinv_", "bernoulli_", "zero_", "fill_", "copy_"),
    *("mul_", "add_", "sub_", "div_", "clamp_", "constant_", "ones_", "zeros_", "orthogonal_"),
    *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
}


@dataclass(frozen=True)
class Bounds:
    """How large a network may become while it is built. The default is beyond every network of timm and torchvision.

    Attributes:
        modules: Number of modules.
        elements: Elements of all parameters and buffers.
    """

    modules: int = 20_000
    elements: int = 40_000_000_000

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, classifier: int = 0) -> Bounds:
        """Bound a network whose tensors are known, for example those of the file that names it.

        There is room for modules without tensors, buffers that are not stored (masks, position indices), and
        tensors that a builder makes twice.

        Args:
            tensors: The tensors.
            classifier: Elements of classifier weights that are not among them.
        """
        elements = sum(tensor.numel() for tensor in tensors.values()) + classifier
        return cls(modules=1_000 + 20 * len(tensors), elements=(1 << 26) + 4 * elements)


@contextlib.contextmanager
def bounded(within: Bounds | None, name: str) -> Iterator[None]:
    """Stop the construction of a network in the block as soon as it is larger than allowed.

    Args:
        within: How large it may become; None for the default.
        name: The architecture, for the message.

    Raises:
        ArchitectureError: it is larger.
    """
    limit = within or Bounds()
    here = threading.get_ident()
    modules = elements = 0

    def count_module(_parent: nn.Module, _name: str, _module: nn.Module | None) -> None:
        nonlocal modules
        modules += threading.get_ident() == here
        if modules > limit.modules:
            raise ArchitectureError(f"{name} with these arguments has more than {limit.modules:,} modules.", hint=hint)

    def count_elements(_parent: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal elements
        if tensor is not None and threading.get_ident() == here and not is_lazy(tensor):
            elements += tensor.numel()
        if elements > limit.elements:
            raise ArchitectureError(
                f"{name} with these arguments has more than {limit.elements:,} parameters.", hint=hint
            )

    hint = "The file or its config.json does not fit its tensors." if within else "Use smaller arguments."
    with contextlib.ExitStack() as hooks:
        hooks.callback(register_module_module_registration_hook(count_module).remove)
        hooks.callback(register_module_parameter_registration_hook(count_elements).remove)
        hooks.callback(register_module_buffer_registration_hook(count_elements).remove)
        yield


def build_on_meta(constructor: Callable[[], nn.Module]) -> nn.Module:
    """Call `constructor` so that every parameter and buffer is on the meta device.

    The model has its modules, names, shapes and dtypes. It cannot be run: neither its parameters nor its buffers
    (position indices and the like) have values.
    """
    try:
        with _MetaBuild(with_values=True):
            model = constructor()
    except NotImplementedError:  # torch: "Cannot copy out of meta tensor; no data!"
        with _MetaBuild(with_values=False):
            model = constructor()
    return model.to("meta")


def build_blank(constructor: Callable[[], nn.Module]) -> nn.Module:
    """Call `constructor` without drawing initial weights, which is ten times as fast for a large vision transformer.

    The parameters are uninitialised memory, so each of them must be loaded next; `load_state_dict` checks that. Buffers
    have their usual values, including buffers that are not part of the state dict.
    """
    # Some constructors still draw from the global generator; restore its state for whoever seeded it.
    with torch.random.fork_rng(devices=[]), _BlankBuild():
        return constructor()


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly; only the batch counters of BatchNorm layers may be missing.

    A state dict of torch carries the version of each module, which modules use to translate old state dicts. A
    safetensors file does not, and torchvision's MNASNet refuses to load without it. Tensors that fit are therefore
    treated as the current version.

    Args:
        model: The model, changed in place.
        tensors: Its weights, under the model's own names and with its shapes.

    Raises:
        RuntimeError: torch's own, if a tensor is missing, unknown or of another shape.
    """
    own = model.state_dict()
    state = OrderedDict(tensors)
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)}
    for key, tensor in own.items():
        # A fixed head counts batches under the same name, and its counter may not be missing.
        if is_counter(key) and key.rpartition(".")[0] in norms:
            state.setdefault(key, tensor)
    state._metadata = own._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)


class _MetaBuild(TorchFunctionMode):
    """Create tensors on the meta device, and skip giving them values.

    Args:
        with_values: Also create tensors with given values (`arange`, `linspace`, ...) on the meta device. False leaves
            those on the CPU, for constructors that compute sizes with tensors (torchvision's RegNet).
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
    """Skip the initialisation of parameters; everything else is computed as usual."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = _initialised(func, args, kwargs)
        return target if isinstance(target, nn.Parameter) else func(*args, **kwargs)


def _initialised(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor that `func` initialises, or None if `func` does something else."""
    if getattr(func, "__name__", None) not in _INITIALISATION:
        return None
    target = args[0] if args else kwargs.get("tensor")
    return target if isinstance(target, Tensor) else None
