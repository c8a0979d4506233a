"""The cosines between codes, and the smallest ones possible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fixify.heads import streams
from fixify.heads.kinds import codebook, kind_of
from fixify.heads.projection import Projection
from fixify.heads.spec import HeadSpec

_EXACT_CLASSES = 8192
_SAMPLED_CLASSES = 1024
_BLOCK = 1024


@dataclass(frozen=True)
class Coherence:
    """Cosines between the codes of different classes, with their bounds.

    Attributes:
        max_cosine: Largest signed cosine, over pairs of `classes_checked` classes with all others.
        rms_cosine: Root mean square of the cosines of all pairs.
        max_abs: Largest absolute cosine, over the same pairs as `max_cosine`.
        welch: Lower bound of `max_abs` for any C unit vectors in R^N.
        rankin: Lower bound of `max_cosine` for any C unit vectors in R^N.
        classes_checked: Number of classes whose cosines were computed one by one; 0 if the construction gives them.
    """

    max_cosine: float
    rms_cosine: float
    max_abs: float
    welch: float
    rankin: float
    classes_checked: int


def welch_bound(num_features: int, num_classes: int) -> float:
    """Compute the smallest possible largest |cosine| of C unit vectors in R^N (Welch, 1974); 0 for C <= N.

    >>> welch_bound(2, 3)
    0.5
    """
    n, c = num_features, num_classes
    return ((c - n) / (n * (c - 1))) ** 0.5 if c > n else 0.0


def rankin_bound(num_features: int, num_classes: int) -> float:
    """Compute the smallest possible largest signed cosine of C unit vectors in R^N (Rankin, 1955).

    It is -1/(C - 1) for C <= N + 1 (a simplex) and 0 beyond. +-rows reach 0 up to C = 2N, and nothing does after that.

    >>> rankin_bound(64, 65) == -1 / 64
    True
    """
    if num_classes < 2:
        return -1.0
    return -1.0 / (num_classes - 1) if num_classes <= num_features + 1 else 0.0


def coherence(spec: HeadSpec, codes: ArrayLike | None = None, projection: Projection | None = None) -> Coherence:
    """Measure the coherence of the codebook of a head.

    It is exact up to 8192 classes. Above, the maxima are those of 1024 seeded classes against all. With one class there
    are no pairs: the cosines are reported as 0, and max_cosine as -1.

    Args:
        spec: The head spec.
        codes: What the head stores, if anything; see `fixify.heads.codebook`.
        projection: The projection that the head stores, if any.

    Raises:
        HeadSpecError: `codes` is missing, superfluous or does not fit.

    >>> coherence(HeadSpec("hadamard", num_features=64, num_classes=10)).max_abs
    0.0
    """
    n, c = spec.num_features, spec.num_classes
    book = codebook(spec, codes, projection)
    if spec.bits_per_weight is not None or spec.planes is not None:  # these codes are of other norms than 1
        book = book / np.linalg.norm(book, axis=1, keepdims=True).clip(1e-12)
    welch, rankin = welch_bound(n, c), rankin_bound(n, c)
    if c <= _EXACT_CLASSES:
        return Coherence(*_cosines_of_all_pairs(book), welch, rankin, c)
    order = np.argsort(streams.raw(spec.seed, streams.Purpose.SAMPLE, 1, c), kind="stable")
    checked = np.sort(order[:_SAMPLED_CLASSES])
    max_cosine, max_abs = _largest_cosines(book, checked)
    return Coherence(max_cosine, _rms_cosine(book), max_abs, welch, rankin, len(checked))


def planned_coherence(spec: HeadSpec) -> Coherence:
    """Find the coherence of a head whose codes are in class order: by construction where it is the same for all pairs.

    Args:
        spec: The head spec.

    Raises:
        HeadSpecError: There is no such codebook.

    >>> planned_coherence(HeadSpec("simplex", num_features=64, num_classes=65)).max_cosine == -1 / 64
    True
    """
    n, c = spec.num_features, spec.num_classes
    cosine = kind_of(spec).common_cosine(n, c)
    if cosine is None or c < 2 or spec.matched:
        return coherence(spec)
    return Coherence(cosine, abs(cosine), abs(cosine), welch_bound(n, c), rankin_bound(n, c), 0)


def _cosines_of_all_pairs(book: np.ndarray) -> tuple[float, float, float]:
    """Compute the largest cosine, the root mean square and the largest absolute cosine of all pairs of classes."""
    max_cosine, max_abs, squares = -1.0, 0.0, 0.0
    for start in range(0, len(book), _BLOCK):
        part = book[start : start + _BLOCK].astype(np.float64)  # in float32, orthogonal codes have cosines of 1e-6
        for other in range(start, len(book), _BLOCK):
            cosines = part @ (part if other == start else book[other : other + _BLOCK].astype(np.float64)).T
            if other == start:
                cosines = cosines[np.triu_indices(len(part), k=1)]  # each pair once, and no code with itself
            if cosines.size:
                max_cosine = max(max_cosine, float(cosines.max()))
                max_abs = max(max_abs, float(cosines.max()), -float(cosines.min()))
                squares += float(np.vdot(cosines, cosines))
    pairs = len(book) * (len(book) - 1) / 2
    return max_cosine, (squares / pairs) ** 0.5 if pairs else 0.0, max_abs


def _largest_cosines(book: np.ndarray, checked: np.ndarray) -> tuple[float, float]:
    """Compute the largest signed and the largest absolute cosine of some classes with all others."""
    max_cosine, max_abs = -1.0, 0.0
    for start in range(0, len(checked), _BLOCK):
        part = checked[start : start + _BLOCK]
        codes_of_part = book[part].astype(np.float64)  # in float32, orthogonal codes have cosines of 1e-6
        for other in range(0, len(book), _BLOCK):
            cosines = codes_of_part @ book[other : other + _BLOCK].T.astype(np.float64)
            itself = np.flatnonzero((part >= other) & (part < other + _BLOCK))
            cosines[itself, part[itself] - other] = -1.0  # a code with itself does not count
            max_cosine = max(max_cosine, float(cosines.max()))
            cosines[itself, part[itself] - other] = 0.0
            max_abs = max(max_abs, float(np.abs(cosines).max()))
    return max_cosine, max_abs


def _rms_cosine(book: np.ndarray) -> float:
    """Compute the root mean square of the cosines of all pairs.

    The squared Frobenius norm of the N x N Gram matrix is the sum of the squared cosines of all pairs of codes,
    including each code with itself.
    """
    c, n = book.shape
    gram = np.zeros((n, n))
    with_themselves = 0.0
    for start in range(0, c, _BLOCK):
        chunk = book[start : start + _BLOCK].astype(np.float64)  # in float32, small cosines drown in rounding
        gram += chunk.T @ chunk
        with_themselves += float(((chunk**2).sum(axis=1) ** 2).sum())
    pairs = c * (c - 1)
    return (max(float((gram**2).sum()) - with_themselves, 0.0) / pairs) ** 0.5 if pairs else 0.0
