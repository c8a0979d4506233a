"""How far apart codes are, and how far apart they could be at best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fixify.heads import random
from fixify.heads.codebooks import codebook
from fixify.heads.spec import HeadSpec

_EXACT_CLASSES = 8192
_SAMPLED_CLASSES = 1024
_BLOCK = 1024


def welch_bound(num_features: int, num_classes: int) -> float:
    """Smallest possible largest |cosine| of C unit vectors in R^N (Welch, 1974); 0 for C <= N."""
    n, c = num_features, num_classes
    return ((c - n) / (n * (c - 1))) ** 0.5 if c > n else 0.0


def rankin_bound(num_features: int, num_classes: int) -> float:
    """Smallest possible largest signed cosine of C unit vectors in R^N (Rankin, 1955).

    -1/(C - 1) for C <= N + 1 (a simplex); 0 beyond, which +-rows reach up to C = 2N and nothing reaches after that.
    """
    if num_classes < 2:
        return -1.0
    return -1.0 / (num_classes - 1) if num_classes <= num_features + 1 else 0.0


@dataclass(frozen=True)
class Coherence:
    """Cosines between the codes of different classes, next to what is possible.

    max_cosine, rms_cosine, max_abs: largest signed, root mean square, largest absolute cosine. The root mean square is
    over all pairs; the maxima are over the pairs of `classes_checked` classes with all others.
    welch, rankin: lower bounds of max_abs and max_cosine for any C unit vectors in R^N.
    """

    max_cosine: float
    rms_cosine: float
    max_abs: float
    welch: float
    rankin: float
    classes_checked: int


def coherence(spec: HeadSpec, codes: ArrayLike | None = None) -> Coherence:
    """Coherence of the codebook of a head.

    Exact up to 8192 classes; above, the maxima are of 1024 seeded classes against all. With one class there are no
    pairs: the cosines are reported as 0 (max_cosine as -1).

    Args:
        codes: Code index of each class, for a matched head.
    """
    n, c = spec.num_features, spec.num_classes
    book = codebook(spec, codes)
    checked = np.arange(c)
    if c > _EXACT_CLASSES:
        order = np.argsort(random.raw(spec.seed, random.Purpose.SAMPLE, 1, c), kind="stable")
        checked = np.sort(order[:_SAMPLED_CLASSES])
    max_cosine, max_abs = -1.0, 0.0
    for start in range(0, len(checked), _BLOCK):
        part = checked[start : start + _BLOCK]
        codes_of_part = book[part].astype(np.float64)  # in float32, orthogonal codes have cosines of 1e-6
        for other in range(0, c, _BLOCK):
            cosines = codes_of_part @ book[other : other + _BLOCK].T.astype(np.float64)
            itself = np.flatnonzero((part >= other) & (part < other + _BLOCK))
            cosines[itself, part[itself] - other] = -1.0  # a code with itself
            max_cosine = max(max_cosine, float(cosines.max()))
            cosines[itself, part[itself] - other] = 0.0
            max_abs = max(max_abs, float(np.abs(cosines).max()))
    gram = np.zeros((n, n))  # its squared Frobenius norm is the sum of squared cosines over all pairs
    with_themselves = 0.0
    for start in range(0, c, _BLOCK):
        chunk = book[start : start + _BLOCK].astype(np.float64)  # float32 would drown small cosines in rounding
        gram += chunk.T @ chunk
        with_themselves += float(((chunk**2).sum(axis=1) ** 2).sum())
    pairs = c * (c - 1)
    rms = (max(float((gram**2).sum()) - with_themselves, 0.0) / pairs) ** 0.5 if pairs else 0.0
    return Coherence(max_cosine, rms, max_abs, welch_bound(n, c), rankin_bound(n, c), len(checked))
