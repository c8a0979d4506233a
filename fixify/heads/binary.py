"""The `binary` head: the codes are signs of the classifier that is replaced, one bit a weight or fewer.

Not in the paper, whose codes do not know what they replace. Signs are chosen so that the new logits are nearest to the
old ones on the features that the network really has: with S the second moment of the (standardised) features and B the
first d columns of a rotation, the signs s and the length g of a class with vector w minimise

    (w - g B s)^T S (w - g B s)

by coordinate descent over the signs, started at those of B^T w. Without features S is the identity, and the start is
the answer. The features of a trained network vary in few directions (about 30 of 256 on our glyphs), so weighting with
S buys more than twice the bits do without it.

The rotation is a sign-flipped Hadamard matrix, which costs one fast transform. It spreads every class vector evenly
over the directions, and lets the error of one sign be made good by others even where the features are uncorrelated.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fixify.errors import HeadSpecError
from fixify.heads.blocks import block_bits, construction_of
from fixify.heads.matrices import rows

if TYPE_CHECKING:
    from fixify.heads.spec import HeadSpec

GAIN_STEPS = 255
"""The length of a class's code is stored in so many steps of the longest."""
_ROTATION_BLOCK = 1
_SWEEPS = 8
_CLASSES_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class BinaryCodes:
    """What a binary head stores.

    codes: packed signs, uint8 [C, ceil(d / 8)]; bit 1 is a minus sign, first sign in the highest bit.
    gains: lengths of the codes, uint8 [C], in steps of 1/255 of the longest.
    scale: alpha at which `alpha * gains / 255 * Q x` is nearest to the old logits, for features that are not
        normalised.
    """

    codes: np.ndarray
    gains: np.ndarray
    scale: float


def rotation(spec: HeadSpec) -> np.ndarray | None:
    """B: the d directions in which features are measured, as columns. None: the features themselves.

    Returns:
        float32 [N, d], orthonormal columns.
    """
    n, bits = spec.num_features, spec.bits_per_class
    if not spec.needs_matrix:
        return None
    return (rows(construction_of(spec), np.arange(bits or n)) * rotation_signs(spec)).T * np.float32(n**-0.5)


def rotation_signs(spec: HeadSpec) -> np.ndarray:
    """What features are multiplied with before the Hadamard matrix: +-1, float32 [N]."""
    return 1.0 - 2.0 * block_bits(spec, np.array([_ROTATION_BLOCK]))[0].astype(np.float32)


def encode(spec: HeadSpec, class_vectors: Tensor, *, feature_moment: Tensor | None = None) -> BinaryCodes:
    """Choose signs and lengths for the classes of a classifier that is being replaced.

    Args:
        spec: A head spec of kind "binary".
        class_vectors: Weight of the old classifier, [C, N]. If the head standardises its features, in those
            coordinates: weight * spread. The mean over classes is removed here, since softmax does not see it.
        feature_moment: Second moment S [N, N] of the features, centered, in the same coordinates, if some are at hand
            (no labels needed). Few images give a moment of low rank: shrink it towards its diagonal.

    Raises:
        HeadSpecError: Values that are not finite or do not fit the spec, or classes whose vectors are all equal.
    """
    n, c = spec.num_features, spec.num_classes
    if class_vectors.shape != (c, n) or not bool(torch.isfinite(class_vectors).all()):
        raise HeadSpecError(f"Class vectors must be finite, [{c}, {n}]; got shape {list(class_vectors.shape)}.")
    if feature_moment is not None and (
        feature_moment.shape != (n, n) or not bool(torch.isfinite(feature_moment).all())
    ):
        raise HeadSpecError(f"The feature moment must be finite, [{n}, {n}]; got shape {list(feature_moment.shape)}.")
    vectors = class_vectors.detach().to(device="cpu", dtype=torch.float32)
    vectors = vectors - vectors.mean(dim=0)
    basis = rotation(spec)
    directions = torch.eye(n) if basis is None else torch.from_numpy(basis)
    moment = torch.eye(n) if feature_moment is None else feature_moment.detach().to("cpu", torch.float32)
    within = directions.T @ moment @ directions
    fields = vectors @ (moment @ directions)
    signs, gains = torch.empty(c, within.shape[0], dtype=torch.int8), torch.empty(c)
    for start in range(0, c, _CLASSES_AT_ONCE):
        part = slice(start, start + _CLASSES_AT_ONCE)
        first = torch.where(vectors[part] @ directions < 0, -1.0, 1.0)
        chosen, gains[part] = _descend(first, fields[part], within)
        signs[part] = chosen.to(torch.int8)
    packed = np.packbits(signs.numpy() < 0, axis=1)
    _separate(packed, spec)
    longest = float(gains.max())
    if not longest > 0:
        raise HeadSpecError(
            "The classes cannot be told apart by their old vectors: no signs to take.",
            hint="A classifier that was never trained is replaced by `--head hadamard` or `--head orthogonal`.",
        )
    steps = (gains / longest * GAIN_STEPS).round().clamp(1, GAIN_STEPS).to(torch.uint8)
    return BinaryCodes(packed, steps.numpy(), longest * within.shape[0] ** 0.5)


def _descend(signs: Tensor, fields: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Signs [k, d] and lengths [k] that minimise `g^2 s^T G s - 2 g h^T s`, with h the `fields` and G `within`."""
    products = signs @ within
    for _ in range(_SWEEPS):
        gains = _best_gain(signs, fields, products)
        changed = False
        for i in range(signs.shape[1]):
            pull = fields[:, i] - gains * (products[:, i] - within[i, i] * signs[:, i])
            change = torch.where(pull < 0, -1.0, 1.0) - signs[:, i]
            if bool(change.any()):
                changed = True
                products += change[:, None] * within[i]
                signs[:, i] += change
        if not changed:
            break
    return signs, _best_gain(signs, fields, signs @ within)


def _best_gain(signs: Tensor, fields: Tensor, products: Tensor) -> Tensor:
    return ((fields * signs).sum(dim=1) / (products * signs).sum(dim=1).clamp_min(1e-12)).clamp_min(0.0)


def _separate(packed: np.ndarray, spec: HeadSpec) -> None:
    """Classes with equal signs could never be told apart: of each such group all but the first get other signs.

    The last bits are counted through until the code is free; classes are few, so a free one is near.
    """
    bits = spec.bits_per_class or spec.num_features
    taken: set[bytes] = set()
    for code in packed:
        count = 0
        start = code.copy()
        while code.tobytes() in taken:
            count += 1
            flips = np.array([count >> k & 1 for k in range(min(bits, 62))], dtype=np.uint8)
            mask = np.zeros(packed.shape[1] * 8, dtype=np.uint8)
            mask[bits - len(flips) : bits] = flips[::-1]
            code[:] = start ^ np.packbits(mask)
        taken.add(code.tobytes())


def checked_signs(spec: HeadSpec, codes: ArrayLike | None) -> np.ndarray:
    """The packed signs of a binary head, uint8 [C, ceil(d / 8)], with unused bits 0.

    Raises:
        HeadSpecError: They are missing or do not fit the spec.
    """
    if codes is None:
        raise HeadSpecError("A binary head needs its stored signs; none were given.")
    codes = np.ascontiguousarray(codes)
    bits = spec.bits_per_class or spec.num_features
    shape = (spec.num_classes, -(-bits // 8))
    if codes.shape != shape or codes.dtype != np.uint8:
        raise HeadSpecError(f"Expected packed signs uint8 {list(shape)}, got {codes.dtype} {list(codes.shape)}.")
    if bits % 8 and bool((codes[:, -1] & (0xFF >> bits % 8)).any()):
        raise HeadSpecError("The unused bits of packed signs must be 0.")
    return codes


def fingerprint(spec: HeadSpec, codes: ArrayLike | None) -> str:
    """ "sha256:" and the SHA-256 of "fixify-signs:1:<C>x<d>\\n" followed by the packed signs.

    Raises:
        HeadSpecError: Two classes have the same signs, or they do not fit.
    """
    packed = checked_signs(spec, codes)
    _, first, inverse = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse.reshape(-1)] != np.arange(len(packed)))
    if len(again):
        raise HeadSpecError(
            f"Classes {first[inverse.reshape(-1)][again[0]]} and {again[0]} have the same signs and could never be "
            "told apart."
        )
    line = f"fixify-signs:1:{spec.num_classes}x{spec.bits_per_class}\n".encode()
    return f"sha256:{hashlib.sha256(line + packed.tobytes()).hexdigest()}"


def sign_rows(spec: HeadSpec, codes: ArrayLike | None) -> np.ndarray:
    """The signs, int8 [C, d] of +-1."""
    bits = np.unpackbits(checked_signs(spec, codes), axis=1, count=spec.bits_per_class)
    return np.int8(1) - np.int8(2) * bits.astype(np.int8)


def codebook(spec: HeadSpec, codes: ArrayLike | None) -> np.ndarray:
    """The codes in the coordinates of the features: float32 [C, N], unit rows."""
    signs = sign_rows(spec, codes).astype(np.float32) * np.float32((spec.bits_per_class or 1) ** -0.5)
    basis = rotation(spec)
    return signs if basis is None else signs @ basis.T
