"""Matching: choose a code for every class of a classifier that is being replaced, by its class vectors.

Not in the paper, which trains from scratch. A network that is already trained keeps more of its accuracy, the better
the new codes correlate with the class vectors it was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fixify.errors import HeadSpecError
from fixify.heads.codes import HadamardRows
from fixify.heads.hadamard import block_signs
from fixify.heads.kinds import construction_of, default_blocks
from fixify.heads.product import factor_tables, fast_product
from fixify.heads.spec import HeadSpec

_CANDIDATES = 32
_ASSIGNMENT_ENTRIES = 1 << 25
_COHERENCE = 4.8
"""Codes of two classes may have a cosine up to 4.8 / sqrt(N), 0.3 at N = 256, about the largest among as many random
codes. Without a bound, classes with similar old vectors may take codes so close to each other that they stay
confused."""
_COVARIANCE_POWER = 0.35
"""Power of the feature covariance that class vectors are multiplied with. Measured with 1000 glyph classes, N = 128 and
no training (256 blocks): power 0: 8.7 %, 0.25: 13.4, 0.35: 14.9, 0.5: 14.0, 1: 11.3; scoring every code by the cosine
between its logits and the old ones: 14.7. After two epochs (512 blocks): 26.3 without, 31.2 with 0.35."""


@dataclass(frozen=True)
class Matching:
    """The codes chosen for the classes.

    Attributes:
        codes: Code index of each class, int64 [C], all different, for a matched `HeadSpec` with these `blocks`.
        blocks: Size of the code space in blocks.
        mean_correlation: Mean over classes of the cosine between the code and the old class vector, after the mean over
            classes is removed from the vectors.
    """

    codes: np.ndarray
    blocks: int
    mean_correlation: float


def match(
    class_vectors: Tensor, *, seed: int = 0, blocks: int | None = None, feature_covariance: Tensor | None = None
) -> Matching:
    """Choose a code for every class of a classifier that is being replaced.

    C <= N: rows of one Hadamard matrix with free signs, so the codes stay exactly orthogonal: optimal linear assignment
    under each of up to 8 shared sign vectors (as many as fit into two bytes per class), of which the best is kept.
    C > N: the best of `blocks` x 2N codes, searched with the fast transform, without duplicates and with bounded
    coherence. The default of few blocks (C / N) keeps the fast product at inference. Thousands
    (`fixify.heads.kinds.wide_blocks`) correlate better, and are multiplied as one dense matrix.

    Args:
        class_vectors: Weight of the old classifier, [C, N]. If the head standardises its features, in those
            coordinates: weight * std. The mean over classes is removed here, since softmax does not see it.
        seed: Seed of the head spec.
        blocks: Blocks of the code space; None: as described.
        feature_covariance: Covariance [N, N] of the features in the same coordinates, if known (no labels needed): a
            code should agree with the class vector where features vary.

    Raises:
        HeadSpecError: `class_vectors` is not a finite matrix, there is no Hadamard matrix of order N, or there are too
            few blocks.

    >>> codes = match(torch.eye(8), blocks=1).codes
    >>> sorted((codes % 8).tolist())  # each class has a row of its own
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if class_vectors.ndim != 2 or not bool(torch.isfinite(class_vectors).all()):
        raise HeadSpecError(f"Class vectors must be a finite [C, N] matrix, got shape {list(class_vectors.shape)}.")
    vectors = class_vectors.detach().to(device="cpu", dtype=torch.float32)
    vectors = vectors - vectors.mean(dim=0)
    c, n = vectors.shape
    targets = vectors if feature_covariance is None else vectors @ _power(feature_covariance, n)
    targets = torch.nn.functional.normalize(targets, dim=1)
    spec = HeadSpec("hadamard", n, c, seed=seed, matched=True, blocks=blocks or default_blocks(n, c))
    space = _CodeSpace(spec)
    with torch.inference_mode():
        codes = _match_in_one_block(space, targets) if c <= n else _match_in_many_blocks(space, targets)
    cosines = (space.codes(codes) * torch.nn.functional.normalize(vectors, dim=1)).sum(dim=1)
    return Matching(codes, space.blocks, float(cosines.mean()))


class _CodeSpace:
    """All codes of a matched spec: K blocks of 2N signed rows."""

    def __init__(self, spec: HeadSpec) -> None:
        self.num_features, self.num_classes = spec.num_features, spec.num_classes
        self.blocks = spec.blocks or 1
        self._construction, self._seed = construction_of(spec), spec.seed

    def codes(self, indices: np.ndarray) -> Tensor:
        """Build some codes: float32 [k, N], unit rows."""
        signs = HadamardRows(self._construction, self._seed, indices).signs()
        return torch.from_numpy(signs).float() * self.num_features**-0.5

    def scores(self, vectors: Tensor, blocks: range, at_once: int) -> Iterator[tuple[range, Tensor]]:
        """Compute the cosines of all class vectors with all rows of some blocks (sign +).

        Yields:
            k blocks, at most `at_once`, and float32 [C, k, N].
        """
        left, right = (torch.from_numpy(table) for table in factor_tables(self._construction))
        for start in range(blocks.start, blocks.stop, at_once):
            part = range(start, min(start + at_once, blocks.stop))
            signs = torch.from_numpy(block_signs(self._construction, self._seed, np.array(part)))
            yield part, fast_product(vectors[:, None] * signs, left, right) * self.num_features**-0.5


def _power(covariance: Tensor, n: int) -> Tensor:
    """Raise the covariance to `_COVARIANCE_POWER`: float32 [N, N]. Eigenvalues are at least 1 % of their mean."""
    if covariance.shape != (n, n) or not bool(torch.isfinite(covariance).all()):
        raise HeadSpecError(f"The feature covariance must be finite, [{n}, {n}]; got shape {list(covariance.shape)}.")
    values, vectors = torch.linalg.eigh(covariance.detach().to(device="cpu", dtype=torch.float64))
    values = values.clamp_min(0.01 * float(values.mean()))
    return (vectors * values**_COVARIANCE_POWER @ vectors.T).float()


def _match_in_one_block(space: _CodeSpace, vectors: Tensor) -> np.ndarray:
    """Assign optimal rows and signs inside one block, the best of all blocks: code indices, int64 [C]."""
    n, c = space.num_features, space.num_classes
    best, codes = -np.inf, np.zeros(c, dtype=np.int64)
    for part, scores in space.scores(vectors, range(space.blocks), 1):
        cosines = scores[:, 0].numpy()
        strength = np.abs(cosines)
        if part.start == 0 and c < n:
            strength[:, 0] = -1.0  # the all-ones row: see `fixify.heads.kinds.default_codes`
        classes, rows = linear_sum_assignment(strength, maximize=True)
        total = strength[classes, rows].sum()
        if total > best:
            best = total
            codes = part.start * 2 * n + n * (cosines[classes, rows] < 0) + rows
    return codes


def _match_in_many_blocks(space: _CodeSpace, vectors: Tensor) -> np.ndarray:
    """Assign codes of all blocks, optimally if the table of all codes is small, else greedily: int64 [C]."""
    n, c, k = space.num_features, space.num_classes, space.blocks
    if c * 2 * n * k <= _ASSIGNMENT_ENTRIES:
        return _assign(space, vectors, k, np.empty(0, dtype=np.int64))
    codes = _greedy(space, *_candidates(space, vectors))
    left_over = np.flatnonzero(codes < 0)  # all their candidates went to others, as for classes with equal vectors
    if len(left_over):
        taken = codes[codes >= 0]
        enough = min(k, -(-(len(left_over) + len(taken)) // (2 * n)) + 1)
        codes[left_over] = _assign(space, vectors[left_over], enough, taken)
    return codes


def _assign(space: _CodeSpace, vectors: Tensor, num_blocks: int, taken: np.ndarray) -> np.ndarray:
    """Assign codes of the first blocks that are not taken, optimally: code indices, int64 [C]."""
    n = space.num_features
    parts = [torch.stack((s, -s), dim=2).flatten(1) for _, s in space.scores(vectors, range(num_blocks), 16)]
    cosines = torch.cat(parts, dim=1).numpy()
    cosines[:, taken[taken < 2 * n * num_blocks]] = -2.0
    return linear_sum_assignment(cosines, maximize=True)[1].astype(np.int64)


def _candidates(space: _CodeSpace, vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Find some of the best codes of every class.

    Only the best few of each block are considered: with many blocks, the best of all codes lie in different ones.

    Returns:
        Cosines float32 [C, T] and code indices int64 [C, T], best first.
    """
    n, c, k = space.num_features, space.num_classes, space.blocks
    per_block = min(n, -(-4 * _CANDIDATES // k))
    # Results are written into tables allocated beforehand: small results kept between large temporaries fragment the
    # heap, and 2 M cosines per step took 12 GB after 512 steps.
    cosines, codes = torch.empty(c, k, per_block), torch.empty(c, k, per_block, dtype=torch.int64)
    for part, scores in space.scores(vectors, range(k), max(1, (1 << 20) // (c * n))):
        strength, row = scores.abs().topk(per_block, dim=2) if per_block > 1 else scores.abs().max(dim=2, keepdim=True)
        negative = (scores.gather(2, row) < 0).long()
        block = torch.arange(part.start, part.stop)[:, None]
        cosines[:, part.start : part.stop] = strength
        codes[:, part.start : part.stop] = (2 * block + negative) * n + row
    best, position = cosines.flatten(1).topk(min(_CANDIDATES, k * per_block), dim=1)
    return best.numpy(), codes.flatten(1).gather(1, position).numpy()


def _greedy(space: _CodeSpace, cosines: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Assign candidates in rounds: every class without a code requests its next candidate, the strongest first.

    A request is granted unless its cosine with a granted code reaches the coherence bound. The bound is relaxed for
    classes that have run out of candidates, until only equal codes are refused.

    Returns:
        Code indices, int64 [C]; -1 for classes none of whose candidates was free.
    """
    n, c = space.num_features, space.num_classes
    codes = np.full(c, -1, dtype=np.int64)
    granted = torch.empty((c, n))
    num_granted = 0
    bound = _COHERENCE * n**-0.5
    while bound < 1.0 and (codes < 0).any():
        for rank in range(candidates.shape[1]):
            asking = np.flatnonzero(codes < 0)
            asking = asking[np.argsort(-cosines[asking, rank], kind="stable")]
            requested = candidates[asking, rank]
            signs = space.codes(requested)
            free = torch.ones(len(asking), dtype=torch.bool)
            if num_granted:
                free = (signs @ granted[:num_granted].T).amax(dim=1) < bound
            near = (signs @ signs.T >= bound).numpy()
            accepted = free.numpy().copy()
            for i in np.flatnonzero(accepted):
                if accepted[i]:
                    near[i, : i + 1] = False
                    accepted[near[i]] = False
            kept = np.flatnonzero(accepted)
            codes[asking[kept]] = requested[kept]
            granted[num_granted : num_granted + len(kept)] = signs[torch.from_numpy(kept)]
            num_granted += len(kept)
            if num_granted == c:
                break
        bound = bound + 0.1 if bound + 0.1 < 1.0 else (1.0 - 1.0 / n if bound < 1.0 - 1.0 / n else 1.0)
    return codes
