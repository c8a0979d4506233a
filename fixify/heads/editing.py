"""Change the classes of a fixed head: keep some, add some, merge some.

The classes that stay keep their codes, row scales and biases, so their logits stay the same. That is possible where
each class has a code of its own: rows of Hadamard matrices (matched or in class order, matched afterwards), stored
signs or levels, and features. The codes of orthogonal and simplex heads all depend on the number of classes.

The logits are the same bit for bit as long as the product is computed in the same way. A binary head that falls below
2^19 signs or levels is multiplied as numbers, and the last bit of a logit may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fixify.errors import HeadSpecError
from fixify.heads import streams
from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.codes import FeatureRows, HadamardRows, StoredLevels, StoredSigns, unpacked_levels
from fixify.heads.kinds import default_blocks, default_codes, kind_of, min_blocks
from fixify.heads.layer import FixedClassifier
from fixify.heads.level_search import round_classes, separate_levels_
from fixify.heads.projection import Projection, levels_of_signs
from fixify.heads.projection_search import round_projected
from fixify.heads.spec import HeadSpec

_ASSIGNED = 1 << 24
"""Cosines of the largest table that is assigned optimally; beyond, each class takes the best code that is free."""
_AT_ONCE = 4096  # codes


@torch.no_grad()
def keep_classes(head: FixedClassifier, classes: Sequence[int]) -> FixedClassifier:
    """Make a head of some of the classes of another, in the given order.

    Args:
        head: The head, with its codes, on the CPU.
        classes: Different class numbers, at least two.

    Raises:
        HeadSpecError: The head is of a kind whose codes depend on the number of classes.
    """
    chosen = np.asarray(classes, dtype=np.int64)
    spec = head.spec
    codes = kind_of(spec).codes(spec, head.product.stored, head.product.projection)
    stored: np.ndarray | None = None
    match codes:
        case HadamardRows():
            changed, stored = _with_indices(spec, codes.indices[chosen])
        case StoredSigns() | StoredLevels():
            changed, stored = replace(spec, num_classes=len(chosen), digest=None), codes.packed[chosen]
        case FeatureRows() if np.array_equal(chosen, np.arange(len(chosen))):
            changed = replace(spec, num_classes=len(chosen), digest=None)
        case _:
            _refuse(spec, "kept")
    index = torch.from_numpy(chosen)
    return _rebuilt(
        head,
        changed,
        stored,
        None if head.gains is None else head.gains[index],
        None if head.bias is None else head.bias[index],
    )


@torch.no_grad()
def add_classes(
    head: FixedClassifier,
    count: int,
    vectors: Tensor | None = None,
    *,
    lengths: bool = False,
    biases: Tensor | None = None,
) -> FixedClassifier:
    """Make a head with further classes behind those of another, whose codes are free.

    Hadamard codes are taken from rows that no class uses while there are any, so classes that are orthogonal stay so.
    Without vectors the first free codes are taken, and signs and levels are drawn from the seed. The directions of a
    stored projection stay as they are: the new classes get what these can say of them.

    Args:
        head: The head, with its codes, on the CPU.
        count: How many classes are added.
        vectors: What their codes should be near to, float [count, N], in the coordinates of the codes: features minus
            their mean and, if the head has a std, divided by it.
        lengths: Whether the lengths of the vectors are meant, so that row scales follow from them; else a new class
            has the median row scale.
        biases: Their biases, [count]; default: the mean bias.

    Raises:
        HeadSpecError: The head is of a kind whose codes depend on the number of classes, there are no free codes, or
            the vectors are class vectors (`lengths`) and the head has a stored projection.
    """
    spec, total = head.spec, head.out_features + count
    codes = kind_of(spec).codes(spec, head.product.stored, head.product.projection)
    vectors = None if vectors is None else vectors.detach().to("cpu", torch.float32)
    gains = None
    if head.gains is not None:
        gains = torch.full((count,), int(head.gains.median()), dtype=torch.uint8)
    stored: np.ndarray | None = None
    match codes:
        case HadamardRows():
            new = _free_codes(codes, spec.blocks or 1, count, vectors)
            changed, stored = _with_indices(spec, np.concatenate((codes.indices, new)))
        case StoredSigns() | StoredLevels():
            if vectors is None:
                packed = _drawn(codes, spec.seed, count)
            elif isinstance(codes.rotation, Projection):
                packed = _projected(codes.rotation, vectors, lengths)
            else:
                longest = float(head.scale) / (codes.count * codes.levels.mean_square) ** 0.5
                wanted = vectors if codes.rotation is None else vectors @ torch.from_numpy(codes.rotation.basis())
                packed, own = round_classes(wanted, codes.levels, longest if lengths and gains is not None else None)
                gains = gains if own is None else own
            changed = replace(spec, num_classes=total, digest=None)
            stored = _separated(np.concatenate((codes.packed, packed)), codes, range(head.out_features, total))
        case FeatureRows():
            changed = replace(spec, num_classes=total, digest=None)
        case _:
            _refuse(spec, "added")
    bias = None
    if head.bias is not None:
        new_biases = head.bias.mean().expand(count) if biases is None else biases.to(head.bias.dtype)
        bias = torch.cat((head.bias, new_biases))
    every = None if head.gains is None or gains is None else torch.cat((head.gains, gains))
    return _rebuilt(head, changed, stored, every, bias)


@torch.no_grad()
def merge_classes(head: FixedClassifier, classes: Sequence[int]) -> FixedClassifier:
    """Make a head in which some classes are one: it takes the place of the first, and the others are gone.

    Stored signs and levels become those of the mean class vector, and the bias the mean plus the logarithm of their
    number: to first order the logarithm of their summed probability. A Hadamard head keeps code and bias of the first,
    since the mean of orthogonal codes is near to none of the others.

    Args:
        head: The head, with its codes, on the CPU.
        classes: Different class numbers, at least two.

    Raises:
        HeadSpecError: See `keep_classes`; or the merged class would have the code of another.
    """
    first, *others = classes
    kept = [number for number in range(head.out_features) if number not in set(others)]
    spec = head.spec
    codes = kind_of(spec).codes(spec, head.product.stored, head.product.projection)
    if not isinstance(codes, (StoredSigns, StoredLevels)):
        return keep_classes(head, kept)
    chosen = np.asarray(classes, dtype=np.int64)
    numbers = _numbers(codes, chosen)
    sizes = torch.full((len(chosen),), float(GAIN_STEPS)) if head.gains is None else head.gains[chosen].float()
    mean = (numbers * sizes[:, None]).mean(dim=0)
    mean = torch.where(mean == 0, 1e-3 * numbers[0], mean)
    rounded, gain = _rounded(codes, mean)
    packed = codes.packed.copy()
    packed[first] = rounded[0]
    place = kept.index(first)
    made = _rebuilt(
        head,
        replace(spec, num_classes=len(kept), digest=None),
        _separated(packed[kept], codes, [place]),
        None if head.gains is None else head.gains[kept],
        None if head.bias is None else head.bias[kept],
    )
    if made.gains is not None and gain is not None:
        made.gains[place] = gain[0]
    if made.bias is not None and head.bias is not None:
        made.bias[place] = head.bias[list(classes)].mean() + float(np.log(len(classes)))
    return made


def _numbers(codes: StoredSigns | StoredLevels, classes: np.ndarray) -> Tensor:
    """Unpack the signs or levels of some classes, or the levels of projected coordinates: float32 [k, d]."""
    if isinstance(codes.rotation, Projection):
        return torch.from_numpy(levels_of_signs(codes.packed[classes], codes.rotation.planes)).float()
    return torch.from_numpy(unpacked_levels(codes.packed[classes], codes.count, codes.levels)).float()


def _rounded(codes: StoredSigns | StoredLevels, wanted: Tensor) -> tuple[np.ndarray, Tensor | None]:
    """Round a class, float32 [d], to signs or levels, packed, and a row scale."""
    if isinstance(codes.rotation, Projection):
        return round_projected(wanted[None], codes.rotation.planes, GAIN_STEPS)
    return round_classes(wanted[None], codes.levels, GAIN_STEPS)


def _projected(projection: Projection, vectors: Tensor, lengths: bool) -> np.ndarray:
    """Choose the signs of classes by their mean features less the mean of all, float32 [k, N]: uint8 [k, bytes].

    The coordinates of features are of one variance each, and so a class's mean in them is its vector there (linear
    discriminant analysis). Those of class vectors would take the moment of the features, which is not stored.

    Raises:
        HeadSpecError: The vectors are class vectors.
    """
    if lengths:
        raise HeadSpecError(
            "Where class vectors lie in the projection of this head follows from features that it does not store.",
            hint="Leave lengths out and give mean features of the new classes.",
        )
    return round_projected(vectors @ torch.from_numpy(projection.rows()).T, projection.planes)[0]


def _refuse(spec: HeadSpec, what: str) -> NoReturn:
    raise HeadSpecError(
        f"The codes of head {spec.kind} ({kind_of(spec).summary}) depend on the number of classes, so classes cannot "
        f"be {what} one by one.",
        hint="Names can be changed. For other classes, convert the original again: --head hadamard, or --head binary.",
    )


def _with_indices(spec: HeadSpec, indices: np.ndarray) -> tuple[HeadSpec, np.ndarray | None]:
    """Return the spec of a Hadamard head with these code indices, and what it stores: nothing if they are in order."""
    n, c = spec.num_features, len(indices)
    needed = min_blocks(n, c)
    fields = replace(spec, num_classes=c, digest=None, matched=False, blocks=None) if not spec.matched else None
    if fields is not None and np.array_equal(indices, default_codes(n, c)):
        return fields, None
    blocks = max(spec.blocks or 1, needed, int(indices.max()) // (2 * n) + 1)
    return replace(spec, num_classes=c, digest=None, matched=True, blocks=blocks), indices


def _rebuilt(
    head: FixedClassifier, spec: HeadSpec, stored: np.ndarray | None, gains: Tensor | None, bias: Tensor | None
) -> FixedClassifier:
    """Make a head with other codes, and with the scale and the statistics of another."""
    made = FixedClassifier(
        spec,
        codes=None if stored is None else torch.from_numpy(np.ascontiguousarray(stored)),
        gains=gains,
        projection=head.product.projection,
        channel_dim=head.channel_dim,
        dtype=head.scale.dtype,
    )
    for name in ("scale", "center", "spread", "num_batches_tracked"):
        own, other = getattr(made, name), getattr(head, name)
        if own is not None and other is not None:
            own.copy_(other)
    if made.bias is not None and bias is not None:
        made.bias.copy_(bias)
    made.starting_scale = float(head.scale)
    return made.train(head.training)


def _free_codes(codes: HadamardRows, blocks: int, count: int, vectors: Tensor | None) -> np.ndarray:
    """Choose free code indices, int64 [count]: unused rows of the only block first, then any free code."""
    c, n = codes.shape
    block = np.unique(codes.block)
    rows = np.setdiff1d(np.arange(n), codes.row)
    if len(block) == 1 and len(rows) >= count:
        if len(rows) > count and rows[0] == 0:
            rows = rows[1:]  # the all-ones row: see `fixify.heads.kinds.default_codes`
        base = int(block[0]) * 2 * n
        if vectors is None:
            return base + rows[:count]
        cosines = _cosines(codes, base + rows, vectors)
        chosen = _assigned(np.abs(cosines))
        return base + rows[chosen] + n * (cosines[np.arange(count), chosen] < 0)
    space = 2 * n * max(blocks, default_blocks(n, c + count))
    free = np.setdiff1d(np.arange(space), codes.indices)
    if vectors is None:
        return free[:count]
    return free[_assigned(_cosines(codes, free, vectors))]


def _cosines(codes: HadamardRows, candidates: np.ndarray, vectors: Tensor) -> np.ndarray:
    """Compute the cosines of vectors [k, N] with candidate codes: float32 [k, candidates]."""
    units = torch.nn.functional.normalize(vectors, dim=1).numpy()
    parts = [
        units @ HadamardRows(codes.construction, codes.seed, candidates[start : start + _AT_ONCE]).table().T
        for start in range(0, len(candidates), _AT_ONCE)
    ]
    return np.concatenate(parts, axis=1)


def _assigned(cosines: np.ndarray) -> np.ndarray:
    """Choose a different candidate for each row, with the largest sum of cosines: int64 [k]."""
    if cosines.size <= _ASSIGNED:
        from scipy.optimize import linear_sum_assignment  # takes half a second, and is needed here only

        return linear_sum_assignment(cosines, maximize=True)[1].astype(np.int64)
    chosen = np.empty(len(cosines), dtype=np.int64)
    for row, values in enumerate(cosines):
        chosen[row] = values.argmax()
        cosines[:, chosen[row]] = -2.0
    return chosen


def _drawn(codes: StoredSigns | StoredLevels, seed: int, count: int) -> np.ndarray:
    """Draw the signs or levels of further classes: packed, uint8 [count, bytes]."""
    places = range(len(codes.packed), len(codes.packed) + count)
    if isinstance(codes, StoredSigns):
        bits = [streams.sign_bits(seed, streams.Purpose.NEW_CODES, place, codes.count) for place in places]
        return np.packbits(np.stack(bits), axis=1)
    drawn = [streams.gaussian(seed, streams.Purpose.NEW_CODES, place, (codes.count,)) for place in places]
    return round_classes(torch.from_numpy(np.stack(drawn)).float(), codes.levels)[0]


def _separated(packed: np.ndarray, codes: StoredSigns | StoredLevels, classes: Sequence[int]) -> np.ndarray:
    """Change the last signs or levels of some classes until no two classes have the same: uint8 [C, bytes]."""
    others = np.setdiff1d(np.arange(len(packed)), classes)
    order = np.concatenate((others, np.asarray(classes, dtype=np.int64)))
    ordered = packed[order]
    separate_levels_(ordered, codes.count, codes.levels)
    made = np.empty_like(packed)
    made[order] = ordered
    return made
