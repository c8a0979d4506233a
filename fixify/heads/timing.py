"""The time of heads beside that of `nn.Linear`: ratios, measured in turns, since a shared machine's speed drifts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixify.heads.kinds import kind_of
from fixify.heads.layer import FixedClassifier
from fixify.heads.spec import HeadSpec

CASES = ((512, 1000), (1280, 1000), (2048, 1000), (1280, 11_221), (2048, 18_291), (1024, 21_843))
"""Sizes N x C: classifiers of ImageNet-1k, and larger ones of Places, kanji and ImageNet-21k."""
VARIANTS = ("hadamard", "matched", "wide", "binary")
"""The heads that `make_head` makes: class order, matched with few blocks, matched with 4096, and all N signs."""
_WIDE_BLOCKS = 4096


@dataclass(frozen=True)
class HeadTime:
    """The time of one head and of `nn.Linear`, measured in turns.

    Attributes:
        num_features: N.
        num_classes: C.
        variant: One of `VARIANTS`.
        batch: Samples per call.
        training: Whether a call is a forward and a backward pass, or a forward pass in evaluation.
        linear_seconds: Time of a call of `nn.Linear`, the smallest of all turns.
        seconds: Time of a call of the head, the smallest of all turns.
    """

    num_features: int
    num_classes: int
    variant: str
    batch: int
    training: bool
    linear_seconds: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Time of `nn.Linear` over that of the head; above 1 the head is faster."""
        return self.linear_seconds / self.seconds


def smallest_times(calls: Sequence[Callable[[], object]], *, turns: int = 15, seconds: float = 0.02) -> list[float]:
    """Time functions in turns and return the smallest time of a call of each, in seconds.

    Args:
        calls: The functions; each is called twice before.
        turns: How often each is timed.
        seconds: A turn repeats a function about as long as this, and at least once.
    """
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(seconds / max(time.perf_counter() - start, 1e-7))))
    smallest = [float("inf")] * len(calls)
    for _ in range(turns):
        for i, (call, count) in enumerate(zip(calls, repeats, strict=True)):
            start = time.perf_counter()
            for _ in range(count):
                call()
            smallest[i] = min(smallest[i], (time.perf_counter() - start) / count)
    return smallest


def make_head(variant: str, num_features: int, num_classes: int) -> FixedClassifier:
    """Build a head with codes drawn at random where a real one would have matched or taken them from a classifier.

    Args:
        variant: One of `VARIANTS`.
        num_features: N.
        num_classes: C.
    """
    n, c = num_features, num_classes
    generator = torch.Generator().manual_seed(0)
    if variant == "binary":
        spec = HeadSpec("binary", n, c, bits_per_class=n, gains=True, standardize="center")
        codes = torch.randint(0, 256, (c, -(-n // 8)), dtype=torch.uint8, generator=generator)
        codes[:, -1] &= 0xFF << (-n % 8) & 0xFF
        return FixedClassifier(spec, codes=codes)
    if variant == "hadamard":
        return FixedClassifier(HeadSpec("hadamard", n, c, standardize=True))
    blocks = _WIDE_BLOCKS if variant == "wide" else max(1, -(-c // n))
    space = n if c <= n else 2 * n * blocks
    spec = HeadSpec("hadamard", n, c, standardize=True, matched=True, blocks=blocks)
    codes = torch.randperm(space, generator=generator)[:c]
    if c <= n:  # the signs are free
        codes += n * torch.randint(0, 2, (c,), generator=generator)
    return FixedClassifier(spec, codes=codes)


def time_head(
    variant: str, num_features: int, num_classes: int, batches: Sequence[int], *, training: bool = False
) -> list[HeadTime]:
    """Time a head and `nn.Linear`, both float32 and with a bias, on the number of threads that torch is set to.

    Args:
        variant: One of `VARIANTS`.
        num_features: N.
        num_classes: C.
        batches: Numbers of samples per call.
        training: Time a forward and a backward pass, with the gradient of the features; else a forward pass in
            evaluation.

    Returns:
        One measurement per batch size.
    """
    head, linear = make_head(variant, num_features, num_classes), nn.Linear(num_features, num_classes)
    generator = torch.Generator().manual_seed(1)
    found = []
    for batch in batches:
        x = torch.randn(batch, num_features, generator=generator)
        grad = torch.randn(batch, num_classes, generator=generator)
        calls = [_call(layer.train(training), x, grad if training else None) for layer in (linear, head)]
        with torch.inference_mode(not training):
            times = smallest_times(calls)
        found.append(HeadTime(num_features, num_classes, variant, batch, training, *times))
    return found


def _call(layer: nn.Module, x: Tensor, grad: Tensor | None) -> Callable[[], object]:
    if grad is None:
        return lambda: layer(x)
    x = x.clone().requires_grad_()

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)

    return step


def default_variants(num_features: int, num_classes: int) -> list[str]:
    """List the variants that `convert` can make at a size; the wide search needs more classes than features."""
    spec = HeadSpec("hadamard", num_features, num_classes)
    wide = kind_of(spec).can_match and num_classes > num_features
    return [variant for variant in VARIANTS if variant != "wide" or wide]
