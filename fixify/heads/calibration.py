"""Fitting a fixed head to the learned one it replaces, on features of a few hundred images without labels.

Not in the paper, which trains from scratch. With center mu and spread sigma of the features, the learned classifier is

    W x + b = (W sigma) ((x - mu) / sigma) + (b + W mu)

so what a code has to stand for is the class vector in standardised coordinates, and the bias takes the mean's share. A
code that stands for its class vector only in part (a Hadamard code at cosine 0.1 to 0.3) bears only a part of that
bias: the rest would hold classes down that the code cannot lift. How much is fitted, with the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fixify.errors import HeadSpecError
from fixify.heads.module import FixedClassifier
from fixify.heads.statistics import exact, floored

_SHRINKAGE = 0.4
"""Share of the covariance that is replaced by its mean variance: of fewer samples than features it is singular, and of
few scenes it holds directions for empty that other images use. Measured as agreement of one sign a weight: on other
typefaces, 2,965 kanji, N = 256, with 2,048 samples, 0.1: 98.2, 0.4: 98.4, 0.7: 98.2, 0.95: 96.9 %; with 200: 97.6, 98,
97.8, 96.7; EfficientNet-Lite0, N = 1280, 216 crops of nine photographs, on crops of others: 63.8, 72.8, 75.6, 72.4."""
_ROWS_AT_ONCE = 1024
_CHECKED = 4
"""The last fourth of the samples checks whether fitting helps those that it was not fitted to."""
_RIDGE = 30.0
"""Weight of what the bias moves by, squared, in deviations of the old logits, against the sum over samples. Measured
as agreement on 3,000 other glyphs of 500 classes, N = 256, with 100, 384 and 2,000 samples: 3: 35, 38.5, 44.1 %; 23:
36.9, 40.6, 44.2; 100: 36.9, 39.5, 43.4; not moved: 36.2, 38.4, 40.5; the whole of the mean's share: 28.0, 28.5, 29.8.
Signs of the old weights as codes: 97.8 with it, 97.6 not moved, 96.9 the whole."""
_STEPS = 80


@dataclass(frozen=True)
class FeatureStatistics:
    """What is known of a classifier's input.

    Attributes:
        center: What a standardising head subtracts, float32 [N]; 0 without standardising.
        spread: What it then divides by, float32 [N], positive; 1 without standardising.
        covariance: Of `(x - mean) / spread`, shrunk towards a multiple of the identity, float64 [N, N].
    """

    center: Tensor
    spread: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Fit:
    """What a head's scale and bias were set to.

    Attributes:
        scale: Alpha.
        mean_share: The part of the mean's share that the bias took; None without a bias.
        refined: Whether steps on the original's softmax were kept. If not, alpha is the least-squares solution and the
            bias has the whole of the mean's share.
    """

    scale: float
    mean_share: float | None
    refined: bool


@torch.no_grad()
def feature_statistics(features: Tensor, *, standardize: bool | str = True) -> FeatureStatistics:
    """Center, spread and covariance of some features, accumulated in float64.

    Args:
        features: [S, N], S samples.
        standardize: Whether and how the head standardises, as in its spec.

    Raises:
        HeadSpecError: No samples, or they are not finite.
    """
    n = features.shape[-1]
    mean, deviation, _ = exact([features], n)
    spread = floored(deviation.float()) if standardize is True else torch.ones(n)
    covariance = torch.zeros((n, n), dtype=torch.float64)
    for rows in features.split(_ROWS_AT_ONCE):
        centered = (rows.double() - mean) / spread
        covariance += centered.T @ centered / len(features)
    shrunk = (1.0 - _SHRINKAGE) * covariance
    shrunk.diagonal().add_(_SHRINKAGE * covariance.diagonal().mean())
    return FeatureStatistics(mean.float() if standardize else torch.zeros(n), spread, shrunk)


@torch.no_grad()
def fit_(
    head: FixedClassifier, features: Tensor, weight: Tensor, bias: Tensor | None = None, *, fit_scale: bool = True
) -> Fit:
    """Set a head's scale and bias so that it answers as the classifier did that it replaces.

    First alpha by least squares between the logits of both without their biases, and the bias with the whole of the
    mean's share. From there LBFGS minimises the Kullback-Leibler divergence from the old softmax over alpha, the part
    of the mean's share, and what else each class's bias moves by (with a ridge: few hundred samples show few of the
    classes). That is convex, and kept if it brings samples nearer that it was not fitted to.

    Args:
        head: With its codes, and its center and spread if it has them, on the CPU.
        features: What the classifier is given, [S, N], in random order.
        weight: Of the old classifier, [C, N].
        bias: Of the old classifier, [C].
        fit_scale: If not, the head's scale stays as it is.

    Raises:
        HeadSpecError: The sizes do not fit.
    """
    c, n = head.out_features, head.in_features
    if weight.shape != (c, n) or features.ndim != 2 or features.shape[1] != n:
        raise HeadSpecError(
            f"A head of {c} classes and {n} features cannot be fitted to a weight of shape {list(weight.shape)} with "
            f"features of shape {list(features.shape)}."
        )
    features, weight = features.float(), weight.float()
    old_bias = torch.zeros(c) if bias is None else bias.float()
    share = old_bias if head.center is None else old_bias + weight @ head.center
    share = share - share.mean()
    wanted = features @ weight.T + old_bias
    wanted = wanted - wanted.mean(dim=1, keepdim=True)
    alpha = head.scale.item()
    plain = _plain_logits(head, features)
    if fit_scale:
        centered = plain - plain.mean(dim=1, keepdim=True)
        found = float((centered * (wanted - share)).sum() / centered.square().sum().clamp_min(1e-12))
        alpha = found if found > 0 else alpha  # else the codes have nothing to do with the classes
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
    """A head's logits with scale 1 and without its bias, float32 [S, C]. Its own are as they were afterwards."""
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
    moves: Tensor  # of each class's bias, [C]


@dataclass(frozen=True)
class _Problem:
    """Old softmax ~ softmax(scale * plain + mean_share * share + moves)."""

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
        optimiser = torch.optim.LBFGS(learned, max_iter=_STEPS, line_search_fn="strong_wolfe")

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
    """Kullback-Leibler divergence from softmax(wanted) to softmax(logits), mean over samples, nats."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.log_softmax(wanted, dim=1), log_target=True, reduction="batchmean")
