"""The search for the stored projection of a `binary` head, and for the levels of the classes in its coordinates.

With S the second moment of the features and S = L L^T, the error of a class under S is |L^T w - L^T B q|^2 for its
vector w, the directions B and its levels q. So the best d directions are B = L^-T U, U the first d principal directions
of the vectors L^T w. In these coordinates errors add up, and bits go one by one to the coordinate whose error falls
most for the bytes that it takes: reverse water-filling (Cover and Thomas, "Elements of Information Theory", 13.3.3),
where the first bit of a coordinate also pays for its direction. Directions are then rounded to 8 bits, and levels and
step sizes make up for it by the coordinate descent of `fixify.heads.level_search`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fixify._watch import OnProgress
from fixify.heads.answer_search import Answers, refine_
from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.level_search import CenteredRows, best_length, descend, row_scale_steps
from fixify.heads.levels import PLANES
from fixify.heads.projection import LARGEST_ENTRY, Projection, bits_of, signs_of_levels

_SWEEPS = 4
_LAST_SWEEPS = 2
_ROUNDINGS = 12
"""Rounds of levels and step sizes where a class is rounded without a metric."""
_CLASSES_PER_BLOCK = 2048
_STEP_BYTES = 4
"""Of the step of a direction, in float32."""


@dataclass(frozen=True)
class Principal:
    """The principal directions of class vectors under a metric, those of largest variance first.

    Attributes:
        variances: Of the classes' coordinates, float64 [N], not negative.
        directions: B, float64 [N, N]; of unit second moment under the metric.
        axes: L U, float64 [N, N]: coordinates of a class vector are its products with these.
    """

    variances: Tensor
    directions: Tensor
    axes: Tensor

    @classmethod
    def of(cls, rows: CenteredRows, moment: Tensor) -> Principal:
        """Find them.

        Args:
            rows: Class vectors without their mean, [C, N].
            moment: S, positive definite, [N, N].
        """
        lower = torch.linalg.cholesky(moment.double())
        scatter = torch.zeros_like(lower)
        for start in range(0, len(rows), _CLASSES_PER_BLOCK):
            part = rows[start : start + _CLASSES_PER_BLOCK].double() @ lower
            scatter += part.T @ part
        variances, units = torch.linalg.eigh(scatter / len(rows))
        units = units.flip(1)
        directions = torch.linalg.solve_triangular(lower.T, units, upper=True)
        return cls(variances.flip(0).clamp_min(0.0), directions, lower @ units)


def water_filling(variances: Tensor, num_classes: int, num_bytes: int) -> tuple[int, ...]:
    """Divide bytes among directions and signs so that the squared error of the classes is least.

    For each number of bytes per class that is possible, as many directions as the others pay for share the signs.

    Args:
        variances: Of the classes in each coordinate, largest first, [N].
        num_classes: C; each of them stores all signs, in whole bytes.
        num_bytes: For the signs of all classes, the directions and their steps.

    Returns:
        The planes of a `Projection`: how many coordinates have a first sign, a second, ...; empty if the bytes pay for
        no projection that tells the classes apart.

    >>> water_filling(4.0 ** -torch.arange(16), num_classes=200, num_bytes=500)
    (5, 4, 3, 2, 1, 1)
    """
    n, c = len(variances), num_classes
    noises = (1.0, *(levels.noise for levels in PLANES))
    drops = torch.tensor([before - after for before, after in pairwise(noises)], dtype=torch.float64)
    gains = variances.double()[:, None] * drops  # what each further sign of a coordinate removes of its squared error
    best, chosen = 0.0, torch.zeros(0, dtype=torch.int64)
    for row_bytes in range(1, n // 8 + 1):
        paid = min(n, (num_bytes - c * row_bytes) // (n + _STEP_BYTES))
        signs = min(8 * row_bytes, len(PLANES) * paid)
        if signs < 1 or c > 2 ** min(signs, 63):
            continue
        found = gains[:paid].flatten().topk(signs)
        if float(found.values.sum()) > best:
            best, chosen = float(found.values.sum()), found.indices
    counts = torch.bincount(chosen % len(PLANES), minlength=len(PLANES)).tolist()
    return tuple(count for count in counts if count)


@dataclass(frozen=True)
class ProjectedLevels:
    """What a head with a stored projection holds.

    Attributes:
        packed: Signs of the classes, uint8 [C, ceil(T / 8)].
        lengths: Step sizes of the classes, float32 [C]: whole steps of 1/255 of the largest.
        projection: The projection; its longest column is of length 1.
    """

    packed: np.ndarray
    lengths: Tensor
    projection: Projection


def choose_projected(
    rows: CenteredRows,
    moment: Tensor,
    planes: tuple[int, ...],
    answers: Answers | None,
    on_progress: OnProgress,
) -> ProjectedLevels:
    """Choose the directions, the levels and the step size of each class.

    Args:
        rows: Class vectors without their mean, float32 [C, N].
        moment: S, positive definite, [N, N].
        planes: Coordinates with a first, a second, ... sign.
        answers: What the old classifier answers to some samples, for a last search, if they are many.
        on_progress: Called with the number of classes that are done.
    """
    c, d, what = len(rows), planes[0], "choosing levels"
    found, bits = Principal.of(rows, moment), bits_of(planes)
    levels = [PLANES[count - 1] for count in bits.tolist()]
    spreads = found.variances[:d].sqrt().clamp_min(1e-30)
    units = spreads * torch.tensor([each.step / each.spacing for each in levels], dtype=torch.float64)
    projection = _rounded((found.directions[:, :d] * units).T, planes)
    basis = torch.from_numpy(projection.rows()).T  # [N, d]
    wide = moment.float()
    towards = wide @ basis
    within = basis.T @ towards
    axes, starts = (found.axes[:, :d] / spreads).float(), (spreads / units).float()
    largest = torch.tensor([each.largest for each in levels], dtype=torch.float32)
    q, lengths = torch.empty(c, d, dtype=torch.int8), torch.empty(c)
    blocks = [slice(start, min(start + _CLASSES_PER_BLOCK, c)) for start in range(0, c, _CLASSES_PER_BLOCK)]
    for part in blocks:
        vectors = rows[part]
        wanted = vectors @ axes  # of variance 1 over the classes
        wanted = wanted / wanted.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-30) * starts
        start = _nearest(wanted, largest)
        fields = (vectors @ towards).T.contiguous()
        numbers, lengths[part] = descend(start.T.contiguous(), fields, within, levels, _SWEEPS)
        q[part] = numbers.T.to(torch.int8)
        on_progress(what, max(1, part.stop // 2), c)
    lengths = row_scale_steps(lengths) * (lengths.max() / GAIN_STEPS)
    for part in blocks:
        fields = (rows[part] @ towards).T.contiguous()
        numbers, _ = descend(q[part].float().T.contiguous(), fields, within, levels, _LAST_SWEEPS, lengths[part])
        q[part] = numbers.T.to(torch.int8)
        on_progress(what, (c + part.stop) // 2, c)
    if answers is not None:
        touched, numbers = answers.touched, q[answers.touched].float().T.contiguous()
        refine_(numbers, lengths[touched], rows[touched], basis, wide, levels, answers)
        q[touched] = numbers.T.to(torch.int8)
    return ProjectedLevels(signs_of_levels(q.numpy(), planes), lengths, projection)


def _rounded(directions: Tensor, planes: tuple[int, ...]) -> Projection:
    """Round directions [d, N], each as long as a unit of its levels, and make the longest column of length 1."""
    entries = directions.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / LARGEST_ENTRY
    longest = float((directions.norm(dim=1) * 2.0 ** torch.from_numpy(bits_of(planes) - 1)).max())
    whole = (directions / entries).round().to(torch.int8)
    return Projection(planes, whole.numpy(), (entries[:, 0] / max(longest, 1e-30)).float().numpy())


def round_projected(
    wanted: Tensor, planes: tuple[int, ...], longest: float | None = None
) -> tuple[np.ndarray, Tensor | None]:
    """Round classes to levels one by one, for a head whose other classes and projection stay as they are.

    Reverse water-filling leaves each coordinate about the same error, so a step of a level weighs the same in each.

    Args:
        wanted: Classes in the coordinates of the levels, float32 [k, d].
        planes: Coordinates with a first, a second, ... sign.
        longest: The step size that the row scale 255 stands for; None: step sizes are not stored.

    Returns:
        Packed signs, uint8 [k, ceil(T / 8)], and row scales, uint8 [k], if they are stored.
    """
    counts = bits_of(planes)
    largest = torch.tensor([float(PLANES[count - 1].largest) for count in counts.tolist()])
    usual = torch.tensor([PLANES[count - 1].mean_square for count in counts.tolist()])
    step = (wanted.square() / usual).mean(dim=1, keepdim=True).sqrt()
    q = wanted
    for _ in range(_ROUNDINGS):
        q = _nearest(wanted / step.clamp_min(1e-30), largest)
        along, square = (q * wanted).sum(dim=1, keepdim=True), q.square().sum(dim=1, keepdim=True)
        step = best_length(along, square)
    gains = None
    if longest is not None:
        steps = (step / longest * GAIN_STEPS).round().clamp(1, GAIN_STEPS)
        q, gains = _nearest(wanted / (steps * (longest / GAIN_STEPS)), largest), steps[:, 0].to(torch.uint8)
    return signs_of_levels(q.to(torch.int8).numpy(), planes), gains


def _nearest(wanted: Tensor, largest: Tensor) -> Tensor:
    """Round to the nearest odd numbers within plus and minus `largest`, [d]: [k, d]."""
    return torch.minimum(torch.maximum((wanted * 0.5).floor() * 2.0 + 1.0, -largest), largest)
