"""The last search for signs or levels: by the answers that the old classifier gave to some samples.

The metric of `fixify.heads.level_search` treats all classes alike. An answer depends on the few classes that are near
the top for a sample, and on the difference of their errors. With the error e_c(x) of the logit of class c at a sample
x, and the old softmax p, the divergence from the old softmax is, to second order,

    1/2 sum_c p_c(x) (e_c(x) - sum_k p_k(x) e_k(x))^2.

Coordinate descent lowers the sum of this over the samples, plus the error under the metric, which stands for all that
the samples do not show. All classes move at once, so each takes the curvature p_c(x) instead of p_c(x) (1 - p_c(x)),
with which the sum cannot rise (majorisation: Boehning and Lindsay, "Monotonicity of quadratic-approximation
algorithms", 1988). Only the likeliest classes of a sample take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixify.heads.codes import unpacked_levels
from fixify.heads.level_search import CenteredRows, nearest_levels
from fixify.heads.levels import Levels
from fixify.heads.signs import pack_levels

LIKELIEST = 12
"""Classes of a sample that take part."""
_METRIC_SAMPLES = 0.3
"""Weight of the metric, in samples of which a class has the whole softmax. Measured as divergence at one bit, 2,965
kanji, on 512 samples that took no part, with 1,536 others: 1: 0.0301, 0.3: 0.0275, 0.1: 0.0309; without this search
0.0306."""
SAMPLES_PER_FEATURE = 6
"""Samples for each feature that the search needs. With fewer, what they teach by heart does not hold for others.
With 2 (2,000 classes of ddddocr's reader) the divergence on others rose from 0.0293 to 0.0316 nats with a weight of 1,
and more with less."""
_MOST_SAMPLES_PER_FEATURE = 12
_SWEEPS = 2
_COORDINATES_PER_BLOCK = 64
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Answers:
    """Samples, and the classes that the old classifier finds likeliest for them.

    Attributes:
        features: Centered features, float32 [S, N].
        classes: The likeliest classes, int64 [S, k].
        softmax: Their old softmax, which sums to 1, float32 [S, k].
    """

    features: Tensor
    classes: Tensor
    softmax: Tensor

    @property
    def touched(self) -> Tensor:
        """The classes that are among the likeliest of some sample, int64 [k], in ascending order."""
        return self.classes.unique()

    @classmethod
    def of(cls, features: Tensor, center: Tensor, std: Tensor, weight: Tensor, bias: Tensor | None) -> Answers | None:
        """Ask the old classifier, if there are enough samples; else return None.

        Args:
            features: Inputs of the classifier, float32 [S, N] in random order.
            center: What is subtracted of them before they are divided by `std`, [N].
            std: See `center`, [N].
            weight: Its weight, float32 [C, N].
            bias: Its bias, [C].
        """
        n = features.shape[1]
        if len(features) < SAMPLES_PER_FEATURE * n:
            return None
        features = features[: _MOST_SAMPLES_PER_FEATURE * n]
        chances, classes = [], []
        for rows in features.split(_ROWS_AT_ONCE):
            logits = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
            found = logits.topk(min(LIKELIEST, len(weight)), dim=1)
            chances.append(found.values.softmax(dim=1))
            classes.append(found.indices)
        return cls((features - center) / std, torch.cat(classes), torch.cat(chances))


def refine_levels_(
    packed: np.ndarray,
    steps: Tensor,
    vectors: CenteredRows | Tensor,
    directions: Tensor,
    moment: Tensor,
    levels: Levels,
    answers: Answers,
) -> None:
    """Change the levels of classes that are near the top for some sample.

    Args:
        packed: Packed levels, uint8 [C, bytes]; changed in place.
        steps: Step size of each class, [C].
        vectors: Class vectors without their mean, float32 [C, N].
        directions: The coordinates that the levels are in, orthonormal columns, [N, d].
        moment: The metric, in the coordinates of the features, [N, N].
        levels: Which levels there are.
        answers: The samples.
    """
    d, touched = directions.shape[1], answers.touched
    rows = touched.numpy()
    q = torch.from_numpy(unpacked_levels(packed[rows], d, levels)).float().T.contiguous()
    refine_(q, steps[touched], vectors[touched], directions, moment, [levels] * d, answers)
    packed[rows] = pack_levels(q.T.to(torch.int8).numpy(), levels)


def refine_(
    q: Tensor,
    steps: Tensor,
    vectors: Tensor,
    directions: Tensor,
    moment: Tensor,
    levels: Sequence[Levels],
    answers: Answers,
) -> None:
    """Change the levels of the classes that are near the top for some sample, `answers.touched`.

    Args:
        q: Their levels, float32 [d, k]; changed in place.
        steps: Their step sizes, [k].
        vectors: Their class vectors without the mean, float32 [k, N].
        directions: The coordinates that the levels are in, [N, d].
        moment: The metric, in the coordinates of the features, [N, N].
        levels: Which levels each coordinate has.
        answers: The samples.
    """
    own = answers.classes.unique(return_inverse=True)[1]  # [S, m], columns of `q`
    step = steps.clamp_min(1e-30)
    towards = _METRIC_SAMPLES * (moment @ directions)
    fields, within = (vectors @ towards).T.contiguous(), directions.T @ towards
    seen = (answers.features @ directions).T.contiguous()  # a coordinate of all samples is contiguous
    columns = (q * step).T
    errors = torch.stack([(vectors[one] * x).sum(dim=1) for one, x in zip(own, answers.features, strict=True)])
    errors -= torch.stack([(columns[one] * y).sum(dim=1) for one, y in zip(own, seen.T, strict=True)])
    for _ in range(_SWEEPS):
        if not _sweep_(q, step, fields, within, seen, own, answers.softmax, errors, levels):
            break


def _sweep_(
    q: Tensor,
    step: Tensor,
    fields: Tensor,
    within: Tensor,
    seen: Tensor,
    own: Tensor,
    softmax: Tensor,
    errors: Tensor,
    levels: Sequence[Levels],
) -> bool:
    """Give each coordinate of all classes its best level, given the others; return whether any changed.

    Args:
        q: Levels, float32 [d, k]; changed in place.
        step: Step sizes, [k].
        fields: The metric times its weight and the class vectors, [d, k].
        within: The metric times its weight, [d, d].
        seen: Samples, [d, S].
        own: Likeliest classes of each sample, [S, m], columns of `q`.
        softmax: Their old softmax, [S, m].
        errors: Old logits minus those of the levels, [S, m]; changed in place.
        levels: Which levels each coordinate has.
    """
    classes, any_changed = own.flatten(), False
    for start in range(0, len(q), _COORDINATES_PER_BLOCK):
        group = slice(start, min(start + _COORDINATES_PER_BLOCK, len(q)))
        inner = within[group, group]
        changes = torch.zeros_like(q[group])
        pulls = fields[group] / step - within[group] @ q
        for i, metric in enumerate(inner.diagonal().tolist()):
            x = seen[start + i]
            pull = pulls[i]
            if i:
                pull.addmv_(changes[:i].T, inner[i, :i], alpha=-1.0)
            common = (softmax * errors).sum(dim=1, keepdim=True)
            slope = (softmax * (errors - common) * x[:, None]).flatten()
            of_answers = torch.zeros_like(step).index_add_(0, classes, slope) / step
            curvature = torch.zeros_like(step).index_add_(0, classes, (softmax * x.square()[:, None]).flatten())
            move = (pull + of_answers) / (metric + curvature)
            torch.sub(nearest_levels(move + q[start + i], levels[start + i]), q[start + i], out=changes[i])
            if bool(changes[i].any()):
                any_changed = True
                errors -= (changes[i] * step)[own] * x[:, None]
        q[group] += changes
    return any_changed
