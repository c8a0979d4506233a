"""Encoding: the signs or levels of a `binary` head, taken from the class vectors of the classifier that it replaces.

With S the second moment of the (standardised) features and B the first d columns of a rotation, the signs s and the
length g of a class with vector w minimise

    (w - g B s)^T S (w - g B s)

by coordinate descent over the signs, started at those of B^T w. Without features S is the identity, and the start is
the solution. The features of a trained network vary in few directions (about 30 of 256 on our glyphs), so weighting
with S gains more than twice the bits without it. Levels are chosen in the same way (`fixify.heads.level_search`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixify._watch import OnProgress, unwatched
from fixify.errors import HeadSpecError
from fixify.heads.codes import first_repeated
from fixify.heads.kinds import BINARY
from fixify.heads.level_search import best_length, choose_levels, row_scale_steps
from fixify.heads.levels import SIGNS
from fixify.heads.spec import HeadSpec
from fixify.heads.statistics import is_finite

_SIGN_SWEEPS = 8
_AT_ONCE = 1 << 33
"""Multiplications of one sweep, C d^2, up to which all classes descend at once, coordinate by coordinate: 1,000 classes
x 2,048 signs. Beyond, the table of all classes no longer fits a cache, and a sweep over 20,000 x 1,280 took 40 s."""
_CLASSES_AT_ONCE = 1 << 15
_CLASSES_PER_BLOCK = 2048
_SIGNS_PER_BLOCK = 64


@dataclass(frozen=True)
class BinaryCodes:
    """What a binary head stores.

    Attributes:
        codes: Packed signs, uint8 [C, ceil(d / 8)]; bit 1 is a minus sign, first sign in the highest bit. Or packed
            levels, of `fixify.heads.signs.pack_levels`.
        gains: Row scales, uint8 [C], in steps of 1/255 of the longest.
        scale: The alpha at which `alpha * gains / 255 * Q x` is nearest to the old logits, for features that are not
            normalised.
    """

    codes: np.ndarray
    gains: np.ndarray
    scale: float


def encode(
    spec: HeadSpec,
    class_vectors: Tensor,
    *,
    feature_moment: Tensor | None = None,
    on_progress: OnProgress = unwatched,
) -> BinaryCodes:
    """Choose signs or levels, and row scales, for the classes of a classifier that is being replaced.

    Up to C d^2 = 2^33 (1,000 classes of 2,048 signs) all classes descend at once. Beyond, classes descend in blocks and
    coordinates in groups, with the same steps in the same order; only the rounding differs.

    Args:
        spec: A head spec of kind "binary".
        class_vectors: Weight of the old classifier, [C, N]. If the head standardises its features, in those
            coordinates: weight * std. The mean over classes is removed here, since softmax does not see it.
        feature_moment: Second moment S [N, N] of the centered features in the same coordinates, if known (no labels
            needed). Few images give a moment of low rank: shrink it towards its diagonal.
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
    mean = vectors.mean(dim=0)
    rotation = BINARY.rotation(spec)
    directions = torch.eye(n) if rotation is None else torch.from_numpy(rotation.basis())
    moment = torch.eye(n) if feature_moment is None else feature_moment.detach().to("cpu", torch.float32)
    within = directions.T @ moment @ directions
    d = within.shape[0]
    levels = BINARY.levels(spec)
    if levels is not SIGNS:
        within_features = None if feature_moment is None else within
        codes, lengths = choose_levels(vectors - mean, directions, within_features, levels, on_progress)
        return BinaryCodes(codes, *_gains(lengths, d * levels.mean_square))
    in_blocks = c * d * d > _AT_ONCE
    step = _CLASSES_PER_BLOCK if in_blocks else _CLASSES_AT_ONCE
    towards = moment @ directions
    fields = None if in_blocks else (vectors - mean) @ towards
    packed, lengths = np.empty((c, -(-d // 8)), dtype=np.uint8), torch.empty(c)
    for start in range(0, c, step):
        part = slice(start, start + step)
        centered = vectors[part] - mean
        signs = torch.where(centered @ directions < 0, -1.0, 1.0)
        if fields is not None:
            signs, lengths[part] = _descend(signs, fields[part], within)
        elif feature_moment is not None:
            signs, lengths[part] = _descend_in_blocks(signs, centered @ towards, within)
        else:
            lengths[part] = (centered @ directions).abs().mean(dim=1)
        packed[part] = np.packbits(signs.numpy() < 0, axis=1)
        on_progress("choosing signs", min(start + step, c), c)
    separate_(packed, d)
    return BinaryCodes(packed, *_gains(lengths, d))


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


def _descend(signs: Tensor, fields: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise `g^2 s^T G s - 2 g h^T s` over signs s and length g of each class, by coordinate descent.

    Args:
        signs: Start, float32 [k, d] of +-1; changed in place.
        fields: h, [k, d].
        within: G, [d, d].

    Returns:
        Signs [k, d] and lengths [k].
    """
    products = signs @ within
    for _ in range(_SIGN_SWEEPS):
        lengths = _best_length(signs, fields, products)
        changed = False
        for i in range(signs.shape[1]):
            pull = fields[:, i] - lengths * (products[:, i] - within[i, i] * signs[:, i])
            change = torch.where(pull < 0, -1.0, 1.0) - signs[:, i]
            if bool(change.any()):
                changed = True
                products += change[:, None] * within[i]
                signs[:, i] += change
        if not changed:
            break
    return signs, _best_length(signs, fields, signs @ within)


def _descend_in_blocks(signs: Tensor, fields: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise as `_descend` does, in groups of coordinates: one large product per group, small ones inside it.

    A sweep that changes no sign of a class leaves its length as it is, and the next one would change none either; such
    classes take no part in further sweeps.

    Args:
        signs: Start, float32 [k, d] of +-1.
        fields: h, [k, d].
        within: G, [d, d].

    Returns:
        Signs [k, d] and lengths [k].
    """
    signs, fields = signs.T.contiguous(), fields.T.contiguous()  # a coordinate of all classes is contiguous
    along, square = (fields * signs).sum(dim=0), ((within @ signs) * signs).sum(dim=0)  # h^T s and s^T G s
    active = torch.arange(signs.shape[1])
    for _ in range(_SIGN_SWEEPS):
        s, h = signs[:, active], fields[:, active]
        lengths = best_length(along[active], square[active])
        changed = torch.zeros(len(active), dtype=torch.bool)
        for start in range(0, len(s), _SIGNS_PER_BLOCK):
            group = slice(start, min(start + _SIGNS_PER_BLOCK, len(s)))
            inner = within[group, group]
            products, changes = within[group] @ s, torch.zeros_like(s[group])
            for i, own_weight in enumerate(inner.diagonal().tolist()):
                others = products[i] - own_weight * s[start + i]
                if i:
                    others.addmv_(changes[:i].T, inner[i, :i])
                pull = h[start + i] - lengths * others
                torch.sub(torch.where(pull < 0, -1.0, 1.0), s[start + i], out=changes[i])
            along[active] += (h[group] * changes).sum(dim=0)
            square[active] += (changes * (2.0 * products + inner @ changes)).sum(dim=0)
            s[group] += changes
            changed |= changes.any(dim=0)
        signs[:, active] = s
        active = active[changed]
        if not len(active):
            break
    return signs.T.contiguous(), best_length((fields * signs).sum(dim=0), ((within @ signs) * signs).sum(dim=0))


def _best_length(signs: Tensor, fields: Tensor, products: Tensor) -> Tensor:
    return best_length((fields * signs).sum(dim=1), (products * signs).sum(dim=1))


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
