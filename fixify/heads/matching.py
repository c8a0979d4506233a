"""Matching: choose a code for every class of a classifier that is being replaced, by its class vectors.

Not in the paper, which trains from scratch. A network that is already trained keeps more of its accuracy, the better
the new codes correlate with the class vectors it was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fixify._watch import OnProgress, unwatched
from fixify.errors import HeadSpecError
from fixify.heads.codes import HadamardRows, row_hashes
from fixify.heads.kinds import construction_of, default_blocks
from fixify.heads.matrices import block_bits, rows
from fixify.heads.product import factor_tables, fast_product
from fixify.heads.spec import HeadSpec
from fixify.heads.statistics import is_finite

_CANDIDATES = 32
_ASSIGNMENT_ENTRIES = 1 << 25
"""Cosines of the largest table that is assigned optimally; more take minutes, or do not end."""
_AT_ONCE = 1 << 22
"""Numbers C N of class vectors that are scored at once; more are scored a chunk of classes at a time, in the cache."""
_CHUNK = 1 << 18
_SEARCHED_COSINES = 1 << 36
"""Cosines C K N that are computed to find candidates, about two minutes; of more, each class searches its own share of
the blocks. 1,000,000 classes x 512 have 1,954 blocks, and each searches 134 of them."""
_COHERENCE_PRODUCTS = 1 << 41
"""Multiplications C^2 N up to which codes are compared with each other: 40,000 classes x 1280. Beyond, they only have
to differ; so many random codes exceed the bound in any case."""
_REQUESTS_AT_ONCE = 1024
_MEASURED_AT_ONCE = 512
_LEFT_AT_ONCE = 64
_GROUP = 32
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
    class_vectors: Tensor,
    *,
    seed: int = 0,
    blocks: int | None = None,
    feature_covariance: Tensor | None = None,
    on_progress: OnProgress = unwatched,
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
        on_progress: Called with the number of classes that are done.

    Raises:
        HeadSpecError: `class_vectors` is not a finite matrix, there is no Hadamard matrix of order N, or there are too
            few blocks.

    >>> codes = match(torch.eye(8), blocks=1).codes
    >>> sorted((codes % 8).tolist())  # each class has a row of its own
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if class_vectors.ndim != 2 or not is_finite(class_vectors):
        raise HeadSpecError(f"Class vectors must be a finite [C, N] matrix, got shape {list(class_vectors.shape)}.")
    vectors = class_vectors.detach().to(device="cpu", dtype=torch.float32)
    mean = vectors.mean(dim=0)
    c, n = vectors.shape
    targets: Tensor | _Targets
    targets = _Targets(vectors, mean, None if feature_covariance is None else _power(feature_covariance, n))
    if c <= n or c * n <= _AT_ONCE:
        targets = targets[:]
    spec = HeadSpec("hadamard", n, c, seed=seed, matched=True, blocks=blocks or default_blocks(n, c))
    space = _CodeSpace(spec)
    with torch.inference_mode():
        codes = _match_in_one_block(space, targets[:]) if c <= n else _match_in_many_blocks(space, targets, on_progress)
        on_progress("choosing codes", c, c)
        del targets
        cosines = torch.cat(
            [
                (space.codes(codes[start : start + len(part)]) * torch.nn.functional.normalize(part - mean)).sum(dim=1)
                for start, part in zip(range(0, c, _MEASURED_AT_ONCE), vectors.split(_MEASURED_AT_ONCE), strict=True)
            ]
        )
    return Matching(codes, space.blocks, float(cosines.mean()))


class _Targets:
    """What codes should be near to: class vectors without their mean, times a matrix, of norm 1; made when asked for.

    Large classifiers are not held a second time.
    """

    def __init__(self, vectors: Tensor, mean: Tensor, power: Tensor | None) -> None:
        self._vectors, self._mean, self._power = vectors, mean, power

    def __getitem__(self, classes: slice | np.ndarray) -> Tensor:
        """Return those of some classes, [k, N]."""
        part = self._vectors[classes] - self._mean
        if self._power is not None:
            part = part @ self._power
        return torch.nn.functional.normalize(part, dim=1, out=part)


class _CodeSpace:
    """All codes of a matched spec: K blocks of 2N signed rows."""

    def __init__(self, spec: HeadSpec) -> None:
        self.num_features, self.num_classes = spec.num_features, spec.num_classes
        self.blocks = spec.blocks or 1
        self._construction, self._seed = construction_of(spec), spec.seed

    def rows(self, indices: np.ndarray) -> HadamardRows:
        """Return some codes."""
        return HadamardRows(self._construction, self._seed, indices)

    def signs(self, indices: np.ndarray) -> np.ndarray:
        """Build some codes without the factor 1/sqrt(N): int8 [k, N] of +-1."""
        return self.rows(indices).signs()

    def codes(self, indices: np.ndarray) -> Tensor:
        """Build some codes: float32 [k, N], unit rows."""
        return torch.from_numpy(self.signs(indices)).float() * self.num_features**-0.5

    def scores(
        self, vectors: Tensor, blocks: np.ndarray, at_once: int, *, whole: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Compute the cosines of all class vectors with all rows of some blocks (sign +).

        Args:
            vectors: Unit class vectors, [C, N].
            blocks: The blocks, int64.
            at_once: Blocks that are multiplied at once.
            whole: Multiply with the whole matrix where that is faster, which rounds differently.

        Yields:
            Positions in `blocks`, at most `at_once`, and float32 [C, k, N].
        """
        left: Tensor | None
        left, right = self._factors
        if whole and self.num_features <= 2 * (len(left) + len(right)):
            left, right = None, self._matrix
        vectors = vectors[:, None] * self.num_features**-0.5 if whole else vectors[:, None]
        for start in range(0, len(blocks), at_once):
            part = slice(start, min(start + at_once, len(blocks)))
            scores = fast_product(vectors * self._block_signs[blocks[part]].float(), left, right)
            yield part, scores if whole else scores * self.num_features**-0.5

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        left, right = factor_tables(self._construction)
        return torch.from_numpy(left), torch.from_numpy(right)

    @cached_property
    def _matrix(self) -> Tensor:
        return torch.from_numpy(rows(self._construction, np.arange(self.num_features))).float()

    @cached_property
    def _block_signs(self) -> Tensor:
        """Signs of all blocks, int8 [K, N]."""
        return torch.from_numpy(
            1 - 2 * block_bits(self._construction, self._seed, np.arange(self.blocks)).view(np.int8)
        )


def _power(covariance: Tensor, n: int) -> Tensor:
    """Raise the covariance to `_COVARIANCE_POWER`: float32 [N, N]. Eigenvalues are at least 1 % of their mean."""
    if covariance.shape != (n, n) or not bool(torch.isfinite(covariance).all()):
        raise HeadSpecError(f"The feature covariance must be finite, [{n}, {n}]; got shape {list(covariance.shape)}.")
    values, vectors = torch.linalg.eigh(covariance.detach().to(device="cpu", dtype=torch.float64))
    values = values.clamp_min(0.01 * float(values.mean()))
    return (vectors * values**_COVARIANCE_POWER @ vectors.T).float()


def _match_in_one_block(space: _CodeSpace, vectors: Tensor) -> np.ndarray:
    """Assign optimal rows and signs inside one block, the best of all blocks: code indices, int64 [C]."""
    from scipy.optimize import linear_sum_assignment  # takes half a second, and is needed here only

    n, c = space.num_features, space.num_classes
    best, codes = -np.inf, np.zeros(c, dtype=np.int64)
    for part, scores in space.scores(vectors, np.arange(space.blocks), 1):
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


def _match_in_many_blocks(space: _CodeSpace, vectors: Tensor | _Targets, on_progress: OnProgress) -> np.ndarray:
    """Assign codes of all blocks, optimally if the table of all codes is small, else greedily: int64 [C]."""
    n, c, k = space.num_features, space.num_classes, space.blocks
    if c * 2 * n * k <= _ASSIGNMENT_ENTRIES:
        return _assign(space, vectors[:], k, np.empty(0, dtype=np.int64))
    cosines, candidates = _candidates(space, vectors, on_progress)
    codes = _greedy(space, cosines, candidates, on_progress)
    left_over = np.flatnonzero(codes < 0)  # all their candidates went to others, as for classes with similar vectors
    if len(left_over):
        taken = codes[codes >= 0]
        enough = min(k, -(-(len(left_over) + len(taken)) // (2 * n)) + 1)
        if len(left_over) * 2 * n * enough <= _ASSIGNMENT_ENTRIES:
            codes[left_over] = _assign(space, vectors[left_over], enough, taken)
            return codes
    _give_free_codes_(codes, space, vectors, cosines[:, 0], on_progress)
    return codes


def _assign(space: _CodeSpace, vectors: Tensor, num_blocks: int, taken: np.ndarray) -> np.ndarray:
    """Assign codes of the first blocks that are not taken, optimally: code indices, int64 [C]."""
    from scipy.optimize import linear_sum_assignment

    n = space.num_features
    blocks = np.arange(num_blocks)
    parts = [torch.stack((s, -s), dim=2).flatten(1) for _, s in space.scores(vectors, blocks, 16)]
    cosines = torch.cat(parts, dim=1).numpy()
    cosines[:, taken[taken < 2 * n * num_blocks]] = -2.0
    return linear_sum_assignment(cosines, maximize=True)[1].astype(np.int64)


def _searched(space: _CodeSpace, chunk: int) -> np.ndarray:
    """Return the blocks that a chunk of classes searches, int64 [k]: all, or its share of them in turn."""
    share = max(1, _SEARCHED_COSINES // (space.num_classes * space.num_features))
    if share >= space.blocks:
        return np.arange(space.blocks)
    return (chunk * share + np.arange(share)) % space.blocks


def _candidates(
    space: _CodeSpace, vectors: Tensor | _Targets, on_progress: OnProgress
) -> tuple[np.ndarray, np.ndarray]:
    """Find some of the best codes of every class.

    Only the best few of each block are considered: with many blocks, the best of all codes lie in different ones.

    Returns:
        Cosines float32 [C, T] and code indices int64 [C, T], best first.
    """
    n, c = space.num_features, space.num_classes
    k = len(_searched(space, 0))
    per_block = min(n, -(-4 * _CANDIDATES // k))
    kept = min(_CANDIDATES, k * per_block)
    best, best_codes = torch.empty(c, kept), torch.empty(c, kept, dtype=torch.int64)
    large = c * n > _AT_ONCE
    step, size = (max(1, _CHUNK // n), _CHUNK) if large else (c, 1 << 20)
    # Results are written into tables allocated beforehand: small results kept between large temporaries fragment the
    # heap, and 2 M cosines per step took 12 GB after 512 steps.
    cosines, codes = torch.empty(step, k, per_block), torch.empty(step, k, per_block, dtype=torch.int64)
    for chunk, start in enumerate(range(0, c, step)):
        of_chunk = vectors[start : start + step]
        blocks, m = _searched(space, chunk), len(of_chunk)
        for part, scores in space.scores(of_chunk, blocks, max(1, size // (step * n)), whole=large):
            strength, row = (
                scores.abs().topk(per_block, dim=2) if per_block > 1 else scores.abs().max(dim=2, keepdim=True)
            )
            negative = (scores.gather(2, row) < 0).long()
            cosines[:m, part] = strength
            codes[:m, part] = (2 * torch.from_numpy(blocks[part])[:, None] + negative) * n + row
        values, position = cosines[:m].flatten(1).topk(kept, dim=1)
        best[start : start + m] = values
        best_codes[start : start + m] = codes[:m].flatten(1).gather(1, position)
        on_progress("searching codes", start + m, c)
    return best.numpy(), best_codes.numpy()


def _greedy(space: _CodeSpace, cosines: np.ndarray, candidates: np.ndarray, on_progress: OnProgress) -> np.ndarray:
    """Assign candidates in rounds: every class without a code requests its next candidate, the strongest first.

    A request is granted unless its cosine with a granted code reaches the coherence bound. The bound is relaxed for
    classes that have run out of candidates, until only equal codes are refused.

    Returns:
        Code indices, int64 [C]; -1 for classes none of whose candidates was free.
    """
    n, c = space.num_features, space.num_classes
    codes = np.full(c, -1, dtype=np.int64)
    taken = np.zeros(2 * n * space.blocks, dtype=bool)
    if c * c * n > _COHERENCE_PRODUCTS:
        _grant_(codes, taken, cosines, candidates)
        return codes
    granted = _GrantedCodes(space)
    nearest = np.full(candidates.shape, -1.0, dtype=np.float32)  # a granted code has this cosine with it, or a larger
    bound = _COHERENCE * n**-0.5
    while bound < 1.0 and (codes < 0).any():
        for rank in range(candidates.shape[1]):
            asking = np.flatnonzero(codes < 0)
            asking = asking[~taken[candidates[asking, rank]] & (nearest[asking, rank] < bound)]
            asking = _first_requests(asking, cosines[:, rank], candidates[:, rank])
            for start in range(0, len(asking), _REQUESTS_AT_ONCE):
                part = asking[start : start + _REQUESTS_AT_ONCE]
                accepted, nearest[part, rank] = granted.request(candidates[part, rank], bound)
                codes[part[accepted]] = candidates[part[accepted], rank]
            taken[codes[asking][codes[asking] >= 0]] = True
            on_progress("choosing codes", len(granted), c)
            if len(granted) == c:
                break
        bound = bound + 0.1 if bound + 0.1 < 1.0 else (1.0 - 1.0 / n if bound < 1.0 - 1.0 / n else 1.0)
    return codes


def _first_requests(asking: np.ndarray, strength: np.ndarray, requested: np.ndarray) -> np.ndarray:
    """Sort classes by strength and keep, of those that request the same code, the strongest: class numbers."""
    asking = asking[np.argsort(-strength[asking], kind="stable")]
    return asking[np.sort(np.unique(requested[asking], return_index=True)[1])]


class _GrantedCodes:
    """The codes granted so far, which new ones may not come too near to."""

    def __init__(self, space: _CodeSpace) -> None:
        self._space = space
        self._signs = torch.empty((space.num_classes, space.num_features), dtype=torch.int8)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def request(self, codes: np.ndarray, bound: float) -> tuple[np.ndarray, np.ndarray]:
        """Grant the codes that are not too near to those granted before, in their order.

        Args:
            codes: Code indices, all different, int64 [k].
            bound: The cosine that is too near.

        Returns:
            Which were granted, bool [k], and for each one its largest cosine with those granted before this request, or
            one that reaches the bound: float32 [k].
        """
        n = self._space.num_features
        stored = torch.from_numpy(self._space.signs(codes))
        signs = stored.float()
        limit = bound * n - 1e-3  # products of signs are integers
        largest, open_ = torch.full((len(codes),), -float(n)), torch.arange(len(codes))
        for start in range(0, self._count, _REQUESTS_AT_ONCE):
            others = self._signs[start : min(start + _REQUESTS_AT_ONCE, self._count)].float()
            largest[open_] = torch.maximum(largest[open_], (signs[open_] @ others.T).amax(dim=1))
            open_ = open_[largest[open_] < limit]
            if not len(open_):
                break
        accepted = (largest < limit).numpy()
        near = (signs @ signs.T >= limit).numpy()
        for i in np.flatnonzero(accepted & (near.sum(axis=1) > 1)):
            if accepted[i]:
                near[i, : i + 1] = False
                accepted[near[i]] = False
        kept = stored[torch.from_numpy(accepted)]
        self._signs[self._count : self._count + len(kept)] = kept
        self._count += len(kept)
        return accepted, (largest / n).numpy()


def _grant_(codes: np.ndarray, taken: np.ndarray, cosines: np.ndarray, candidates: np.ndarray) -> None:
    """Grant candidates in rounds as `_greedy` does, where only equal codes are refused.

    Args:
        codes: Code index of each class, -1 without one, int64 [C]; filled in.
        taken: Whether each code is taken, bool; filled in.
        cosines: [C, T].
        candidates: Code indices, int64 [C, T].
    """
    for rank in range(candidates.shape[1]):
        asking = np.flatnonzero(codes < 0)
        asking = asking[~taken[candidates[asking, rank]]]
        asking = _first_requests(asking, cosines[:, rank], candidates[:, rank])
        codes[asking] = candidates[asking, rank]
        taken[codes[asking]] = True


def _give_free_codes_(
    codes: np.ndarray, space: _CodeSpace, vectors: Tensor | _Targets, strength: np.ndarray, on_progress: OnProgress
) -> None:
    """Give classes that are left over their best free codes, a few classes at a time.

    As many candidates as there are classes in a chunk are found among the free codes, so each class gets one, whatever
    the others take. Two code indices may stand for the same signs where N is small; then one class gets another code.

    Args:
        codes: Code index of each class, -1 without one, int64 [C]; filled in.
        space: The code space.
        vectors: Unit class vectors, [C, N].
        strength: The larger, the earlier a class chooses, [C].
        on_progress: Called with the number of classes that have a code.

    Raises:
        HeadSpecError: There are not enough different codes.
    """
    n, total = space.num_features, len(codes)
    taken = np.zeros(2 * n * space.blocks, dtype=bool)
    taken[codes[codes >= 0]] = True
    search_all = False
    while True:
        codes[_repeated(space, codes)] = -1
        classes = np.flatnonzero(codes < 0)
        if not len(classes):
            return
        if taken.all():
            raise HeadSpecError(
                f"{space.blocks} blocks of {2 * n} codes have too few different ones for {total} classes.",
                hint="Match with more blocks, or use another seed.",
            )
        classes = classes[np.argsort(-strength[classes], kind="stable")]
        for chunk, start in enumerate(range(0, len(classes), _LEFT_AT_ONCE)):
            part = classes[start : start + _LEFT_AT_ONCE]
            blocks = np.arange(space.blocks) if search_all else _searched(space, chunk)
            found, chosen = _free_candidates(space, vectors[part], blocks, taken), codes[part]
            _grant_(chosen, taken, *found)
            codes[part] = chosen
            on_progress("choosing codes", total - len(classes) + start + len(part), total)
        search_all = True  # the blocks of some may be full


def _repeated(space: _CodeSpace, codes: np.ndarray) -> np.ndarray:
    """Return the classes whose signs another class has before them; codes below 0 do not count: int64 [k]."""
    classes = np.flatnonzero(codes >= 0)
    if not len(classes):
        return classes
    hashes = np.concatenate([row_hashes(packed) for packed in space.rows(codes[classes]).packed()])
    first = np.unique(hashes, return_index=True)[1]
    return np.delete(classes, first)


def _free_candidates(
    space: _CodeSpace, vectors: Tensor, blocks: np.ndarray, taken: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find as many free codes for each vector as there are vectors, at most one in each group of neighbouring rows.

    Args:
        space: The code space.
        vectors: Unit class vectors, [k, N].
        blocks: The blocks to search, int64.
        taken: Whether each code is taken, bool.

    Returns:
        Cosines float32 [k, T] and code indices int64 [k, T], best first. Where a group has no free code, a taken one.
    """
    n, m = space.num_features, len(vectors)
    group = max(g for g in range(1, _GROUP + 1) if n % g == 0)
    cosines = torch.empty(m, len(blocks), n // group)
    codes = torch.empty(m, len(blocks), n // group, dtype=torch.int64)
    # |s + shift| - penalty is the cosine of the better free sign; -2 or less where both are taken
    plus, minus = torch.from_numpy(taken).reshape(space.blocks, 2, n)[torch.from_numpy(blocks)].float().unbind(1)
    shift, penalty = 2.0 * (minus - plus), 2.0 * (minus + plus)
    first_rows = torch.arange(0, n, group)
    for part, scores in space.scores(vectors, blocks, max(1, _CHUNK // (m * n)), whole=True):
        scores += shift[part]
        strength = scores.abs().sub_(penalty[part])
        cosines[:, part], place = strength.unflatten(2, (-1, group)).max(dim=3)
        row = first_rows + place
        negative = (scores.gather(2, row) < 0).long()
        codes[:, part] = (2 * torch.from_numpy(blocks[part])[:, None] + negative) * n + row
    best, position = cosines.flatten(1).topk(min(m, cosines[0].numel()), dim=1)
    return best.numpy(), codes.flatten(1).gather(1, position).numpy()
