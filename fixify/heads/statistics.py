"""Mean and deviation of every feature: running ones while training, exact ones from calibration features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from fixify.errors import HeadSpecError

MOMENTUM = 0.1
"""Weight of the newest batch in the running statistics, as in `nn.BatchNorm1d`."""
RELATIVE_FLOOR = 0.05
"""Smallest deviation that is divided by, relative to the mean deviation. A feature that was dead while the statistics
were taken must not drown all others when it fires: it may count for at most 20 typical ones."""


def floored(spread: Tensor) -> Tensor:
    """The deviations that features are divided by: float32 at least, [N], positive."""
    spread = spread.to(torch.promote_types(spread.dtype, torch.float32))
    return torch.maximum(spread, (RELATIVE_FLOOR * spread.mean()).clamp_min(1e-6))


@torch.no_grad()
def update_running_(
    center: Tensor, spread: Tensor | None, num_batches: Tensor, features: Tensor, *, synchronized: bool = False
) -> None:
    """One step of the exponentially weighted mean and deviation, in place.

    The first batch sets them and the next are averaged evenly until a batch's share has fallen to `MOMENTUM`. What the
    mean moves by counts as variance, so that batches of one sample are right too. An empty batch changes nothing.

    Args:
        center, spread: Running mean and deviation, [N]; the deviation may be left out.
        num_batches: Batches seen, int64 [].
        features: [..., N], float32 or float64.
        synchronized: The batch is that of all processes of the default group. Each calls this with its part; one may be
            empty, not all.
    """
    features = features.reshape(-1, features.shape[-1])
    if synchronized:
        shift, variance = _moments_of_all(features, center)
    elif features.shape[0] == 0:
        return
    else:
        mean = features.mean(dim=0)
        variance = (features - mean).square().mean(dim=0)
        shift = mean - center
    weight = (1.0 / (num_batches + 1).to(features.dtype)).clamp_min(MOMENTUM)
    if spread is not None:
        old_share = torch.where(num_batches == 0, torch.zeros_like(weight), 1.0 - weight)
        new_variance = old_share * (spread.to(features.dtype).square() + weight * shift.square()) + weight * variance
        spread.copy_(new_variance.sqrt())
    center.copy_(center + weight * shift)
    num_batches.add_(1)


def _moments_of_all(features: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, from the center, and variance [N] of the features [B, N] of all processes; one sum of 2N + 1 numbers.

    The sums are of what lies beside the center, which all processes have alike: far from zero they would be large, and
    their difference inexact.
    """
    beside = features - center.to(features.dtype)
    size = features.new_full((1,), features.shape[0])
    sums = torch.cat([size, beside.sum(dim=0), beside.square().sum(dim=0)])
    dist.all_reduce(sums)
    size, first, second = sums.split([1, *2 * [features.shape[-1]]])
    shift = first / size
    return shift, (second / size - shift.square()).clamp_min(0.0)


@torch.no_grad()
def exact(batches: Iterable[Tensor], num_features: int) -> tuple[Tensor, Tensor, int]:
    """Mean and (population) deviation over all samples of all batches, streamed, in float64.

    Args:
        batches: Feature batches [..., N]; consumed once.

    Returns:
        center and spread, float64 [N] on the CPU, and the number of non-empty batches.

    Raises:
        HeadSpecError: No samples, features of another width, or features that are not finite.
    """
    center = torch.zeros(num_features, dtype=torch.float64)
    squares = torch.zeros(num_features, dtype=torch.float64)
    samples = num_batches = 0
    for batch in batches:
        if batch.shape[-1] != num_features:
            raise HeadSpecError(f"Expected calibration features of width {num_features}, got {batch.shape[-1]}.")
        features = batch.reshape(-1, num_features).to(dtype=torch.float64, device="cpu")
        if not len(features):
            continue
        mean = features.mean(dim=0)
        shift = mean - center
        total = samples + len(features)
        squares += (features - mean).square().sum(dim=0) + shift.square() * (samples * len(features) / total)
        center += shift * (len(features) / total)
        samples = total
        num_batches += 1
    if not samples:
        raise HeadSpecError("No calibration features were given.")
    if not bool(torch.isfinite(center).all() and torch.isfinite(squares).all()):
        raise HeadSpecError("The calibration features are not finite.")
    return center, (squares / samples).sqrt(), num_batches
