"""Compressed classifiers that are not fixify's, as strong as they are used elsewhere: what its heads are compared with.

Each is given what a calibrated head is given: the learned classifier, and inputs of it without labels. All take the
mean of the features into account: what a compressed weight loses there, `(W - W') mean`, is added to the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.heads.fitting import FeatureStatistics

_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)
"""Shares of a class's largest weight that are tried as the largest level."""
_COLUMNS_AT_ONCE = 64
_SCALE_BYTES = 2  # a step size in float16


@dataclass(frozen=True)
class Baseline:
    """A compressed classifier.

    Attributes:
        name: What it is, for a table.
        bytes_per_class: What is stored for each class, without the bias.
        weight: What the stored numbers stand for, float32 [C, N].
        bias: float32 [C].
    """

    name: str
    bytes_per_class: float
    weight: Tensor
    bias: Tensor

    def layer(self) -> nn.Linear:
        """Make a layer of it."""
        made = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        with torch.no_grad():
            made.weight.copy_(self.weight)
            made.bias.copy_(self.bias)
        return made.requires_grad_(False).eval()


def rounded(weight: Tensor, bias: Tensor, statistics: FeatureStatistics, bits: int) -> Baseline:
    """Round to integers with one step size per class, the one of the least squared error.

    Args:
        weight: [C, N].
        bias: [C].
        statistics: Of the classifier's inputs, without division by a std.
        bits: Bits per weight, at least 2.
    """
    step = _steps(weight, torch.ones(weight.shape[1]), bits)
    made = _integers(weight / step, bits) * step
    size = weight.shape[1] * bits / 8 + _SCALE_BYTES
    return Baseline(f"int{bits}, rounded", size, made, _corrected(bias, weight, made, statistics))


def compensated(weight: Tensor, bias: Tensor, statistics: FeatureStatistics, bits: int) -> Baseline:
    """Round to integers with error compensation: GPTQ (arXiv:2210.17323), which equals LDLQ (arXiv:2307.13304).

    Features are taken in the order of falling variance. Each is rounded after it has taken over the errors of those
    before, as the covariance says.

    Args:
        weight: [C, N].
        bias: [C].
        statistics: Of the classifier's inputs, without division by a std.
        bits: Bits per weight, at least 2.
    """
    moment = statistics.covariance
    order = moment.diagonal().argsort(descending=True)
    wanted = weight[:, order].T.contiguous()
    step = _steps(weight, moment.diagonal().float(), bits)[:, 0]
    feedback = error_feedback(moment[order][:, order])
    shifted, made = wanted.clone(), torch.empty_like(wanted)
    for start in range(0, len(wanted), _COLUMNS_AT_ONCE):
        group = slice(start, min(start + _COLUMNS_AT_ONCE, len(wanted)))
        errors = torch.empty_like(wanted[group])
        for i in range(group.stop - start):
            if i:
                shifted[start + i].addmv_(errors[:i].T, feedback[start + i, start : start + i])
            made[start + i] = _integers(shifted[start + i] / step, bits) * step
            torch.sub(wanted[start + i], made[start + i], out=errors[i])
        shifted[group.stop :].addmm_(feedback[group.stop :, group], errors)
    result = torch.empty_like(weight)
    result[:, order] = made.T
    size = weight.shape[1] * bits / 8 + _SCALE_BYTES
    return Baseline(f"int{bits}, GPTQ", size, result, _corrected(bias, weight, result, statistics))


def low_rank(weight: Tensor, bias: Tensor, statistics: FeatureStatistics, rank: int, bits: int = 8) -> Baseline:
    """Truncate the SVD of the classifier under the features' covariance, and round its factors to integers.

    The mean over classes is removed first, since softmax does not see it. Both factors have a step size per row.

    Args:
        weight: [C, N].
        bias: [C].
        statistics: Of the classifier's inputs, without division by a std.
        rank: r.
        bits: Bits per number of the factors.
    """
    c, n = weight.shape
    centered = weight - weight.mean(dim=0)
    values, vectors = torch.linalg.eigh(statistics.covariance)
    root = (values.clamp_min(0) ** 0.5).float()
    vectors = vectors.float()
    left, singular, right = torch.linalg.svd((centered @ vectors) * root, full_matrices=False)
    kept = singular[:rank].sqrt()
    back = (right[:rank] / root.clamp_min(1e-12)) @ vectors.T
    factors = [left[:, :rank] * kept, back * kept[:, None]]
    first, second = (_integers(factor / step, bits) * step for factor in factors for step in [_max_steps(factor, bits)])
    made = first @ second
    size = rank * bits / 8 + _SCALE_BYTES + rank * (n * bits / 8 + _SCALE_BYTES) / c
    return Baseline(f"SVD, rank {rank}, int{bits} factors", size, made, _corrected(bias, centered, made, statistics))


def rank_for(bytes_per_class: float, num_classes: int, num_features: int, bits: int = 8) -> int:
    """Return the largest rank of `low_rank` that takes at most so many bytes per class, at least 1.

    >>> rank_for(64, 1000, 256)
    49
    """
    each = bits / 8 + (num_features * bits / 8 + _SCALE_BYTES) / num_classes
    return max(1, min(num_classes, num_features, int((bytes_per_class - _SCALE_BYTES) / each)))


def error_feedback(moment: Tensor) -> Tensor:
    """Compute what each coordinate takes over of the errors of those before it: strictly lower triangular [d, d].

    With S = M D M^T, M upper triangular with ones on its diagonal and D diagonal, the error e^T S e is the sum of
    D_kk (e_k + sum over j < k of M_jk e_j)^2. So M^T is the result.

    Args:
        moment: S, positive definite, [d, d].
    """
    factor = torch.linalg.cholesky(moment.double().flip(0, 1)).flip(0, 1)
    return (factor / factor.diagonal()).triu(1).T.float().contiguous()


def _integers(values: Tensor, bits: int) -> Tensor:
    return values.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _max_steps(weight: Tensor, bits: int) -> Tensor:
    return (weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-12).half().float()


def _steps(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Choose the step size of each class [C, 1] among `_CLIPS` by the squared error, weighted by feature."""
    largest = _max_steps(weight, bits) * (2 ** (bits - 1) - 1) / 2 ** (bits - 1)
    best, least = largest, torch.full((len(weight), 1), torch.inf)
    for clip in _CLIPS:
        step = (largest * clip).half().float().clamp_min(1e-7)
        error = ((weight - _integers(weight / step, bits) * step).square() * importance).sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def _corrected(bias: Tensor, weight: Tensor, made: Tensor, statistics: FeatureStatistics) -> Tensor:
    return bias + F.linear(statistics.mean, weight - made)
