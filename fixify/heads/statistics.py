"""Mean and std of every feature: running ones while training, exact ones from calibration features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from fixify.errors import HeadSpecError

MOMENTUM = 0.1
"""Weight of the newest batch in the running statistics, as in `nn.BatchNorm1d`."""
RELATIVE_FLOOR = 0.05
"""Smallest std that is divided by, relative to the mean std. A feature that was constant while the statistics were
taken must not drown all others when it becomes active: it may count for at most 20 typical ones."""


def is_finite(values: Tensor) -> bool:
    """Check that no value is infinite or not a number, without temporaries of the size of a large classifier.

    >>> is_finite(torch.tensor([1.0, float("nan")])), is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.ones(0))
    (False, True, True)
    """
    return not values.numel() or all(bool(torch.isfinite(value)) for value in torch.aminmax(values))


def floor_std(std: Tensor) -> Tensor:
    """Raise small stds to the floor, so that features can be divided by them.

    Args:
        std: [N].

    Returns:
        [N], positive, float32 or wider.

    >>> floor_std(torch.tensor([1.0, 0.0, 2.0]))
    tensor([1.0000, 0.0500, 2.0000])
    """
    std = std.to(torch.promote_types(std.dtype, torch.float32))
    return torch.maximum(std, (RELATIVE_FLOOR * std.mean()).clamp_min(1e-6))


@torch.no_grad()
def update_running_(
    mean: Tensor, std: Tensor | None, num_batches: Tensor, features: Tensor, *, synchronized: bool = False
) -> None:
    """Update the exponentially weighted mean and std by one batch, in place.

    The first batch sets them, and the next ones are averaged evenly until the weight of a batch has fallen to
    `MOMENTUM`. The movement of the mean counts as variance, so batches of one sample give a correct std too. An empty
    batch changes nothing.

    Args:
        mean: Running mean, [N].
        std: Running std, [N], or None.
        num_batches: Batches seen, int64 [].
        features: [..., N], float32 or float64.
        synchronized: Whether the batch is spread over all processes of the default group. Each process calls this with
            its share, which may be empty as long as not all are.
    """
    features = features.reshape(-1, features.shape[-1])
    if synchronized:
        shift, variance = _moments_of_all(features, mean)
    elif features.shape[0] == 0:
        return
    else:
        batch_mean = features.mean(dim=0)
        variance = (features - batch_mean).square_().mean(dim=0)
        shift = batch_mean - mean
    weight = (1.0 / (num_batches + 1).to(features.dtype)).clamp_min(MOMENTUM)
    if std is not None:
        old_share = torch.where(num_batches == 0, torch.zeros_like(weight), 1.0 - weight)
        new_variance = old_share * (std.to(features.dtype).square() + weight * shift.square()) + weight * variance
        std.copy_(new_variance.sqrt())
    mean.copy_(mean + weight * shift)
    num_batches.add_(1)


def _moments_of_all(features: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean (relative to the running mean) and variance [N] over all processes, with one sum of 2N + 1 numbers.

    Sums are taken relative to the running mean, which all processes share: sums of values far from zero would be large
    and their difference inexact.
    """
    relative = features - mean.to(features.dtype)
    size = features.new_full((1,), features.shape[0])
    sums = torch.cat([size, relative.sum(dim=0), relative.square().sum(dim=0)])
    dist.all_reduce(sums)
    size, first, second = sums.split([1, *2 * [features.shape[-1]]])
    shift = first / size
    return shift, (second / size - shift.square()).clamp_min(0.0)


@torch.no_grad()
def exact_statistics(batches: Iterable[Tensor], num_features: int) -> tuple[Tensor, Tensor, int]:
    """Compute the mean and (population) std over all samples of all batches, in one pass and in float64.

    Args:
        batches: Feature batches [..., N]; consumed once.
        num_features: N.

    Returns:
        Mean and std, float64 [N] on the CPU, and the number of non-empty batches.

    Raises:
        HeadSpecError: No samples, features of another width, or features that are not finite.
    """
    mean = torch.zeros(num_features, dtype=torch.float64)
    squares = torch.zeros(num_features, dtype=torch.float64)
    samples = num_batches = 0
    for batch in batches:
        if batch.shape[-1] != num_features:
            raise HeadSpecError(f"Expected calibration features of width {num_features}, got {batch.shape[-1]}.")
        features = batch.reshape(-1, num_features).to(dtype=torch.float64, device="cpu")
        if not len(features):
            continue
        batch_mean = features.mean(dim=0)
        shift = batch_mean - mean
        total = samples + len(features)
        squares += (features - batch_mean).square().sum(dim=0) + shift.square() * (samples * len(features) / total)
        mean += shift * (len(features) / total)
        samples = total
        num_batches += 1
    if not samples:
        raise HeadSpecError("No calibration features were given.")
    if not bool(torch.isfinite(mean).all() and torch.isfinite(squares).all()):
        raise HeadSpecError("The calibration features are not finite.")
    return mean, (squares / samples).sqrt(), num_batches
