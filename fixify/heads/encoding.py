"""Encoding: the signs or levels of a `binary` head, taken from the class vectors of the classifier that it replaces.

With S the second moment of the (standardised) features and B the first d columns of a rotation, the signs or levels q
and the step size g of a class with vector w minimise

    (w - g B q)^T S (w - g B q)

by coordinate descent, started at the rounded B^T w (`fixify.heads.level_search`). Without S they are rounded. A spec
with `planes` has directions B that are found and stored (`fixify.heads.projection_search`). The
features of a trained network vary in few directions (about 30 of 256 on our glyphs), so weighting with S gains more
than twice the bits without it. Answers to samples then decide about the classes that are near the top for them
(`fixify.heads.answer_search`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixify._watch import OnProgress, unwatched
from fixify.errors import HeadSpecError
from fixify.heads.answer_search import Answers, refine_levels_
from fixify.heads.codes import first_repeated
from fixify.heads.kinds import BINARY
from fixify.heads.level_search import CenteredRows, choose_levels, row_scale_steps, separate_levels_
from fixify.heads.levels import SIGNS
from fixify.heads.projection import Projection
from fixify.heads.projection_search import choose_projected
from fixify.heads.spec import HeadSpec
from fixify.heads.statistics import is_finite


@dataclass(frozen=True)
class BinaryCodes:
    """What a binary head stores.

    Attributes:
        codes: Packed signs, uint8 [C, ceil(d / 8)]; bit 1 is a minus sign, first sign in the highest bit. Or packed
            levels, of `fixify.heads.signs.pack_levels`.
        gains: Row scales, uint8 [C], in steps of 1/255 of the longest.
        scale: The alpha at which `alpha * gains / 255 * Q x` is nearest to the old logits, for features that are not
            normalised.
        projection: What the features are projected by first, if the spec has `planes`.
    """

    codes: np.ndarray
    gains: np.ndarray
    scale: float
    projection: Projection | None = None


def encode(
    spec: HeadSpec,
    class_vectors: Tensor,
    *,
    feature_moment: Tensor | None = None,
    answers: Answers | None = None,
    on_progress: OnProgress = unwatched,
) -> BinaryCodes:
    """Choose signs or levels, and row scales, for the classes of a classifier that is being replaced.

    Args:
        spec: A head spec of kind "binary".
        class_vectors: Weight of the old classifier, [C, N]. If the head standardises its features, in those
            coordinates: weight * std. The mean over classes is removed here, since softmax does not see it.
        feature_moment: Second moment S [N, N] of the centered features in the same coordinates, if known (no labels
            needed). Few images give a moment of low rank: shrink it towards its diagonal.
        answers: What the old classifier answers to some samples, for a last search; their features are in the same
            coordinates. They need `feature_moment`.
        on_progress: Called with the number of classes that are done.

    Raises:
        HeadSpecError: Values are not finite or do not fit the spec, or all class vectors are equal.

    >>> spec = HeadSpec("binary", num_features=8, num_classes=3, bits_per_class=8, gains=True)
    >>> encode(spec, torch.eye(8)[:3]).codes.shape
    (3, 1)
    """
    n, c = spec.num_features, spec.num_classes
    if class_vectors.shape != (c, n) or not is_finite(class_vectors):
        raise HeadSpecError(f"Class vectors must be finite, [{c}, {n}]; got shape {list(class_vectors.shape)}.")
    if feature_moment is not None and (
        feature_moment.shape != (n, n) or not bool(torch.isfinite(feature_moment).all())
    ):
        raise HeadSpecError(f"The feature moment must be finite, [{n}, {n}]; got shape {list(feature_moment.shape)}.")
    vectors = class_vectors.detach().to(device="cpu", dtype=torch.float32)
    rows = CenteredRows(vectors, vectors.mean(dim=0))
    moment = None if feature_moment is None else feature_moment.detach().to("cpu", torch.float32)
    if answers is not None and moment is None:
        raise HeadSpecError("The answers to samples are heeded beside the feature moment; give both.")
    if spec.planes is not None:
        if moment is None:
            raise HeadSpecError(
                "The directions of a stored projection are those in which features vary; give their moment.",
                hint="Calibrate with images: fixify convert SOURCE --head binary --bits-per-class N --calibrate FOLDER",
            )
        made, signs = choose_projected(rows, moment, spec.planes, answers, on_progress), sum(spec.planes)
        gains, scale = _gains(made.lengths, signs)
        separate_(made.packed, signs)
        return BinaryCodes(made.packed, gains, scale, made.projection)
    rotation = BINARY.rotation(spec)
    directions = torch.eye(n) if rotation is None else torch.from_numpy(rotation.basis())
    levels, d = BINARY.levels(spec), directions.shape[1]
    codes, lengths = choose_levels(rows, directions, moment, levels, on_progress)
    gains, scale = _gains(lengths, d * levels.mean_square)
    if answers is not None and moment is not None:
        refine_levels_(codes, lengths, rows, directions, moment, levels, answers)
    if levels is SIGNS:
        separate_(codes, d)
    else:
        separate_levels_(codes, d, levels)
    return BinaryCodes(codes, gains, scale)


def _gains(lengths: Tensor, squares: float) -> tuple[np.ndarray, float]:
    """Write the lengths of signs or levels [C] as row scales, uint8 [C], and alpha; codes are divided by sqrt(squares).

    Raises:
        HeadSpecError: All lengths are 0.
    """
    longest = float(lengths.max())
    if not longest > 0:
        raise HeadSpecError(
            "The classes cannot be told apart by their old vectors: no signs to take.",
            hint="A classifier that was never trained is replaced by `--head hadamard` or `--head orthogonal`.",
        )
    return row_scale_steps(lengths).to(torch.uint8).numpy(), longest * squares**0.5


def separate_(packed: np.ndarray, num_signs: int) -> None:
    """Change signs of classes until no two classes have equal signs, which could never be told apart.

    Of each group of equals the first is kept. For the others, the last bits are counted through until the code is free.
    A code that was taken once stays taken, so each group goes on where it stopped: the effort grows with the number of
    classes, also where thousands are equal.
    """
    if first_repeated(packed) is None:
        return
    taken: set[bytes] = set()
    reached: dict[bytes, int] = {}
    for code in packed:
        first = code.tobytes()
        if first in taken:
            count, start = reached.get(first, 0), code.copy()
            while code.tobytes() in taken:
                count += 1
                flips = np.array([count >> k & 1 for k in range(min(num_signs, 62))], dtype=np.uint8)
                mask = np.zeros(packed.shape[1] * 8, dtype=np.uint8)
                mask[num_signs - len(flips) : num_signs] = flips[::-1]
                code[:] = start ^ np.packbits(mask)
            reached[first] = count
        taken.add(code.tobytes())
