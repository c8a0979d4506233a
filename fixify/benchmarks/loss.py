"""Time and memory of the cross-entropy over many classes: learned, fixed, and fixed in blocks of classes.

Each measurement is a forward and a backward pass, down to the gradients of the features and of what the head learns, in
a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.benchmarks.child import Failure, PeakMemory, run_in_child
from fixify.benchmarks.machine import Machine, cores, this_machine
from fixify.benchmarks.samples import Size, check_kinds, sample_head
from fixify.errors import HeadSpecError, UsageError

CLASSES = (1_000, 10_000, 100_000, 1_000_000)
NUM_FEATURES = 512
BATCH = 64
REPEATS = 5
BUDGET = 8e9
"""Bytes that a loss may take."""
WAYS = ("learned", "plain", "blocked")
"""`nn.Linear` and `F.cross_entropy`; a fixed head and `F.cross_entropy`; `FixedClassifier.loss`."""
_TIMEOUT = 600.0
_LIMIT = 30.0  # seconds after which no repeat begins


@dataclass(frozen=True)
class Cost:
    """What one loss takes.

    Attributes:
        seconds: Of a forward and a backward pass; the least of several. None if it was not measured.
        peak_bytes: Peak of the memory above that of the interpreter, weights and gradients included; None as well.
        failure: Why it was not measured.
    """

    seconds: float | None = None
    peak_bytes: int | None = None
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "failure": self.failure}


@dataclass(frozen=True)
class LossRow:
    """The costs at one number of classes.

    Attributes:
        num_classes: C.
        costs: The cost of each of `WAYS`.
    """

    num_classes: int
    costs: Mapping[str, Cost]

    def time_ratio(self, way: str) -> float | None:
        """Return its time divided by that of the loss in blocks; None if one was not measured."""
        ours, theirs = self.costs["blocked"].seconds, self.costs[way].seconds
        return None if ours is None or theirs is None else theirs / ours

    def memory_ratio(self, way: str) -> float | None:
        """Return its peak of memory divided by that of the loss in blocks; None if one was not measured."""
        ours, theirs = self.costs["blocked"].peak_bytes, self.costs[way].peak_bytes
        return None if not ours or theirs is None else theirs / ours

    def to_dict(self) -> dict[str, Any]:
        """Return the ratios, then times and bytes."""
        others = [way for way in WAYS if way != "blocked"]
        return {
            "num_classes": self.num_classes,
            "time_ratios": {way: self.time_ratio(way) for way in others},
            "memory_ratios": {way: self.memory_ratio(way) for way in others},
            "costs": {way: cost.to_dict() for way, cost in self.costs.items()},
        }


@dataclass(frozen=True)
class LossBenchmark:
    """The result of `benchmark_loss`.

    Attributes:
        machine: What it ran on.
        kind: Kind of the fixed head.
        num_features: N.
        batch: Samples per batch.
        threads: Threads of torch.
        budget: Bytes that a loss was allowed.
        rows: One per number of classes.
    """

    machine: Machine
    kind: str
    num_features: int
    batch: int
    threads: int
    budget: float
    rows: tuple[LossRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify bench loss --json` prints."""
        return {
            "benchmark": "loss",
            "machine": self.machine.to_dict(),
            "kind": self.kind,
            "num_features": self.num_features,
            "batch": self.batch,
            "threads": self.threads,
            "budget": self.budget,
            "rows": [row.to_dict() for row in self.rows],
        }


def benchmark_loss(
    classes: Sequence[int] = CLASSES,
    *,
    kind: str = "hadamard",
    num_features: int = NUM_FEATURES,
    batch: int = BATCH,
    num_threads: int | None = None,
    budget: float = BUDGET,
    repeats: int = REPEATS,
    on_row: Callable[[LossRow], object] | None = None,
) -> LossBenchmark:
    """Measure time and peak memory of a loss, learned and fixed, for growing numbers of classes, on the CPU.

    What cannot fit the budget, by the size of its weights, logits and their gradients, is not tried.

    Args:
        classes: Numbers of classes.
        kind: Kind of the fixed head; see `fixify.benchmarks.samples.check_kinds`.
        num_features: N.
        batch: Samples per batch.
        num_threads: Threads of torch; default: all cores.
        budget: Bytes that a loss may take.
        repeats: Passes, of which the least time counts. Where they take long there are fewer.
        on_row: Called with each row.

    Raises:
        UsageError: the kind is unknown, or a number is not positive.
        ResourceError: a process ended without a reason that is known.
    """
    check_kinds((kind,))
    count = cores() if num_threads is None else num_threads
    if min(*classes, num_features, batch, count, repeats, 1) < 1 or budget <= 0:
        raise UsageError("Classes, features, batch, threads, repeats and budget must be positive.")
    rows = []
    for num_classes in sorted(classes):
        costs = {}
        for way in WAYS:
            needed = least_bytes(way, num_features, num_classes, batch)
            if needed > budget:
                costs[way] = Cost(failure=f"needs {needed / 1e9:,.0f} GB")
                continue
            arguments = {
                "way": way,
                "kind": kind,
                "num_features": num_features,
                "num_classes": num_classes,
                "batch": batch,
                "repeats": repeats,
            }
            found = run_in_child(measure_loss, arguments, num_threads=count, timeout=_TIMEOUT)
            costs[way] = Cost(failure=found.reason) if isinstance(found, Failure) else Cost(**found)
        row = LossRow(num_classes, costs)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return LossBenchmark(this_machine(), kind, num_features, batch, count, budget, tuple(rows))


def least_bytes(way: str, num_features: int, num_classes: int, batch: int) -> int:
    """Compute the bytes that a loss cannot do without: float32 weights and logits with their gradients.

    >>> least_bytes("learned", 512, 1_000_000, 64)
    4608000000
    """
    weights = 8 * num_features * num_classes if way == "learned" else 0
    logits = 0 if way == "blocked" else 8 * batch * num_classes
    return weights + logits


def measure_loss(
    way: str, kind: str, num_features: int, num_classes: int, batch: int, repeats: int
) -> Mapping[str, Any]:
    """Measure one loss in this process, and return seconds and the peak of memory in bytes.

    Raises:
        HeadSpecError: there is no such head.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, num_features, generator=generator)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    few = min(num_classes, num_features, 64)
    _loss(way, _module(way, kind, Size(num_features, few)), x, labels % few).backward()  # what torch loads once
    with PeakMemory() as memory:
        module = _module(way, kind, Size(num_features, num_classes))
        least, began = float("inf"), time.perf_counter()
        for turn in range(repeats + 1):
            module.zero_grad(set_to_none=True)
            features = x.clone().requires_grad_()
            start = time.perf_counter()
            _loss(way, module, features, labels).backward()
            if turn:  # the first warms up
                least = min(least, time.perf_counter() - start)
            if turn and time.perf_counter() - began > _LIMIT:
                break
    return {"seconds": least, "peak_bytes": memory.bytes}


def _module(way: str, kind: str, size: Size) -> nn.Module:
    if way == "learned":
        return nn.Linear(size.num_features, size.num_classes)
    head = sample_head(kind, size)
    if head is None:
        raise HeadSpecError(f"There is no {kind} head of size {size}.")
    return head.train()


def _loss(way: str, module: Any, features: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = module.loss(features, labels) if way == "blocked" else F.cross_entropy(module(features), labels)
    return loss
