"""Store a learned classifier in few bytes, as others do it: with integers, a truncated SVD, or fewer weights.

Each method has two forms. The plain one looks at the weights only. The calibrated one also knows the features of some
images without labels. It lowers the error of the logits on them instead of the error of the weights, and the bias takes
the mean of the error that remains.

The bias is stored in float32 everywhere, as in a fixed head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (8, 4, 3, 2)
"""Widths of the integers."""
_HALF = 2
"""Bytes of a stored float16: a scale, an offset, a weight that was not pruned."""
_FLOAT = 4
_CLIPS = torch.linspace(1.0, 0.3, 29)
"""Shares of a class's range that the levels may cover. Outliers cost the other weights precision."""
_DAMPING = 0.01
"""Share of the mean variance that is added to each variance (the default of GPTQ's authors)."""
_COLUMNS = 128
"""Columns that are rounded before the others are corrected."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a classifier's features on images without labels.

    Attributes:
        mean: float64 [N].
        covariance: float64 [N, N], damped so that it can be inverted.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Measure them on features [samples, N]."""
        x = features.double()
        mean = x.mean(dim=0)
        covariance = (x - mean).T @ (x - mean) / len(x)
        variance = float(covariance.diagonal().mean())
        covariance.diagonal().add_(_DAMPING * variance if variance > 0 else 1.0)
        return cls(mean, covariance)


@dataclass(frozen=True)
class Alternative:
    """A classifier that takes fewer bytes than the original's.

    Attributes:
        name: What it is, for example "int4".
        calibrated: Whether it knows the features of some images.
        weight: float32 [C, N], the weights as they come out of the file.
        bias: float32 [C], or None.
        num_bytes: Bytes of what is stored: the weights in their small form, and the bias.
        bits: Width of the integers; None where the weights are none.
        rank: Columns of the two factors that the weights are the product of; None for weights of their own.
    """

    name: str
    calibrated: bool
    weight: Tensor
    bias: Tensor | None
    num_bytes: int
    bits: int | None = None
    rank: int | None = None


def alternatives(
    weight: Tensor, bias: Tensor | None, budget: int, moments: Moments | None = None
) -> Iterator[Alternative]:
    """Make every alternative to a learned classifier.

    Args:
        weight: [C, N].
        bias: [C] or None.
        budget: Bytes that the SVD and the pruned weights may take, bias included. One that cannot be stored in so few
            is left out.
        moments: Mean and covariance of the features; None leaves the calibrated forms out.
    """
    weight = weight.detach().float()
    bias = None if bias is None else bias.detach().float()
    weights_budget = budget - (0 if bias is None else _FLOAT * len(bias))
    for known in (None, moments) if moments is not None else (None,):
        for bits in BITS:
            rounded = round_weights(weight, bits, known)
            made = _made(f"int{bits}", weight, bias, rounded, rounded_bytes(weight, bits), known)
            yield replace(made, bits=bits)
        rank = svd_rank(weight, weights_budget)
        if rank > 0:
            low = truncate(weight, rank, known)
            made = _made(f"SVD, rank {rank}, int8", weight, bias, low, svd_bytes(weight, rank), known)
            yield replace(made, rank=rank)
        kept = weights_budget // (2 * _HALF)
        if 0 < kept < weight.numel():
            yield _made("pruned", weight, bias, prune(weight, kept, known), kept * 2 * _HALF, known)


def _made(
    name: str, weight: Tensor, bias: Tensor | None, changed: Tensor, num_bytes: int, moments: Moments | None
) -> Alternative:
    if moments is not None and bias is not None:
        bias = (bias.double() + (weight - changed).double() @ moments.mean).float()
    stored = num_bytes + (0 if bias is None else _FLOAT * len(bias))
    return Alternative(name, moments is not None, changed, bias, stored)


# Integers.


def rounded_bytes(weight: Tensor, bits: int) -> int:
    """Count the bytes of integers: `bits` a weight, and a scale and an offset in float16 for each class."""
    num_classes, num_features = weight.shape
    return num_classes * math.ceil(num_features * bits / 8) + 2 * _HALF * num_classes


def round_weights(weight: Tensor, bits: int, moments: Moments | None = None) -> Tensor:
    """Round weights to 2^bits evenly spaced levels per class.

    The levels cover the share of the class's range that gives the least squared error of the weights. Without moments
    each weight takes the nearest level. With them, the error of each column is made up for by the columns that are
    rounded after it: Frantar et al., "GPTQ" (ICLR 2023), algorithm 1, in the order of falling variance.

    Args:
        weight: float32 [C, N].
        bits: Width of the integers.
        moments: Mean and covariance of the features.

    Returns:
        The rounded weights, float32 [C, N].
    """
    importance = None if moments is None else moments.covariance.diagonal().float()
    scale, offset = _levels(weight, bits, importance)
    if moments is None:
        return _nearest(weight, scale, offset, bits)
    order = moments.covariance.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(moments.covariance[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight[:, order].clone()
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, left.shape[1])
        errors = torch.empty(len(left), stop - start)
        for column in range(start, stop):
            rounded[:, column] = _nearest(left[:, column : column + 1], scale, offset, bits)[:, 0]
            errors[:, column - start] = (left[:, column] - rounded[:, column]) / factor[column, column]
            left[:, column:stop] -= errors[:, column - start, None] * factor[column, column:stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded[:, order.argsort()]


def _levels(weight: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose the step and the lowest level of each class, [C, 1] each, in float16's precision."""
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    best = torch.full_like(low, math.inf)
    scale, offset = torch.ones_like(low), torch.zeros_like(low)
    for clip in _CLIPS.tolist():
        step = (clip * (high - low) / (2**bits - 1)).clamp_min(1e-7).half().float()
        lowest = (clip * low).half().float()
        squared = (_nearest(weight, step, lowest, bits) - weight).square()
        error = (squared if importance is None else squared * importance).sum(dim=1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, step, scale), torch.where(better, lowest, offset)
    return scale, offset


def _nearest(weight: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    return ((weight - offset) / scale).round().clamp(0, 2**bits - 1) * scale + offset


# A truncated SVD.


def svd_bytes(weight: Tensor, rank: int) -> int:
    """Count the bytes of two factors with int8 entries, and a float16 scale for each of their columns."""
    return rank * (sum(weight.shape) + 2 * _HALF)


def svd_rank(weight: Tensor, budget: int) -> int:
    """Return the greatest rank whose factors fit into so many bytes, from 0 to min(C, N)."""
    return max(0, min(budget // svd_bytes(weight, 1), *weight.shape))


def truncate(weight: Tensor, rank: int, moments: Moments | None = None) -> Tensor:
    """Approximate weights by a product of two factors whose entries are int8.

    With moments the error of the logits is the least possible: the SVD is that of W S, where S S' is the covariance.

    Args:
        weight: float32 [C, N].
        rank: Columns of the factors.
        moments: Mean and covariance of the features.

    Returns:
        The product, float32 [C, N].
    """
    root = None if moments is None else torch.linalg.cholesky(moments.covariance)
    u, s, vh = torch.linalg.svd(weight.double() if root is None else weight.double() @ root, full_matrices=False)
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return _int8(left, dim=0) @ _int8(right, dim=1)


def _int8(factor: Tensor, dim: int) -> Tensor:
    scale = (factor.abs().amax(dim=dim, keepdim=True) / 127).clamp_min(1e-7).half().double()
    return ((factor / scale).round().clamp(-127, 127) * scale).float()


# Fewer weights.


def prune(weight: Tensor, kept: int, moments: Moments | None = None) -> Tensor:
    """Keep the most important weights, in float16, and make the others zero.

    Without moments they are the largest of all. With them they are, in each class, those whose size times the deviation
    of their feature is largest: Sun et al., "A simple and effective pruning approach for large language models" (Wanda;
    ICLR 2024), equation 1. A kept weight takes 4 bytes, 2 of them for its place.

    Args:
        weight: float32 [C, N].
        kept: How many weights, at most.
        moments: Mean and covariance of the features.

    Returns:
        The weights, float32 [C, N].
    """
    importance = weight.abs().flatten()[None]
    if moments is not None:
        importance = weight.abs() * moments.covariance.diagonal().sqrt().float()
    mask = torch.zeros_like(importance, dtype=torch.bool)
    mask.scatter_(1, importance.topk(kept // len(importance)).indices, True)
    return torch.where(mask.view_as(weight), weight.half().float(), 0.0)
