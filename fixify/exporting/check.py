"""Compare an exported file with PyTorch before it gets its name: wrong exports are known, and most of them run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fixify.errors import CheckFailed

EXACT = 5e-3
"""Largest difference of logits that rounding in float32 explains, in units of their standard deviation."""
EIGHT_BIT = 0.1
"""The same where ONNX Runtime rounds features to 8 bits; measured: 0.004 to 0.04."""
NUM_RANDOM = 5
"""Random images; another number than the one that the model was traced with."""
_MAP = 3  # height and width of random feature maps
NUM_REAL = 32

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How an exported model agrees with PyTorch on some images.

    Attributes:
        images: What the images are.
        count: How many.
        difference: Largest difference of two logits, in units of the standard deviation of the image's logits.
        same: Number of images of which both name the same class first.
        allowed: Largest difference that is allowed.
    """

    images: str
    count: int
    difference: float
    same: int
    allowed: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def agreement(
    images: str,
    batches: Iterable[Tensor],
    reference: Run,
    exported: Run,
    *,
    allowed: float,
    minimum: float | None = None,
) -> Agreement:
    """Compare an exported model with PyTorch.

    Another first class is allowed only where PyTorch's logits of both classes are nearer than twice the allowed
    difference.

    Args:
        images: What the images are, for messages.
        batches: Inputs.
        reference: PyTorch's logits [B, C] of a batch.
        exported: The exported model's logits [B, C].
        allowed: Largest difference, in units of the standard deviation of an image's logits.
        minimum: Logits below this count as equal to it; for logarithms of probabilities, which underflow.

    Raises:
        CheckFailed: A difference is larger than allowed, or a logit is not finite.
    """
    count = same = 0
    largest = 0.0
    for batch in batches:
        expected, got = reference(batch).double(), exported(batch).double()
        if expected.shape != got.shape:
            raise CheckFailed(
                f"The export failed its check: it returns {list(got.shape)}, PyTorch {list(expected.shape)}.",
                hint=_NOTHING,
            )
        spread = expected.std(dim=-1, keepdim=True, correction=0).clamp_min(1e-12)
        if minimum is not None:
            expected, got = expected.clamp_min(minimum), got.clamp_min(minimum)
        differences = ((got - expected).abs() / spread).amax(dim=-1)
        first, other = expected.argmax(dim=-1), got.argmax(dim=-1)
        largest = max(largest, float(differences.nan_to_num(torch.inf).max()))
        same += int((first == other).sum())
        count += len(batch)
    found = Agreement(images, count, largest, same, allowed)
    if not largest <= allowed:
        raise CheckFailed(
            f"The export failed its check: on {images} its logits differ from PyTorch's by up to {largest:.3g} "
            f"standard deviations ({allowed:g} are allowed), and the first class is the same for {same} of {count}.",
            hint=_NOTHING,
        )
    return found


_NOTHING = "No file was written. Try --portable, another --opset, or --to torch-export."


def recorded(answers: Iterable[Tensor]) -> Run:
    """Return a function that gives these answers one after another, whatever it is called with."""
    rest = iter(answers)
    return lambda _: next(rest)


def random_images(sizes: list[int], *, fixed: int | None) -> Iterator[Tensor]:
    """Draw images of noise, smooth and rough, seeded: batches of 1 and 4, or of the fixed size.

    Args:
        sizes: Channels, height and width.
        fixed: The only number of images that the model takes; None for any.
    """
    generator = torch.Generator().manual_seed(0)
    for count in (1, NUM_RANDOM - 1) if fixed is None else (fixed,):
        noise = torch.randn(count, *sizes, generator=generator)
        coarse = torch.randn(count, sizes[0], 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=sizes[1:], mode="bilinear", align_corners=False)
        yield torch.where(torch.arange(count).reshape(-1, 1, 1, 1) % 2 == 0, smooth, noise)


def random_features(num_features: int, *, maps: bool = False) -> Iterator[Tensor]:
    """Draw features of a backbone, not negative, seeded: batches of 1 and 4.

    Args:
        num_features: N.
        maps: Draw feature maps [B, N, 3, 3] instead of features [B, N].
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [_MAP, _MAP] if maps else []
    for count in (1, NUM_RANDOM - 1):
        yield torch.randn(count, num_features, *sizes, generator=generator).relu()
