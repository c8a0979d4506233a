"""Fitting a fixed head to the learned classifier it replaces: its codes, its scale and its bias.

Not in the paper, which trains from scratch with codes in class order. A few hundred images without labels help.

With mean mu and std sigma of the features, the learned classifier is

    W x + b = (W sigma) ((x - mu) / sigma) + (b + W mu)

so a code has to represent the class vector in standardised coordinates, and the bias takes the mean's share, W mu. A
code that represents its class vector only in part (a Hadamard code at cosine 0.1 to 0.3) needs only a part of that
bias: the rest would hold down classes that the code cannot lift. That part is fitted, with the scale.

The codes of a `binary` head are signs. They are chosen so that the new logits are nearest to the old ones on the
features of the network: with S the second moment of the (standardised) features and B the first d columns of a
rotation, the signs s and the length g of a class with vector w minimise

    (w - g B s)^T S (w - g B s)

by coordinate descent over the signs, started at those of B^T w. Without features S is the identity, and the start is
the solution. The features of a trained network vary in few directions (about 30 of 256 on our glyphs), so weighting
with S gains more than twice the bits without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fixify._values import counted
from fixify.errors import HeadSpecError
from fixify.heads.kinds import BINARY, GAIN_STEPS, KINDS, kind_of
from fixify.heads.layer import FixedClassifier
from fixify.heads.matching import match
from fixify.heads.spec import HeadSpec
from fixify.heads.statistics import exact_statistics, floor_std

_SHRINKAGE = 0.4
"""Share of the covariance that is replaced by its mean variance. With fewer samples than features it is singular, and
with few scenes directions that other images use look empty. Measured as agreement of one sign per weight: on other
typefaces, 2,965 kanji, N = 256, with 2,048 samples, 0.1: 98.2, 0.4: 98.4, 0.7: 98.2, 0.95: 96.9 %; with 200: 97.6, 98,
97.8, 96.7; EfficientNet-Lite0, N = 1280, 216 crops of nine photographs, on crops of others: 63.8, 72.8, 75.6, 72.4."""
_RIDGE = 30.0
"""Weight of the squared movement of the biases, in standard deviations of the old logits, against the sum over samples.
Measured as agreement on 3,000 other glyphs of 500 classes, N = 256, with 100, 384 and 2,000 samples: 3: 35, 38.5, 44.1
%; 23: 36.9, 40.6, 44.2; 100: 36.9, 39.5, 43.4; not moved: 36.2, 38.4, 40.5; the whole mean's share: 28.0, 28.5, 29.8.
Signs of the old weights as codes: 97.8 with it, 97.6 not moved, 96.9 the whole."""
_CHECKED = 4
"""The last 1/4 of the samples checks whether the fit helps on samples it did not see."""
_LBFGS_STEPS = 80
_SIGN_SWEEPS = 8
_ROWS_AT_ONCE = 1024
_CLASSES_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of the input of a classifier.

    Attributes:
        mean: What a standardising head subtracts, float32 [N]; 0 without standardisation.
        std: What it then divides by, float32 [N], positive; 1 without standardisation.
        covariance: Covariance of `x / std`, shrunk towards a multiple of the identity, float64 [N, N].
    """

    mean: Tensor
    std: Tensor
    covariance: Tensor


@torch.no_grad()
def feature_statistics(features: Tensor, *, standardize: bool | str = True) -> FeatureStatistics:
    """Compute mean, std and covariance of some features, accumulated in float64.

    Args:
        features: [S, N], S samples.
        standardize: Whether and how the head standardises, as in its spec.

    Raises:
        HeadSpecError: No samples, or they are not finite.
    """
    n = features.shape[-1]
    mean, exact_std, _ = exact_statistics([features], n)
    std = floor_std(exact_std.float()) if standardize is True else torch.ones(n)
    covariance = torch.zeros((n, n), dtype=torch.float64)
    for rows in features.split(_ROWS_AT_ONCE):
        centered = (rows.double() - mean) / std
        covariance += centered.T @ centered / len(features)
    shrunk = (1.0 - _SHRINKAGE) * covariance
    shrunk.diagonal().add_(_SHRINKAGE * covariance.diagonal().mean())
    return FeatureStatistics(mean.float() if standardize else torch.zeros(n), std, shrunk)


# --- Signs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BinaryCodes:
    """What a binary head stores.

    Attributes:
        codes: Packed signs, uint8 [C, ceil(d / 8)]; bit 1 is a minus sign, first sign in the highest bit.
        gains: Row scales, uint8 [C], in steps of 1/255 of the longest.
        scale: The alpha at which `alpha * gains / 255 * Q x` is nearest to the old logits, for features that are not
            normalised.
    """

    codes: np.ndarray
    gains: np.ndarray
    scale: float


def encode(spec: HeadSpec, class_vectors: Tensor, *, feature_moment: Tensor | None = None) -> BinaryCodes:
    """Choose signs and row scales for the classes of a classifier that is being replaced.

    Args:
        spec: A head spec of kind "binary".
        class_vectors: Weight of the old classifier, [C, N]. If the head standardises its features, in those
            coordinates: weight * std. The mean over classes is removed here, since softmax does not see it.
        feature_moment: Second moment S [N, N] of the centered features in the same coordinates, if known (no labels
            needed). Few images give a moment of low rank: shrink it towards its diagonal.

    Raises:
        HeadSpecError: Values are not finite or do not fit the spec, or all class vectors are equal.

    >>> spec = HeadSpec("binary", num_features=8, num_classes=3, bits_per_class=8, gains=True)
    >>> encode(spec, torch.eye(8)[:3]).codes.shape
    (3, 1)
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
    rotation = BINARY.rotation(spec)
    directions = torch.eye(n) if rotation is None else torch.from_numpy(rotation.basis())
    moment = torch.eye(n) if feature_moment is None else feature_moment.detach().to("cpu", torch.float32)
    within = directions.T @ moment @ directions
    fields = vectors @ (moment @ directions)
    signs, lengths = torch.empty(c, within.shape[0], dtype=torch.int8), torch.empty(c)
    for start in range(0, c, _CLASSES_AT_ONCE):
        part = slice(start, start + _CLASSES_AT_ONCE)
        first = torch.where(vectors[part] @ directions < 0, -1.0, 1.0)
        chosen, lengths[part] = _descend(first, fields[part], within)
        signs[part] = chosen.to(torch.int8)
    packed = np.packbits(signs.numpy() < 0, axis=1)
    _separate_(packed, signs.shape[1])
    longest = float(lengths.max())
    if not longest > 0:
        raise HeadSpecError(
            "The classes cannot be told apart by their old vectors: no signs to take.",
            hint="A classifier that was never trained is replaced by `--head hadamard` or `--head orthogonal`.",
        )
    steps = (lengths / longest * GAIN_STEPS).round().clamp(1, GAIN_STEPS).to(torch.uint8)
    return BinaryCodes(packed, steps.numpy(), longest * within.shape[0] ** 0.5)


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


def _best_length(signs: Tensor, fields: Tensor, products: Tensor) -> Tensor:
    return ((fields * signs).sum(dim=1) / (products * signs).sum(dim=1).clamp_min(1e-12)).clamp_min(0.0)


def _separate_(packed: np.ndarray, num_signs: int) -> None:
    """Change signs of classes until no two classes have equal signs, which could never be told apart.

    Of each group of equals the first is kept. For the others, the last bits are counted through until the code is free;
    groups are small, so a free one is near.
    """
    taken: set[bytes] = set()
    for code in packed:
        count = 0
        start = code.copy()
        while code.tobytes() in taken:
            count += 1
            flips = np.array([count >> k & 1 for k in range(min(num_signs, 62))], dtype=np.uint8)
            mask = np.zeros(packed.shape[1] * 8, dtype=np.uint8)
            mask[num_signs - len(flips) : num_signs] = flips[::-1]
            code[:] = start ^ np.packbits(mask)
        taken.add(code.tobytes())


# --- Scale and bias ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The scale and bias that a head was set to.

    Attributes:
        scale: Alpha.
        mean_share: The part of the mean's share that the bias took; None without a bias.
        refined: Whether the steps on the original's softmax were kept. If not, alpha is the least-squares solution and
            the bias has the whole of the mean's share.
    """

    scale: float
    mean_share: float | None
    refined: bool


@torch.no_grad()
def fit_(
    head: FixedClassifier, features: Tensor, weight: Tensor, bias: Tensor | None = None, *, fit_scale: bool = True
) -> Fit:
    """Set the scale and bias of a head so that it answers like the classifier that it replaces.

    First, alpha is the least-squares solution between the logits of both without their biases, and the bias has the
    whole of the mean's share. From there LBFGS minimises the Kullback-Leibler divergence from the old softmax over
    alpha, the part of the mean's share, and a movement of each class's bias (with a ridge: a few hundred samples show
    few of the classes). That is convex, and it is kept if it helps on samples that it was not fitted to.

    Args:
        head: The head with its codes, and its mean and std if it has them, on the CPU.
        features: Inputs of the classifier, [S, N], in random order.
        weight: Weight of the old classifier, [C, N].
        bias: Bias of the old classifier, [C].
        fit_scale: Whether to fit the scale; else it stays as it is.

    Raises:
        HeadSpecError: The sizes do not fit.
    """
    c, n = head.out_features, head.in_features
    if weight.shape != (c, n) or features.ndim != 2 or features.shape[1] != n:
        raise HeadSpecError(
            f"A head of {counted(c, 'class', 'classes')} and {counted(n, 'feature')} cannot be fitted to a weight of "
            f"shape {list(weight.shape)} with features of shape {list(features.shape)}."
        )
    features, weight = features.float(), weight.float()
    old_bias = torch.zeros(c) if bias is None else bias.float()
    share = old_bias if head.mean is None else old_bias + weight @ head.mean
    share = share - share.mean()
    wanted = features @ weight.T + old_bias
    wanted = wanted - wanted.mean(dim=1, keepdim=True)
    alpha = head.scale.item()
    plain = _plain_logits(head, features)
    if fit_scale:
        centered = plain - plain.mean(dim=1, keepdim=True)
        found = float((centered * (wanted - share)).sum() / centered.square().sum().clamp_min(1e-12))
        alpha = found if found > 0 else alpha  # a negative one means that codes and classes are unrelated
    problem = _Problem(plain, wanted, share, alpha, fit_scale=fit_scale, fit_bias=head.bias is not None)
    start = problem.start()
    best = start
    if len(features) >= 2 * _CHECKED:
        checked = torch.arange(len(features)) >= len(features) - len(features) // _CHECKED
        trial = problem.solve(~checked)
        if trial.scale > 0 and problem.divergence(trial, checked) < problem.divergence(start, checked):
            best = problem.solve(torch.ones_like(checked))
    if best.scale <= 0:
        best = start
    head.scale.fill_(best.scale)
    if head.bias is None:
        return Fit(best.scale, None, best is not start)
    head.bias.copy_(best.mean_share * share + best.moves)
    return Fit(best.scale, best.mean_share, best is not start)


def _plain_logits(head: FixedClassifier, features: Tensor) -> Tensor:
    """Compute the logits of a head at scale 1 and without bias, float32 [S, C]; the head is left as it was."""
    scale, training = head.scale.clone(), head.training
    head.scale.fill_(1.0)
    head.eval()
    logits = head(features)
    head.scale.copy_(scale)
    head.train(training)
    return logits if head.bias is None else logits - head.bias


@dataclass(frozen=True)
class _Solution:
    scale: float
    mean_share: float
    moves: Tensor  # movement of each class's bias, [C]


@dataclass(frozen=True)
class _Problem:
    """Fit softmax(scale * plain + mean_share * share + moves) to the old softmax."""

    plain: Tensor
    wanted: Tensor
    share: Tensor
    alpha: float
    fit_scale: bool
    fit_bias: bool

    def start(self) -> _Solution:
        return _Solution(self.alpha, 1.0 if self.fit_bias else 0.0, torch.zeros_like(self.share))

    def divergence(self, solution: _Solution, rows: Tensor) -> float:
        logits = solution.scale * self.plain[rows] + solution.mean_share * self.share + solution.moves
        return float(_divergence(logits, self.wanted[rows]))

    def solve(self, rows: Tensor) -> _Solution:
        plain, wanted = self.alpha * self.plain[rows], self.wanted[rows]
        unit, ridge = wanted.std(), _RIDGE / len(wanted)
        factor = torch.ones((), requires_grad=self.fit_scale)
        part = torch.full((), 1.0 if self.fit_bias else 0.0, requires_grad=self.fit_bias)
        moves = torch.zeros_like(self.share, requires_grad=self.fit_bias)
        learned = [tensor for tensor in (factor, part, moves) if tensor.requires_grad]
        if not learned:
            return self.start()
        optimiser = torch.optim.LBFGS(learned, max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            logits = factor * plain + part * self.share + unit * moves
            value = _divergence(logits, wanted) + ridge * moves.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)
        return _Solution(self.alpha * float(factor), float(part), unit * moves.detach())


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence from softmax(wanted) to softmax(logits), mean over samples, in nats."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.log_softmax(wanted, dim=1), log_target=True, reduction="batchmean")


# --- Replacement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """A head that replaces a learned classifier.

    Attributes:
        head: The head, float32, on the CPU, in training mode.
        note: How its codes were chosen, in a few words.
    """

    head: FixedClassifier
    note: str


def replacement(
    spec: HeadSpec,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    features: Tensor | None = None,
    scale: float | None = None,
    channel_dim: int = -1,
) -> Replacement:
    """Make a head that replaces a learned classifier: a `hadamard` head with matched codes, or a `binary` one.

    With features (no labels needed), codes are chosen by what the classifier sees, mean and std are set if the head has
    them, and scale and bias are fitted to the old answers. Without, the bias is the old one.

    Args:
        spec: A spec with `can_fit`. A "hadamard" one becomes a matched one.
        weight: Weight of the old classifier, [C, N], or [C, N, 1, 1] of a 1x1 convolution.
        bias: Bias of the old classifier, [C].
        features: Inputs of the classifier, [S, N], in random order.
        scale: Alpha, which is then not fitted; None: `initial_scale`, or for signs the one with the nearest logits.
        channel_dim: See `FixedClassifier`.

    Raises:
        HeadSpecError: The spec is of another kind or size, there is no such codebook, the weights are not finite or the
            same for all classes, or the features do not fit.
    """
    c, n = spec.num_classes, spec.num_features
    if weight.numel() != c * n or len(weight) != c:
        size = f"{counted(c, 'class', 'classes')} and {counted(n, 'feature')}"
        raise HeadSpecError(f"A head of {size} cannot replace a weight {list(weight.shape)}.")
    weight = weight.detach().to("cpu", torch.float32).reshape(c, n)
    bias = None if bias is None else bias.detach().to("cpu", torch.float32)
    if features is None:
        chosen = _choose_codes(spec, weight, None)
    else:
        features = features.detach().to("cpu", torch.float32)
        if features.ndim != 2 or features.shape[1] != n:
            raise HeadSpecError(f"Features are given as [samples, {n}], got shape {list(features.shape)}.")
        statistics = feature_statistics(features, standardize=spec.standardize)
        chosen = _choose_codes(spec, weight * statistics.std, statistics.covariance)
    with torch.device("cpu"):
        head = FixedClassifier(
            chosen.spec,
            codes=chosen.codes,
            gains=chosen.gains,
            scale=chosen.scale if scale is None else scale,
            channel_dim=channel_dim,
        )
    if features is not None:
        if spec.standardize:
            head.calibrate_(features.split(_ROWS_AT_ONCE))
        fit_(head, features, weight, bias, fit_scale=scale is None)
    elif head.bias is not None and bias is not None:
        with torch.no_grad():
            head.bias.copy_(bias)
    return Replacement(head, chosen.note)


@dataclass(frozen=True)
class _Chosen:
    """Arguments of `FixedClassifier`, and a note for the user."""

    spec: HeadSpec
    codes: Tensor
    note: str
    gains: Tensor | None = None
    scale: float | None = None


def _choose_codes(spec: HeadSpec, class_vectors: Tensor, covariance: Tensor | None) -> _Chosen:
    """Choose the codes for class vectors in the coordinates of the head's features, whose covariance may be known."""
    if spec.can_match:
        found = match(class_vectors, seed=spec.seed, blocks=spec.blocks, feature_covariance=covariance)
        note = f"codes matched to the old class vectors, mean cosine {found.mean_correlation:.2f}"
        return _Chosen(replace(spec, matched=True, blocks=found.blocks), torch.from_numpy(found.codes), note)
    if not spec.needs_classifier:
        raise HeadSpecError(
            f"The codes of head {spec.kind!r} ({kind_of(spec).summary}) cannot be chosen by an old classifier.",
            hint=f"Those of {' and '.join(kind.name for kind in KINDS.values() if kind.can_fit)} can.",
        )
    signs = encode(spec, class_vectors, feature_moment=covariance)
    note = f"{spec.bits_per_class} signs per class taken from the old classifier"
    if spec.row_scales:
        return _Chosen(spec, torch.from_numpy(signs.codes), note, torch.from_numpy(signs.gains), signs.scale)
    mean_length = float(signs.gains.mean()) / GAIN_STEPS  # one length for all classes
    return _Chosen(spec, torch.from_numpy(signs.codes), note, scale=signs.scale * mean_length)
