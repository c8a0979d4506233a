"""The choice between signs of rotated features and those of a stored projection, at the same number of bytes.

A projection wins where there are many more classes than features, which share its directions, and where features or
class vectors vary in few of them. Whether that is so is measured: both heads are made by three quarters of the samples,
and the one that is nearer to the old softmax on the last quarter is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fixify._watch import OnProgress, unwatched
from fixify.heads.fitting import feature_statistics, projection_moment, replacement
from fixify.heads.layer import FixedClassifier
from fixify.heads.level_search import CenteredRows
from fixify.heads.projection_search import Principal, water_filling
from fixify.heads.spec import HeadSpec

_CHECKED = 4
"""The last 1/4 of the samples decides."""
_LOGITS_AT_ONCE = 1 << 22


def may_be_projected(spec: HeadSpec) -> bool:
    """Check whether a spec is of signs and has more classes than features, so that a projection may replace it.

    With fewer classes than features the directions take most of the bytes, and a few scenes say too little of them:
    EfficientNet-Lite0 (1,000 x 1,280), 640 signs, three draws of 13 photographs: on crops of others rotated signs keep
    30 to 69 % of the answers, projections of the same bytes 14 to 49, and crops of the same photographs once preferred
    the projection.
    """
    signs, n = spec.bits_per_class, spec.num_features
    return signs is not None and spec.planes is None and signs <= n < spec.num_classes


def projected_spec(spec: HeadSpec, weight: Tensor, features: Tensor) -> HeadSpec | None:
    """Return the spec of a head with a stored projection that takes at most as many bytes as another.

    Args:
        spec: A spec of kind "binary" with signs.
        weight: Weight of the old classifier, float32 [C, N].
        features: Inputs of the classifier, float32 [S, N].

    Returns:
        The spec, with `planes`; None if a projection would not leave enough bytes for the classes, or if neither
        features nor classes vary.
    """
    c, n = spec.num_classes, spec.num_features
    num_bytes = c * (spec.bytes_per_class - spec.gains)
    if num_bytes < c + n:  # a byte per class and one direction
        return None
    facts = feature_statistics(features, standardize=spec.standardize)
    vectors = weight * facts.std if spec.standardize is True else weight
    moment = projection_moment(facts.covariance)
    if not float(moment.diagonal().min()) > 0:
        return None
    found = Principal.of(CenteredRows(vectors, vectors.mean(dim=0)), moment)
    planes = water_filling(found.variances, c, num_bytes)
    if not planes:
        return None
    return replace(spec, bits_per_class=sum(planes), planes=planes, gains=True, normalize=False, construction=None)


@dataclass(frozen=True)
class Choice:
    """Two heads of the same size, and which of them is taken.

    Attributes:
        spec: The spec that is taken.
        projected: Divergence of the head with a projection from the old softmax, in nats; None if there is none.
        rotated: That of the head without.
    """

    spec: HeadSpec
    projected: float | None = None
    rotated: float | None = None


@torch.no_grad()
def choose_projection(
    spec: HeadSpec,
    weight: Tensor,
    bias: Tensor | None,
    features: Tensor,
    *,
    scale: float | None = None,
    on_progress: OnProgress = unwatched,
) -> Choice:
    """Choose between the signs of rotated features and those of a stored projection.

    Args:
        spec: A spec of kind "binary" with signs.
        weight: Weight of the old classifier, [C, N], or [C, N, 1, 1] of a 1x1 convolution.
        bias: Bias of the old classifier, [C].
        features: Inputs of the classifier, [S, N], in random order.
        scale: See `fixify.heads.replacement`.
        on_progress: See `fixify.heads.replacement`.

    Raises:
        HeadSpecError: See `fixify.heads.replacement`.
    """
    weight = weight.detach().to("cpu", torch.float32).reshape(spec.num_classes, spec.num_features)
    bias = None if bias is None else bias.detach().to("cpu", torch.float32)
    features = features.detach().to("cpu", torch.float32)
    projected = projected_spec(spec, weight, features)
    if projected is None or len(features) < 2:
        return Choice(spec)
    last = len(features) - max(1, len(features) // _CHECKED)

    def divergence(of: HeadSpec) -> float:
        made = replacement(of, weight, bias, features=features[:last], scale=scale, on_progress=on_progress)
        return _divergence(made.head.eval(), weight, bias, features[last:])

    found, other = divergence(projected), divergence(spec)
    return Choice(projected if found < other else spec, found, other)


def _divergence(head: FixedClassifier, weight: Tensor, bias: Tensor | None, features: Tensor) -> float:
    """Compute the Kullback-Leibler divergence from the old softmax, mean over samples [S, N], in nats."""
    total = 0.0
    for rows in features.split(max(1, _LOGITS_AT_ONCE // len(weight))):
        wanted = F.linear(rows, weight, bias).log_softmax(dim=1)
        total += float(F.kl_div(head(rows).log_softmax(dim=1), wanted, log_target=True, reduction="sum"))
    return total / len(features)
