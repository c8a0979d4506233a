"""Measure what classifiers take while they run: memory, and time per batch."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fixify.benchmarks.timing import seconds_in_turns

BATCHES = (1, 64)
"""Samples per batch whose time is measured."""
_GROUP = 32
"""Features of a class that share a scale in PyTorch's product with four bits."""
_CLASSES = 16
"""Classes that it takes at a time."""


class Int8Classifier(nn.Module):
    """A classifier as PyTorch runs int8 weights: one sample in bfloat16; more, with features that become int8 too.

    Its weights are random: only its time and memory count.

    Args:
        num_features: N.
        num_classes: C.
        bias: Whether it adds one.
    """

    def __init__(self, num_features: int, num_classes: int, bias: bool) -> None:
        super().__init__()
        self.weight = torch.randint(-127, 128, (num_classes, num_features), dtype=torch.int8)
        self.steps = torch.rand(num_classes)
        self.bias = torch.zeros(num_classes) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, N] to logits [B, C]."""
        if len(x) == 1:
            steps = self.steps.to(torch.bfloat16)
            logits = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), self.weight, steps).float()
        else:
            step = x.abs().amax(dim=1, keepdim=True) / 127
            levels = (x / step).round_().to(torch.int8)
            logits = torch._int_mm(levels, self.weight.T).float().mul_(step).mul_(self.steps)
        return logits if self.bias is None else logits + self.bias


class Int4Classifier(nn.Module):
    """A classifier as PyTorch runs integers of at most four bits: two weights a byte, and features in bfloat16.

    Its weights are random: only its time and memory count.

    Args:
        num_features: N, a multiple of 32.
        num_classes: C.
        bias: Whether it adds one.
    """

    def __init__(self, num_features: int, num_classes: int, bias: bool) -> None:
        super().__init__()
        self.num_classes, rows = num_classes, -(-num_classes // _CLASSES) * _CLASSES
        levels = torch.randint(0, 16, (rows, num_features), dtype=torch.int32)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        self.steps = torch.rand(num_features // _GROUP, rows, 2).to(torch.bfloat16)
        self.bias = torch.zeros(num_classes) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, N] to logits [B, C]."""
        packed = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), self.packed, _GROUP, self.steps)
        logits = packed[:, : self.num_classes].float()
        return logits if self.bias is None else logits + self.bias


def integer_classifier(num_features: int, num_classes: int, bits: int, bias: bool) -> nn.Module | None:
    """Make a classifier with integer weights; None if PyTorch has no product for their shape."""
    if bits == 8:
        return Int8Classifier(num_features, num_classes, bias)
    return None if num_features % _GROUP else Int4Classifier(num_features, num_classes, bias)


def seconds_per_batch(classifiers: Sequence[nn.Module], num_features: int) -> list[dict[int, float]]:
    """Time classifiers in turns on the CPU, on float32 features, with torch's number of threads.

    Args:
        classifiers: Modules from features [B, N] to logits [B, C], in eval mode.
        num_features: N.

    Returns:
        For each of them, the seconds of a batch by its size.
    """
    drawn = torch.Generator().manual_seed(0)
    found: list[dict[int, float]] = [{} for _ in classifiers]
    with torch.inference_mode():
        for size in BATCHES:
            x = torch.randn(size, num_features, generator=drawn)
            calls = [functools.partial(module, x) for module in classifiers]
            for seconds, each in zip(found, seconds_in_turns(calls, limit=5.0), strict=True):
                seconds[size] = each
    return found


@torch.no_grad()
def memory_bytes(classifier: nn.Module, num_features: int) -> int:
    """Count the bytes that a classifier in eval mode holds after a batch, with what it prepared for the next one."""
    classifier(torch.zeros(1, num_features))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(classifier, set())}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors that an object holds, through containers, objects of fixify, and what functions closed over."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        inner: Sequence[object] = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        inner = list(value)
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or ()]
    elif isinstance(value, types.MethodType):
        inner = [value.__self__]
    elif isinstance(value, nn.Module) or type(value).__module__.startswith("fixify."):
        inner = [getattr(value, "__dict__", {})]
    else:
        return
    for each in inner:
        yield from _tensors(each, seen)
