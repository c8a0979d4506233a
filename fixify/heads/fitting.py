"""Fitting a fixed head to the learned classifier it replaces: its codes, its scale and its bias.

Not in the paper, which trains from scratch with codes in class order. A few hundred images without labels help.

With mean mu and std sigma of the features, the learned classifier is

    W x + b = (W sigma) ((x - mu) / sigma) + (b + W mu)

so a code has to represent the class vector in standardised coordinates, and the bias takes the mean's share, W mu. A
code that represents its class vector only in part (a Hadamard code at cosine 0.1 to 0.3) needs only a part of that
bias: the rest would hold down classes that the code cannot lift. That part is fitted, with the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fixify._values import counted
from fixify._watch import OnProgress, unwatched
from fixify.errors import HeadSpecError
from fixify.heads.answer_search import Answers
from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.encoding import encode
from fixify.heads.kinds import KINDS, kind_of
from fixify.heads.layer import FixedClassifier
from fixify.heads.matching import match
from fixify.heads.projection import Projection
from fixify.heads.spec import HeadSpec
from fixify.heads.statistics import exact_statistics, floor_std

_SHRINKAGE = 0.4
"""Share of the covariance that is replaced by its mean variance. With fewer samples than features it is singular, and
with few scenes directions that other images use look empty. Measured as agreement of one sign per weight: on other
typefaces, 2,965 kanji, N = 256, with 2,048 samples, 0.1: 98.2, 0.4: 98.4, 0.7: 98.2, 0.95: 96.9 %; with 200: 97.6, 98,
97.8, 96.7; EfficientNet-Lite0, N = 1280, 216 crops of nine photographs, on crops of others: 63.8, 72.8, 75.6, 72.4."""
_LEVEL_SHARES = 0.3, 0.35, 0.35
"""Shares of the samples' covariance, of its diagonal, and of the classes' own moment in the metric of the search for
levels. Features point to class vectors, so where few samples say nothing the classes do. Measured as divergence from
the old softmax at 2 bits: EfficientNet-Lite0, 312 crops, crops of other photographs: 0.040 nats, against 0.056 with the
covariance above; 2,000 classes of ddddocr's reader, 4,096 and 384 steps, other typefaces: 0.0127 against 0.0147."""
_PROJECTION_SHARES = 0.6, 0.4
"""Shares of the samples' covariance and of its diagonal in the metric of a stored projection. Measured as divergence
from the old softmax: 2,965 kanji, N = 256, 2,048 samples, 8, 16 and 32 bytes per class: 0.362, 0.084 and 0.021 nats,
against 0.370, 0.089 and 0.021 with the metric of levels; ddddocr's reader, 64 and 128 bytes: 0.0055 and 0.0030, against
0.0377 and 0.0258: its class of nothing has a vector 14 times as long as the others, which fills the classes' moment."""
_PRIOR_CLASSES, _PRIOR_MEAN = 0.6, 0.1
"""In the metric without samples: the share of the classes' own moment, where there are as many classes as features or
more, and the weight of the direction in which all features grow (most networks end in features that are not negative,
so their mean is not 0). The rest is the identity. Measured as divergence from the old softmax at 1, 2 and 4 bits:
EfficientNet-Lite0, 1,632 crops of 68 photographs: 0.234, 0.052 and 0.0039 nats, against 0.593, 0.096 and 0.0055 with
the identity alone; 2,965 kanji, N = 256: 0.063, 0.0095 and 0.0006, against 0.277, 0.031 and 0.0017; a mean of weight 1:
0.277, 0.051 and 0.0043; 0.099, 0.017 and 0.0012. Ten classes (Fashion-MNIST, N = 256) 0.030, 0.0043 and 0.0002, against
0.050, 0.0096 and 0.0006, and 0.033, 0.0038 and 0.0004 with the whole share."""
_PRIOR_WORK = 1 << 36
"""Multiplications C N^2 up to which signs and levels are searched for without samples; beyond, they are rounded."""
_LEAST_VARIANCE = 0.05
"""Of a feature in that diagonal, relative to the mean: samples may miss what other images have."""
_RIDGE = 30.0
"""Weight of the squared movement of the biases, in standard deviations of the old logits, against the sum over samples.
Measured as agreement on 3,000 other glyphs of 500 classes, N = 256, with 100, 384 and 2,000 samples: 3: 35, 38.5, 44.1
%; 23: 36.9, 40.6, 44.2; 100: 36.9, 39.5, 43.4; not moved: 36.2, 38.4, 40.5; the whole mean's share: 28.0, 28.5, 29.8.
Signs of the old weights as codes: 97.8 with it, 97.6 not moved, 96.9 the whole."""
_CHECKED = 4
"""The last 1/4 of the samples checks whether the fit helps on samples it did not see."""
_LBFGS_STEPS = 80
_MAX_LOGITS = 5_000_000
"""Logits S C up to which LBFGS keeps them and their gradients in float32. More are fitted by `_LargeProblem`."""
_LARGE_STEPS = 24
_LARGE_SAMPLES = 512
_LOGITS_AT_ONCE = 1 << 21
_ROWS_OF_A_PRODUCT = 64
_ROWS_AT_ONCE = 1024
_CLASSES_AT_ONCE = 8192


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


def level_moment(covariance: Tensor, class_vectors: Tensor) -> Tensor:
    """Compute the metric in which levels are chosen, from the features' covariance and the classes themselves.

    Args:
        covariance: Of the features, as `FeatureStatistics` shrinks it, [N, N].
        class_vectors: [C, N], in the same coordinates.

    Returns:
        float64 [N, N], positive definite, of the covariance's trace.
    """
    of_samples, of_diagonal, of_classes = _LEVEL_SHARES
    variance = covariance.diagonal().mean()
    sampled, diagonal = _unshrunk(covariance)
    classes = _scatter(class_vectors)
    moment = of_samples * sampled + of_classes * variance / classes.diagonal().mean().clamp_min(1e-30) * classes
    moment.diagonal().add_(of_diagonal * diagonal)
    return moment


def projection_moment(covariance: Tensor) -> Tensor:
    """Compute the metric in which the directions of a stored projection and its levels are chosen.

    Args:
        covariance: Of the features, as `FeatureStatistics` shrinks it, [N, N].

    Returns:
        float64 [N, N], positive definite, unless the features do not vary at all.
    """
    of_samples, of_diagonal = _PROJECTION_SHARES
    sampled, diagonal = _unshrunk(covariance)
    moment = of_samples * sampled
    moment.diagonal().add_(of_diagonal * diagonal)
    return moment


def _unshrunk(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples' own covariance, float64 [N, N], and its diagonal, [N], nowhere near 0."""
    variance = covariance.diagonal().mean()
    sampled = covariance.double() / (1.0 - _SHRINKAGE)
    sampled.diagonal().sub_(variance * (_SHRINKAGE / (1.0 - _SHRINKAGE)))
    return sampled, sampled.diagonal().clamp_min(_LEAST_VARIANCE * variance)


def prior_moment(class_vectors: Tensor) -> Tensor | None:
    """Compute the metric in which signs and levels are chosen where no features are known.

    Args:
        class_vectors: [C, N], in the coordinates of the features.

    Returns:
        float32 [N, N], positive definite; None if the classifier is so large that the search would take minutes.
    """
    c, n = class_vectors.shape
    if c * n * n > _PRIOR_WORK:
        return None
    of_classes = _PRIOR_CLASSES * min(1.0, c / n) ** 0.5  # few classes span few directions
    classes = _scatter(class_vectors)
    moment = classes * (of_classes / classes.diagonal().mean().clamp_min(1e-30)) + _PRIOR_MEAN
    moment.diagonal().add_(1.0 - of_classes)
    return moment.float()


def _scatter(class_vectors: Tensor) -> Tensor:
    """Compute the scatter matrix of class vectors [C, N] around their mean, float64 [N, N], a few rows at a time."""
    mean = class_vectors.mean(dim=0)
    total = torch.zeros((len(mean), len(mean)), dtype=torch.float64)
    for rows in class_vectors.split(_CLASSES_AT_ONCE):
        centered = rows - mean
        total += centered.T @ centered
    return total


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
    head: FixedClassifier,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    fit_scale: bool = True,
    on_progress: OnProgress = unwatched,
) -> Fit:
    """Set the scale and bias of a head so that it answers like the classifier that it replaces.

    First, alpha is the least-squares solution between the logits of both without their biases, and the bias has the
    whole of the mean's share. From there LBFGS minimises the Kullback-Leibler divergence from the old softmax over
    alpha, the part of the mean's share, and a movement of each class's bias (with a ridge: a few hundred samples show
    few of the classes). That is convex, and it is kept if it helps on samples that it was not fitted to.

    Above 5 million logits S C, the same problem is solved on at most 512 samples (or N, if that is more), whose logits
    are held in half precision; memory is then at most that and a few logits more.

    Args:
        head: The head with its codes, and its mean and std if it has them, on the CPU.
        features: Inputs of the classifier, [S, N], in random order.
        weight: Weight of the old classifier, [C, N].
        bias: Bias of the old classifier, [C].
        fit_scale: Whether to fit the scale; else it stays as it is.
        on_progress: Called with the number of steps that are done.

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
    options = {"fit_scale": fit_scale, "fit_bias": head.bias is not None}
    problem: _Problem | _LargeProblem
    if len(features) * c <= _MAX_LOGITS:
        problem = _small_problem(head, features, weight, old_bias, share, **options)
    else:
        features = features[: max(_LARGE_SAMPLES, n)]
        problem = _LargeProblem(head, features, weight, old_bias, share, **options, on_progress=on_progress)
    start = problem.start()
    best = start
    if len(features) >= 2 * _CHECKED:
        checked = torch.arange(len(features)) >= len(features) - len(features) // _CHECKED
        trial = problem.solve(~checked)
        if trial.scale > 0 and problem.divergence(trial, checked) < problem.divergence(start, checked):
            best = problem.solve(torch.ones_like(checked), near=trial)
    if best.scale <= 0:
        best = start
    head.scale.fill_(best.scale)
    if head.bias is None:
        return Fit(best.scale, None, best is not start)
    head.bias.copy_(best.mean_share * share + best.moves)
    return Fit(best.scale, best.mean_share, best is not start)


def _small_problem(
    head: FixedClassifier,
    features: Tensor,
    weight: Tensor,
    old_bias: Tensor,
    share: Tensor,
    *,
    fit_scale: bool,
    fit_bias: bool,
) -> _Problem:
    wanted = features @ weight.T + old_bias
    wanted = wanted - wanted.mean(dim=1, keepdim=True)
    alpha = head.scale.item()
    plain = _plain_logits(head, features)
    if fit_scale:
        centered = plain - plain.mean(dim=1, keepdim=True)
        found = float((centered * (wanted - share)).sum() / centered.square().sum().clamp_min(1e-12))
        alpha = found if found > 0 else alpha  # a negative one means that codes and classes are unrelated
    return _Problem(plain, wanted, share, alpha, fit_scale=fit_scale, fit_bias=fit_bias)


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

    def solve(self, rows: Tensor, near: _Solution | None = None) -> _Solution:
        del near  # LBFGS starts anew, which keeps the results of earlier versions
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


class _LargeProblem:
    """`_Problem` for many logits: those of the head in half precision, those of the classifier not kept at all.

    The divergence of a sample is logsumexp(l) - p^T l + p^T log p with the old softmax p and l = scale * plain +
    mean_share * share + moves. So of the old logits the sums p^T plain, p^T share and the mean of p are enough, and the
    gradient needs one pass over the logits, a few samples at a time. LBFGS works in coordinates in which the curvature
    of every movement is about 1.

    Args:
        head: The head.
        features: Inputs of the classifier, [S, N].
        weight: Weight of the old classifier, [C, N].
        old_bias: Bias of the old classifier, [C].
        share: The mean's share of the bias, [C].
        fit_scale: Whether the scale is fitted.
        fit_bias: Whether the bias is fitted.
        on_progress: Called with the number of steps that are done.
    """

    def __init__(
        self,
        head: FixedClassifier,
        features: Tensor,
        weight: Tensor,
        old_bias: Tensor,
        share: Tensor,
        *,
        fit_scale: bool,
        fit_bias: bool,
        on_progress: OnProgress,
    ) -> None:
        samples, c = len(features), len(share)
        self.share, self.fit_scale, self.fit_bias = share, fit_scale, fit_bias
        self.alpha = head.scale.item()
        self._on_progress, self._steps = on_progress, 0
        self._plain = torch.empty((samples, c), dtype=torch.float16)
        self._first = samples - samples // _CHECKED  # rows from here on are checked
        self._asked = torch.zeros(2, c)  # sums of the old softmax over the rows before that and from there
        self._along, self._entropy, squares = torch.zeros(samples), torch.zeros(samples), 0.0
        product = square = 0.0
        for rows in self._parts(0, samples, at_least=_ROWS_OF_A_PRODUCT):
            plain = _plain_logits(head, features[rows])
            plain -= plain.mean(dim=1, keepdim=True)
            self._plain[rows] = plain
            wanted = torch.addmm(old_bias, features[rows], weight.T)
            wanted -= wanted.mean(dim=1, keepdim=True)
            squares += float(wanted.square().sum())
            product += float((plain * wanted).sum()) - float(plain.sum(dim=0) @ share)
            square += float(plain.square().sum())
            logs = wanted.log_softmax(dim=1)
            softmax = wanted.copy_(logs).exp_()
            self._entropy[rows] = logs.mul_(softmax).sum(dim=1)
            self._along[rows] = plain.mul_(softmax).sum(dim=1)
            cut = max(0, self._first - rows.start)
            self._asked[0] += softmax[:cut].sum(dim=0)
            self._asked[1] += softmax[cut:].sum(dim=0)
        if fit_scale and product > 0:
            self.alpha = product / max(square, 1e-12)
        self._unit = (squares / max(samples * c - 1, 1)) ** 0.5

    def start(self) -> _Solution:
        """Return the least-squares scale with the whole of the mean's share."""
        return _Solution(self.alpha, 1.0 if self.fit_bias else 0.0, torch.zeros_like(self.share))

    def divergence(self, solution: _Solution, rows: Tensor) -> float:
        """Compute the mean divergence over some rows: all before the checked ones, the checked ones, or all."""
        return self._evaluate(solution, rows)[0]

    def solve(self, rows: Tensor, near: _Solution | None = None) -> _Solution:
        """Minimise the divergence over some rows, from `near` if a solution for other rows is known."""
        begin = near or self.start()
        ridge = _RIDGE / int(rows.sum())
        weights = self._evaluate(begin, rows)[1]
        stretch = (self._unit**2 * weights + 2.0 * ridge).rsqrt()
        factor = torch.tensor(begin.scale / self.alpha if self.alpha else 1.0, requires_grad=self.fit_scale)
        part = torch.tensor(begin.mean_share, requires_grad=self.fit_bias)
        moves = (begin.moves / self._unit / stretch).requires_grad_(self.fit_bias)
        learned = [tensor for tensor in (factor, part, moves) if tensor.requires_grad]
        if not learned:
            return begin
        steps = _LARGE_STEPS if near is None else _LARGE_STEPS // 2
        optimiser = torch.optim.LBFGS(learned, max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            moved = (moves * stretch).detach()
            solution = _Solution(self.alpha * factor.item(), part.item(), self._unit * moved)
            value, softmax, along = self._evaluate(solution, rows)
            asked, asked_along = self._asked_of(rows)
            factor.grad = torch.tensor(self.alpha * (along - asked_along))
            part.grad = (softmax - asked) @ self.share
            moves.grad = (self._unit * (softmax - asked) + 2.0 * ridge * moved) * stretch
            self._steps += 1
            total = 2 * _LARGE_STEPS
            self._on_progress("fitting scale and bias", min(self._steps, total), total)
            return torch.tensor(value + ridge * float(moved.square().sum()))

        optimiser.step(loss)
        return _Solution(self.alpha * factor.item(), part.item(), self._unit * (moves * stretch).detach())

    def _evaluate(self, solution: _Solution, rows: Tensor) -> tuple[float, Tensor, float]:
        """Compute the mean divergence, the mean softmax [C] and the mean of its product with `plain`."""
        offset = solution.mean_share * self.share + solution.moves
        asked, along = self._asked_of(rows)
        value = float(self._entropy[rows].mean()) - solution.scale * along - float(asked @ offset)
        softmax, product, count = torch.zeros_like(self.share), 0.0, int(rows.sum())
        found = rows.nonzero()
        for part in self._parts(int(found[0]), int(found[-1]) + 1):
            plain = self._plain[part].float()
            logits = (plain * solution.scale).add_(offset)
            largest = logits.amax(dim=1, keepdim=True)
            powers = logits.sub_(largest).exp_()
            sums = powers.sum(dim=1)
            value += float((sums.log() + largest[:, 0]).sum()) / count
            softmax += (1.0 / sums) @ powers / count
            product += float((powers.mul_(plain).sum(dim=1) / sums).sum()) / count
        return value, softmax, product

    def _asked_of(self, rows: Tensor) -> tuple[Tensor, float]:
        """Return the mean of the old softmax over some rows, [C], and of its product with `plain`."""
        sums = sum(self._asked[i] for i in (0, 1) if bool(rows[0 if i == 0 else -1]))
        return torch.as_tensor(sums) / int(rows.sum()), float(self._along[rows].mean())

    def _parts(self, start: int, stop: int, at_least: int = 1) -> Iterator[slice]:
        step = max(at_least, _LOGITS_AT_ONCE // len(self.share))
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))


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
    on_progress: OnProgress = unwatched,
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
        on_progress: Called with what is being done, how much of it is done and how much there is. It can take minutes
            where there are very many classes.

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
        chosen = _choose_codes(spec, weight, None, None, on_progress)
    else:
        features = features.detach().to("cpu", torch.float32)
        if features.ndim != 2 or features.shape[1] != n:
            raise HeadSpecError(f"Features are given as [samples, {n}], got shape {list(features.shape)}.")
        statistics = feature_statistics(features, standardize=spec.standardize)
        vectors = weight * statistics.std if spec.standardize is True else weight
        answers = None
        if spec.needs_classifier and not spec.normalize:
            answers = Answers.of(features, statistics.mean, statistics.std, weight, bias)
        chosen = _choose_codes(spec, vectors, statistics.covariance, answers, on_progress)
        del vectors, answers
    with torch.device("cpu"):
        head = FixedClassifier(
            chosen.spec,
            codes=chosen.codes,
            gains=chosen.gains,
            projection=chosen.projection,
            scale=chosen.scale if scale is None else scale,
            channel_dim=channel_dim,
        )
    if features is not None:
        if spec.standardize:
            head.calibrate_(features.split(_ROWS_AT_ONCE))
        fit_(head, features, weight, bias, fit_scale=scale is None, on_progress=on_progress)
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
    projection: Projection | None = None


def _choose_codes(
    spec: HeadSpec,
    class_vectors: Tensor,
    covariance: Tensor | None,
    answers: Answers | None,
    on_progress: OnProgress,
) -> _Chosen:
    """Choose the codes for class vectors in the coordinates of the head's features, whose covariance may be known."""
    if spec.can_match:
        found = match(
            class_vectors,
            seed=spec.seed,
            blocks=spec.blocks,
            feature_covariance=covariance,
            on_progress=on_progress,
        )
        note = f"codes matched to the old class vectors, mean cosine {found.mean_correlation:.2f}"
        return _Chosen(replace(spec, matched=True, blocks=found.blocks), torch.from_numpy(found.codes), note)
    if not spec.needs_classifier:
        raise HeadSpecError(
            f"The codes of head {spec.kind!r} ({kind_of(spec).summary}) cannot be chosen by an old classifier.",
            hint=f"Those of {' and '.join(kind.name for kind in KINDS.values() if kind.can_fit)} can.",
        )
    if covariance is None:
        moment = None if spec.planes is not None else prior_moment(class_vectors)
    elif spec.planes is not None:
        moment = projection_moment(covariance)
    else:  # the norm is of no use to the classes' moment: 1.106 against 1.158 nats with 64 signs of 256, kanji
        moment = covariance if spec.normalize else level_moment(covariance, class_vectors)
    signs = encode(spec, class_vectors, feature_moment=moment, answers=answers, on_progress=on_progress)
    rate = spec.bits_per_weight
    what = f"{spec.bits_per_class} signs per class" if rate is None else f"levels of {rate:g} bits per weight"
    if spec.planes is not None:
        what += f" in {spec.planes[0]} directions of {spec.num_features} features"
    note = f"{what} taken from the old classifier"
    if spec.row_scales:
        codes, gains = torch.from_numpy(signs.codes), torch.from_numpy(signs.gains)
        return _Chosen(spec, codes, note, gains, signs.scale, signs.projection)
    mean_length = float(signs.gains.mean()) / GAIN_STEPS  # one length for all classes
    return _Chosen(spec, torch.from_numpy(signs.codes), note, scale=signs.scale * mean_length)
