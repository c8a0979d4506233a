"""Time and memory of choosing the codes for a large learned classifier, for each kind of head."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixify.benchmarks.child import Failure, PeakMemory, run_in_child
from fixify.benchmarks.machine import Machine, cores, this_machine
from fixify.benchmarks.samples import Size
from fixify.errors import UsageError
from fixify.heads import KINDS as KINDS_OF_HEADS
from fixify.heads import HeadSpec, replacement

SIZES = tuple(map(Size.parse, ("2048x1000", "512x5000", "1280x20000")))
KINDS = ("matched", "binary", "binary-64")
TIMEOUT = 600.0
"""Seconds after which a conversion is stopped."""
_CLUSTERS = 32
_SPREAD = 0.5
"""Length of what sets a class apart from its cluster, against the length of the cluster's center."""


@dataclass(frozen=True)
class ConvertRow:
    """The conversion of one classifier to one kind of head.

    Attributes:
        num_features: N.
        num_classes: C.
        kind: The kind of head.
        seconds: Time of choosing the codes; None if it failed.
        peak_bytes: Peak of the memory above that of the interpreter, the classifier included; None if it failed.
        failure: Why there is no result: the time was up, or memory ran out.
    """

    num_features: int
    num_classes: int
    kind: str
    seconds: float | None
    peak_bytes: int | None
    failure: str | None = None

    @property
    def size(self) -> Size:
        """The size of the classifier."""
        return Size(self.num_features, self.num_classes)

    @property
    def memory_ratio(self) -> float | None:
        """The peak of the memory divided by the classifier's weights in float32."""
        return None if self.peak_bytes is None else self.peak_bytes / (4 * self.num_features * self.num_classes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "num_features": self.num_features,
            "num_classes": self.num_classes,
            "kind": self.kind,
            "memory_ratio": self.memory_ratio,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "failure": self.failure,
        }


@dataclass(frozen=True)
class ConvertBenchmark:
    """The result of `benchmark_convert`.

    Attributes:
        machine: What it ran on.
        threads: Threads of torch.
        num_images: Feature vectors for calibration; 0 for none.
        rows: One per size and kind.
    """

    machine: Machine
    threads: int
    num_images: int
    rows: tuple[ConvertRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify bench convert --json` prints."""
        return {
            "benchmark": "convert",
            "machine": self.machine.to_dict(),
            "threads": self.threads,
            "num_images": self.num_images,
            "rows": [row.to_dict() for row in self.rows],
        }


def correlated_classes(size: Size, *, seed: int = 0) -> Tensor:
    """Make a classifier whose class vectors are correlated, as those of trained networks are.

    The vectors lie in 32 clusters. Their coordinates, in random directions, have standard deviations that fall with
    the square root of their number: a spectrum after a power law.

    Args:
        size: Its size.
        seed: Seed of its numbers.

    Returns:
        float32 [C, N].
    """
    n, c = size.num_features, size.num_classes
    generator = torch.Generator().manual_seed(seed)
    widths = torch.arange(1, n + 1).rsqrt()
    centers = torch.randn(_CLUSTERS, n, generator=generator) * widths
    vectors = torch.randn(c, n, generator=generator).mul_(_SPREAD * widths)
    vectors += centers[torch.randint(_CLUSTERS, (c,), generator=generator)]
    directions = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    for part in vectors.split(1 << 14):
        part.copy_(part @ directions)
    return vectors.mul_(0.05)


def benchmark_convert(
    sizes: Sequence[Size] = SIZES,
    *,
    kinds: Sequence[str] = KINDS,
    num_images: int = 0,
    num_threads: int | None = None,
    timeout: float = TIMEOUT,
    on_row: Callable[[ConvertRow], object] | None = None,
) -> ConvertBenchmark:
    """Choose codes for classifiers with correlated class vectors; each in a process of its own.

    Args:
        sizes: Sizes of the classifiers.
        kinds: "matched", "binary", or "binary-64" for 64 signs per class.
        num_images: Feature vectors to calibrate with; 0 for none.
        num_threads: Threads of torch; default: all cores.
        timeout: Seconds after which a conversion is stopped.
        on_row: Called with each row.

    Raises:
        UsageError: a kind is unknown, or a number is out of range.
        ResourceError: a process ended without a reason that is known.
    """
    for kind in kinds:
        if kind != "matched" and kind.partition("-")[0] != "binary":
            raise UsageError(f"Converting to {kind!r} chooses no codes.", hint="Known: matched, binary, binary-64.")
    count = cores() if num_threads is None else num_threads
    if count < 1 or num_images < 0 or timeout <= 0:
        raise UsageError("--threads and --timeout must be positive, and --images not negative.")
    rows = []
    for size in sizes:
        for kind in kinds:
            found = run_in_child(
                measure_conversion,
                {
                    "num_features": size.num_features,
                    "num_classes": size.num_classes,
                    "kind": kind,
                    "num_images": num_images,
                },
                num_threads=count,
                timeout=timeout,
            )
            sizes_and_kind = (size.num_features, size.num_classes, kind)
            if isinstance(found, Failure):
                row = ConvertRow(*sizes_and_kind, None, None, found.reason)
            else:
                row = ConvertRow(*sizes_and_kind, found["seconds"], found["peak_bytes"])
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return ConvertBenchmark(this_machine(), count, num_images, tuple(rows))


def measure_conversion(num_features: int, num_classes: int, kind: str, num_images: int) -> Mapping[str, Any]:
    """Convert one classifier in this process, and return seconds and the peak of memory in bytes."""
    size = Size(num_features, num_classes)
    spec = conversion_spec(kind, size, has_features=num_images > 0)
    with PeakMemory() as memory:
        weight = correlated_classes(size)
        features = None
        if num_images:
            generator = torch.Generator().manual_seed(1)
            near = torch.randint(num_classes, (num_images,), generator=generator)
            features = (weight[near] + 0.05 * torch.randn(num_images, num_features, generator=generator)).relu_()
        bias = torch.zeros(num_classes)
        start = time.perf_counter()
        replacement(spec, weight, bias, features=features)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": memory.bytes}


def conversion_spec(kind: str, size: Size, *, has_features: bool) -> HeadSpec:
    """Return the spec with which `fixify convert` begins for a kind."""
    n, c = size.num_features, size.num_classes
    if kind == "matched":
        return HeadSpec("hadamard", n, c, standardize=True)
    signs = int(kind.partition("-")[2] or n)
    options = KINDS_OF_HEADS["binary"].default_options(n, has_features=has_features)
    return HeadSpec("binary", n, c, **options | {"bits_per_class": signs})
