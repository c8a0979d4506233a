"""The search for the signs or levels of a `binary` head, under the features' covariance.

With S the second moment of the features and B the coordinates of the levels, a class of vector w gets the levels q and
the step size g that lower

    (w - g B q)^T S (w - g B q).

Coordinate descent starts at the rounded vector: each coordinate takes the best level given all others, and after each
sweep the step size is the best one for the levels. (Rounding with error feedback, as LDLQ of arXiv:2307.13304 does,
ends no better after the descent.) Last, the step sizes are rounded to the row scales that are stored, and the levels
make up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixify._values import counted
from fixify._watch import OnProgress
from fixify.errors import HeadSpecError
from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.codes import first_repeated, unpacked_levels
from fixify.heads.levels import SIGNS, Levels
from fixify.heads.signs import pack_levels

_SWEEPS = 6
_LAST_SWEEPS = 2
_CLASSES_PER_BLOCK = 2048
_COORDINATES_PER_BLOCK = 64
_ROUNDINGS = 12  # rounds of levels and step sizes where coordinates do not depend on each other


@dataclass(frozen=True)
class CenteredRows:
    """Class vectors [C, N] without their mean [N], made when they are asked for: no second copy of a large classifier.

    >>> CenteredRows(torch.eye(2), torch.full((2,), 0.5))[1:]
    tensor([[-0.5000,  0.5000]])
    """

    vectors: Tensor
    mean: Tensor

    def __len__(self) -> int:
        """Return C."""
        return len(self.vectors)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return some rows, [k, N]."""
        return self.vectors[rows] - self.mean


def choose_levels(
    vectors: CenteredRows | Tensor, directions: Tensor, moment: Tensor | None, levels: Levels, on_progress: OnProgress
) -> tuple[np.ndarray, Tensor]:
    """Choose the levels and the step size of each class.

    Args:
        vectors: Class vectors without their mean, float32 [C, N].
        directions: The coordinates that the levels are in, orthonormal columns, [N, d].
        moment: S, [N, N]; None: the identity.
        levels: Which levels there are.
        on_progress: Called with the number of classes that are done.

    Returns:
        Packed levels, uint8 [C, bytes], and step sizes float32 [C]: whole steps of 1/255 of the largest.
    """
    c, d = len(vectors), directions.shape[1]
    packed, steps = np.empty((c, levels.num_bytes(d)), dtype=np.uint8), torch.empty(c)
    what = "choosing signs" if levels is SIGNS else "choosing levels"
    towards = directions if moment is None else moment @ directions
    within = directions.T @ towards
    blocks = [slice(start, min(start + _CLASSES_PER_BLOCK, c)) for start in range(0, c, _CLASSES_PER_BLOCK)]
    for part in blocks:
        wanted = (vectors[part] @ directions).T.contiguous()  # a coordinate of all classes is contiguous
        step = wanted.square().mean(dim=0).sqrt() * (levels.step / levels.spacing)
        if moment is None:
            q, steps[part] = _round(wanted, step, levels)
        else:
            q = nearest_levels(wanted / step.clamp_min(1e-30), levels)
            fields = (vectors[part] @ towards).T.contiguous()
            q, steps[part] = descend(q, fields, within, [levels] * d, _SWEEPS)
        packed[part] = pack_levels(q.T.to(torch.int8).numpy(), levels)
        on_progress(what, max(1, part.stop // 2), c)
    longest = steps.max()
    steps = row_scale_steps(steps) * (longest / GAIN_STEPS)
    for part in blocks:
        wanted = (vectors[part] @ directions).T.contiguous()
        if moment is None:
            q = nearest_levels(wanted / steps[part].clamp_min(1e-30), levels)
        else:
            q = torch.from_numpy(unpacked_levels(packed[part], d, levels)).float().T.contiguous()
            fields = (vectors[part] @ towards).T.contiguous()
            q, _ = descend(q, fields, within, [levels] * d, _LAST_SWEEPS, steps[part])
        packed[part] = pack_levels(q.T.to(torch.int8).numpy(), levels)
        on_progress(what, (c + part.stop) // 2, c)
    return packed, steps


def round_classes(wanted: Tensor, levels: Levels, longest: float | None = None) -> tuple[np.ndarray, Tensor | None]:
    """Round classes to levels one by one, for a head whose other classes stay as they are.

    Args:
        wanted: Class vectors in the coordinates of the levels, float32 [k, d].
        levels: Which levels there are.
        longest: The step size that the row scale 255 stands for; None: step sizes are not stored.

    Returns:
        Packed levels, uint8 [k, bytes], and row scales, uint8 [k], if they are stored. Step sizes beyond `longest` are
        cut to it, and the levels then saturate.
    """
    columns = wanted.T.contiguous()
    q, step = _round(columns, columns.square().mean(dim=0).sqrt() * (levels.step / levels.spacing), levels)
    gains = None
    if longest is not None:
        steps = (step / longest * GAIN_STEPS).round().clamp(1, GAIN_STEPS)
        q, gains = nearest_levels(columns / (steps * (longest / GAIN_STEPS)), levels), steps.to(torch.uint8)
    return pack_levels(q.T.to(torch.int8).numpy(), levels), gains


def row_scale_steps(lengths: Tensor) -> Tensor:
    """Round lengths [C], not all 0, to whole steps of 1/255 of the longest, at least one: float32 [C]."""
    return (lengths / float(lengths.max()) * GAIN_STEPS).round().clamp(1, GAIN_STEPS)


def nearest_levels(wanted: Tensor, levels: Levels) -> Tensor:
    """Round to the nearest levels.

    >>> from fixify.heads.levels import LEVELS
    >>> nearest_levels(torch.tensor([-9.0, 0.4, 2.2]), LEVELS[2])
    tensor([-3.,  1.,  3.])
    """
    if levels.spacing == 2:
        return wanted.mul(0.5).floor_().mul_(2.0).add_(1.0).clamp_(-levels.largest, levels.largest)
    return wanted.round().clamp_(-levels.largest, levels.largest)


def _round(wanted: Tensor, step: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Round each coordinate [d, k] on its own, with the step size [k] that then fits best."""
    q = wanted
    for _ in range(_ROUNDINGS):
        q = nearest_levels(wanted / step.clamp_min(1e-30), levels)
        step = best_length((q * wanted).sum(dim=0), q.square().sum(dim=0))
    return q, step


def descend(
    q: Tensor, fields: Tensor, moment: Tensor, levels: Sequence[Levels], sweeps: int, steps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Minimise `g^2 q^T S q - 2 g h^T q` over levels q and step size g of each class, by coordinate descent.

    A sweep that changes no level of a class leaves its step size as it is, and the next one would change none either;
    such classes take no part in further sweeps.

    Args:
        q: Start, float32 [d, k]; changed in place.
        fields: h = S w, [d, k].
        moment: S, [d, d].
        levels: Which levels each coordinate has.
        sweeps: How many sweeps at most.
        steps: Step sizes that stay, [k]; None: the best ones for the levels, after each sweep.

    Returns:
        Levels [d, k] and step sizes [k].
    """
    along, square = (fields * q).sum(dim=0), ((moment @ q) * q).sum(dim=0)  # h^T q and q^T S q
    active = torch.arange(q.shape[1])
    for _ in range(sweeps):
        part, h = q[:, active], fields[:, active]
        step = (best_length(along[active], square[active]) if steps is None else steps[active]).clamp_min(1e-30)
        changed = torch.zeros(len(active), dtype=torch.bool)
        for start in range(0, len(part), _COORDINATES_PER_BLOCK):
            group = slice(start, min(start + _COORDINATES_PER_BLOCK, len(part)))
            inner = moment[group, group]
            products, changes = moment[group] @ part, torch.zeros_like(part[group])
            pulls = h[group] / step - products
            for i, own_weight in enumerate(inner.diagonal().tolist()):
                pull = pulls[i]
                if i:
                    pull.addmv_(changes[:i].T, inner[i, :i], alpha=-1.0)
                new = nearest_levels(pull / own_weight + part[start + i], levels[start + i])
                torch.sub(new, part[start + i], out=changes[i])
            along[active] += (h[group] * changes).sum(dim=0)
            square[active] += (changes * (2.0 * products + inner @ changes)).sum(dim=0)
            part[group] += changes
            changed |= changes.any(dim=0)
        q[:, active] = part
        active = active[changed]
        if not len(active):
            break
    if steps is None:
        steps = best_length((fields * q).sum(dim=0), ((moment @ q) * q).sum(dim=0))
    return q, steps


def best_length(along: Tensor, square: Tensor) -> Tensor:
    """Return the length g >= 0 at which `g^2 square - 2 g along` is least, for each class."""
    return (along / square.clamp_min(1e-12)).clamp_min(0.0)


def separate_levels_(packed: np.ndarray, count: int, levels: Levels) -> None:
    """Change levels of classes until no two classes have equal levels, which could never be told apart.

    Of each group of equals the first is kept. For the others, the last levels are counted through until the code is
    free, as for signs. Ternary and finer levels are digits of base 3, 4, 8 or 16.

    Args:
        packed: Packed levels, uint8 [C, bytes]; changed in place.
        count: Levels per class.
        levels: Which levels they are.

    Raises:
        HeadSpecError: There are not enough different codes.
    """
    if first_repeated(packed) is None:
        return
    taken: set[bytes] = set()
    reached: dict[bytes, int] = {}
    base, counting = len(levels.values), min(count, 20)
    for number in range(len(packed)):
        code = packed[number]
        first = code.tobytes()
        if first in taken:
            index = (unpacked_levels(code[None], count, levels)[0] + levels.largest) // levels.spacing
            tried, turn = index.copy(), reached.get(first, 0)
            while code.tobytes() in taken:
                turn += 1
                if turn >= base**counting:
                    raise HeadSpecError(
                        f"There is no free code of {counted(count, 'sign' if levels is SIGNS else 'level')} left."
                    )
                digits = np.array([turn // base**k % base for k in range(counting)][::-1])
                tried[-counting:] = (index[-counting:] + digits) % base
                code[:] = pack_levels(tried[None].astype(np.int16) * levels.spacing - levels.largest, levels)[0]
            reached[first] = turn
        taken.add(code.tobytes())
