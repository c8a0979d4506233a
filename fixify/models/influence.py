"""Run a model once to see whether a layer produces its logits.

Four copies of one random image go through the model in one batch. In three of them one output channel of the layer is
raised. The layer produces the logits if each of these changes the output of the model for that class and no other.
This holds as well for a mean over several heads, for a pooled map of logits, and below a final softmax or sigmoid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixify._values import counted

# What the forward pass of a model that fixify does not know may raise, for an image that it does not accept.
_FORWARD_ERRORS = (
    *(RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError, KeyError, ZeroDivisionError),
)
_SIZES = (32, 64, 128, 224)
_MOST_PARAMETERS = 400_000_000
_PROBES = 3
# The largest change of another class, as a share of the change of the class itself.
_LEAK = 0.02
_LEAST = 1e-6


@dataclass(frozen=True)
class Influence:
    """What a forward pass shows about one layer.

    Attributes:
        path: The layer.
        reason: Why its output is not the logits, to follow its name in a sentence; None if it is.
        called: Whether the forward pass uses the layer.
    """

    path: str
    reason: str | None
    called: bool = True


def run_once(model: nn.Module, paths: Sequence[str]) -> dict[str, Influence] | None:
    """Find out by one forward pass per layer which layers produce the logits of a model.

    The model runs where it is, in eval mode and without gradients, on an image of the smallest size that it takes. Its
    training mode, its buffers and the global random state are as before afterwards.

    Args:
        model: The model.
        paths: The layers to look at, by name.

    Returns:
        Path -> finding; None if the model cannot be run: parts of it are on the meta device or on several devices, it
        has more than 400 million parameters, its first layer is neither a 2-d convolution nor a linear layer, or it
        raises an error for every size of image.
    """
    images = _images(model)
    if not images:
        return None
    with _undisturbed(model):
        for batch in images:
            try:
                return {path: _influence(model, path, batch) for path in paths}
            except _FORWARD_ERRORS:
                continue  # it may take a larger image
    return None


def _influence(model: nn.Module, path: str, batch: Tensor) -> Influence:
    layer: Any = model.get_submodule(path)
    width = int(layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features)
    dim = 1 if isinstance(layer, nn.Conv2d) else -1
    channels = sorted({0, width // 2, width - 1})[:_PROBES]
    others: dict[int, str] = {}
    made: list[Tensor] = []
    delta: list[float] = []

    def raised(_layer: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        made.append(out)
        step = 1 + 4 * float(out.abs().max())
        delta.append(step)
        changed = out.clone()
        for row, channel in enumerate(channels, start=1):
            changed[row].select(dim if dim < 0 else 0, channel).add_(step)
        made.append(changed)
        return changed

    def other(name: str, out: object) -> None:
        if isinstance(out, Tensor):
            others[out.data_ptr()] = name

    with contextlib.ExitStack() as hooks:
        hooks.callback(layer.register_forward_hook(raised).remove)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not layer:
                handle = module.register_forward_hook(lambda _m, _i, out, name=name: other(name, out))
                hooks.callback(handle.remove)
        outputs = _tensors(model(batch))
    if not all(bool(out.isfinite().all()) for out in outputs):
        raise ValueError("the outputs are not finite")  # as for an image that is too small
    if not made:
        return Influence(path, "is not used when the model runs", called=False)
    rival = next((others[out.data_ptr()] for out in outputs if out.data_ptr() in others), None)
    if len(outputs) > 1 and rival is not None:
        return Influence(path, f"is one of several heads; another is {rival}")
    logits = [out for out in outputs if _moves(out)]
    if len(logits) != 1:
        return Influence(path, "does not change the output of the model" if not logits else "makes several outputs")
    return Influence(path, _other_than_logits(logits[0], width, channels))


def _other_than_logits(found: Tensor, width: int, channels: Sequence[int]) -> str | None:
    """Say what the output is, if raising one channel of the layer does not change just the same class of it."""
    out = found.flatten(1).double()
    if out.shape[1] != width:
        return f"makes {counted(width, 'value')}, and the model's output has {out.shape[1]}"
    if width == 1:
        return None
    if bool((out >= 0).all()) and _is_one(out.sum(1)):
        out = out.clamp_min(1e-300).log()  # behind a softmax
    normalised = _is_one(out.exp().sum(1))
    for row, channel in enumerate(channels, start=1):
        change = out[row] - out[0]
        rest = torch.cat([change[:channel], change[channel + 1 :]])
        if normalised:  # a softmax lowers all other classes by the same amount
            change, rest = change - rest.median(), rest - rest.median()
        own = float(change[channel].abs())
        if not own > _LEAST or float(rest.abs().max()) > _LEAK * own:
            return f"makes {width} values that are changed further on; they are not the logits"
    return None


def _moves(out: Tensor) -> bool:
    return out.ndim > 1 and len(out) > 1 and out.is_floating_point() and not torch.allclose(out[1:], out[:1])


def _is_one(sums: Tensor) -> bool:
    return bool(((sums - 1).abs() < 1e-3).all())


def _tensors(output: object) -> list[Tensor]:
    """Return the tensors in what a model returns: a tensor, a tuple, a dictionary, or an object with `logits`."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _images(model: nn.Module) -> list[Tensor]:
    """Return batches of equal images of growing size, of which the model may take one; none if it cannot be run."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    floats = [tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()]
    first = next((m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))), None)
    if len(devices) != 1 or not floats or not isinstance(first, (nn.Conv2d, nn.Linear)):
        return []
    if torch.device("meta") in devices or sum(tensor.numel() for tensor in tensors) > _MOST_PARAMETERS:
        return []
    if isinstance(first, nn.Linear):
        shapes: list[tuple[int, ...]] = [(first.in_features,)]
    else:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        known = cfg.get("input_size") or getattr(model, "input_size", None)
        sizes = [(size, size) for size in _SIZES]
        if known is not None and len(known) == 3:
            own = (int(known[1]), int(known[2]))
            # Networks with a fixed size raise an error for the others; convolutional ones take any.
            sizes = [own] if cfg.get("fixed_input_size") else [size for size in sizes if size[0] < own[0]] + [own]
        shapes = [(first.in_channels, *size) for size in sizes]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1, *shape, generator=generator) for shape in shapes]
    return [batch.expand(1 + _PROBES, *batch.shape[1:]).to(devices.copy().pop(), floats[0]) for batch in batches]


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and without gradients, and restore all that a forward pass can change."""
    training = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        for module, mode in training.items():
            module.training = mode
