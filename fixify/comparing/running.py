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


def seconds_per_batch(classifiers: Sequence[nn.Module], num_features: int) -> list[dict[int, float]]:
    """Time classifiers in turns on the CPU, in float32, with torch's number of threads.

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
