"""Time the forward pass of fixed heads, or a whole training step of them, beside `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from fixify._files import require_regular
from fixify._values import parse_json
from fixify.benchmarks.machine import Machine, this_machine, thread_counts, threads
from fixify.benchmarks.samples import KINDS, Size, check_kinds, sample_head
from fixify.benchmarks.timing import seconds_in_turns
from fixify.errors import UsageError

SIZES = tuple(
    map(
        Size.parse,
        ("2048x1000", "1280x1000", "512x1000", "256x2965", "1280x11221", "2048x18291", "1024x21843", "512x100000"),
    )
)
BATCHES = (1, 64, 256)
REPEATS = 15
TOLERANCE = 0.3
"""Share of a ratio that may be lost before `regressions` reports it."""


@dataclass(frozen=True)
class HeadRow:
    """The times of one size, batch and number of threads.

    Attributes:
        num_features: N.
        num_classes: C.
        batch: Samples per batch.
        threads: Threads of torch.
        linear: Seconds of `nn.Linear`.
        seconds: Seconds of each kind of head; kinds that do not exist at this size are missing.
    """

    num_features: int
    num_classes: int
    batch: int
    threads: int
    linear: float
    seconds: Mapping[str, float]

    @property
    def size(self) -> Size:
        """The size of the head."""
        return Size(self.num_features, self.num_classes)

    @property
    def ratios(self) -> dict[str, float]:
        """Time of `nn.Linear` divided by that of each kind; above 1 the fixed head is faster."""
        return {kind: self.linear / seconds for kind, seconds in self.seconds.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the ratios, then the times in seconds."""
        return {
            "num_features": self.num_features,
            "num_classes": self.num_classes,
            "batch": self.batch,
            "threads": self.threads,
            "ratios": self.ratios,
            "linear_seconds": self.linear,
            "seconds": dict(self.seconds),
        }


@dataclass(frozen=True)
class HeadBenchmark:
    """The result of `benchmark_head`.

    Attributes:
        machine: What it ran on.
        kinds: The kinds of heads.
        backward: Whether forward and backward pass in training mode were timed, not the forward pass in eval mode.
        repeats: Turns, of which the least time counts.
        rows: One per size, number of threads and batch.
    """

    machine: Machine
    kinds: tuple[str, ...]
    backward: bool
    repeats: int
    rows: tuple[HeadRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify bench head --json` prints."""
        return {
            "benchmark": "head",
            "machine": self.machine.to_dict(),
            "kinds": list(self.kinds),
            "backward": self.backward,
            "repeats": self.repeats,
            "rows": [row.to_dict() for row in self.rows],
        }


def benchmark_head(
    sizes: Sequence[Size] = SIZES,
    *,
    kinds: Sequence[str] = KINDS,
    batches: Sequence[int] = BATCHES,
    num_threads: Sequence[int] | None = None,
    backward: bool = False,
    repeats: int = REPEATS,
    on_row: Callable[[HeadRow], object] | None = None,
) -> HeadBenchmark:
    """Time heads beside `nn.Linear` on the CPU, in turns, in float32.

    Args:
        sizes: Sizes of the classifier.
        kinds: Kinds of heads; see `fixify.benchmarks.samples.check_kinds`.
        batches: Samples per batch.
        num_threads: Threads of torch; default: one, and all cores.
        backward: Time forward and backward pass in training mode, down to the gradient of the features.
        repeats: Turns, of which the least time counts. Where a turn takes long there are fewer, but 3 at least.
        on_row: Called with each row.

    Raises:
        UsageError: a kind is unknown, or a number is not positive.
    """
    check_kinds(tuple(kinds))
    counts = thread_counts() if num_threads is None else tuple(num_threads)
    if min(*batches, *counts, repeats, 1) < 1:
        raise UsageError("Batches, threads and repeats must be at least 1.")
    rows = []
    for size in sizes:
        linear = nn.Linear(size.num_features, size.num_classes)
        heads = {kind: head for kind in kinds if (head := sample_head(kind, size)) is not None}
        for module in (linear, *heads.values()):
            module.train(backward)
        for count in counts:
            for batch in batches:
                with threads(count):
                    row = _measure(size, batch, count, linear, heads, backward=backward, repeats=repeats)
                rows.append(row)
                if on_row is not None:
                    on_row(row)
    return HeadBenchmark(this_machine(), tuple(kinds), backward, repeats, tuple(rows))


def _measure(
    size: Size,
    batch: int,
    count: int,
    linear: nn.Module,
    heads: Mapping[str, nn.Module],
    *,
    backward: bool,
    repeats: int,
) -> HeadRow:
    x = torch.randn(batch, size.num_features, generator=torch.Generator().manual_seed(0))
    gradient = torch.full((batch, size.num_classes), 1.0 / size.num_classes)

    def forward(module: nn.Module) -> Tensor:
        output: Tensor = module(x)
        return output

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        output: Tensor = module(x.detach().requires_grad_())
        output.backward(gradient)

    modules = [linear, *heads.values()]
    if backward:
        found = seconds_in_turns([lambda module=module: step(module) for module in modules], repeats=repeats)  # type: ignore[misc]
        linear.zero_grad(set_to_none=True)
    else:
        with torch.inference_mode():
            found = seconds_in_turns([lambda module=module: forward(module) for module in modules], repeats=repeats)  # type: ignore[misc]
    return HeadRow(
        size.num_features, size.num_classes, batch, count, found[0], dict(zip(heads, found[1:], strict=True))
    )


# Ratios against those of another run.


class _ReferenceRow(BaseModel):
    model_config = ConfigDict(extra="ignore")
    num_features: int = Field(ge=1)
    num_classes: int = Field(ge=1)
    batch: int = Field(ge=1)
    threads: int = Field(ge=1)
    ratios: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]


class Reference(BaseModel):
    """The result of another run, of which only the ratios count."""

    model_config = ConfigDict(extra="ignore")
    backward: bool
    rows: list[_ReferenceRow]

    @property
    def ratios(self) -> dict[tuple[Size, int, int, str], float]:
        """Ratio by size, batch, threads and kind."""
        return {
            (Size(row.num_features, row.num_classes), row.batch, row.threads, kind): ratio
            for row in self.rows
            for kind, ratio in row.ratios.items()
        }


def read_reference(path: str | Path) -> Reference:
    """Read what `fixify bench head --json` printed.

    Raises:
        UsageError: the file cannot be read, or is something else.
    """
    require_regular(path, UsageError, "Make one: fixify bench head --json > reference.json")
    try:
        return Reference.model_validate(parse_json(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValidationError, ValueError) as error:
        raise UsageError(
            f"{path} is not the result of a benchmark of heads.",
            hint="Make one: fixify bench head --json > reference.json",
        ) from error


@dataclass(frozen=True)
class Change:
    """A ratio here beside that of the reference."""

    size: Size
    batch: int
    threads: int
    kind: str
    reference: float
    ratio: float

    @property
    def share(self) -> float:
        """How much of the reference's ratio is lost, from 0 to 1; negative if it has grown."""
        return 1.0 - self.ratio / self.reference

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "size": str(self.size),
            "batch": self.batch,
            "threads": self.threads,
            "kind": self.kind,
            "reference": self.reference,
            "ratio": self.ratio,
            "lost": self.share,
        }


@dataclass(frozen=True)
class Comparison:
    """All ratios that two runs have in common.

    Attributes:
        changes: Them, with the greatest loss first.
        tolerance: The share that may be lost.
    """

    changes: tuple[Change, ...]
    tolerance: float

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The ratios that lost more than `tolerance`."""
        return tuple(change for change in self.changes if change.share > self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "tolerance": self.tolerance,
            "compared": len(self.changes),
            "regressions": [change.to_dict() for change in self.regressions],
        }


def compare_ratios(found: HeadBenchmark, reference: Reference, *, tolerance: float = TOLERANCE) -> Comparison:
    """Compare the ratios of a run with those of another, where both have the same size, batch, threads and kind.

    Args:
        found: The run.
        reference: The other one.
        tolerance: The share of a ratio that may be lost, from 0 to 1.

    Raises:
        UsageError: they have nothing in common, or the tolerance is out of range.
    """
    if not 0 <= tolerance < 1:
        raise UsageError(f"The tolerance is a share from 0 to 1, got {tolerance:g}.")
    if found.backward is not reference.backward:
        raise UsageError("One of the two runs timed the forward pass, the other one forward and backward.")
    known = reference.ratios
    changes = [
        Change(row.size, row.batch, row.threads, kind, known[key], ratio)
        for row in found.rows
        for kind, ratio in row.ratios.items()
        if (key := (row.size, row.batch, row.threads, kind)) in known
    ]
    if not changes:
        raise UsageError(
            "The two runs have no size, batch, number of threads and kind in common.",
            hint="Run it with the sizes of the reference, or without --size, --batch, --threads and --head.",
        )
    return Comparison(tuple(sorted(changes, key=lambda change: change.share, reverse=True)), tolerance)
