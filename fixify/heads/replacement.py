"""The head that takes a learned classifier's place: its codes are chosen by the weights that it replaces.

Not in the paper, whose codes are assigned in class order before training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fixify.errors import HeadSpecError
from fixify.heads.binary import GAIN_STEPS, encode
from fixify.heads.calibration import feature_statistics, fit_
from fixify.heads.matching import match
from fixify.heads.module import FixedClassifier
from fixify.heads.spec import HeadSpec

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Replacement:
    """A head in the place of a learned classifier.

    Attributes:
        head: Float32, on the CPU, in training mode.
        note: What its codes are, in a few words.
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
    """A `hadamard` head of matched codes, or a `binary` one of the classifier's signs.

    With features (no labels needed) codes are chosen by what the classifier sees, center and spread are set if the
    head has them, and scale and bias are fitted to the old answers; without them the bias is the old one.

    Args:
        spec: Of kind "hadamard" (it becomes a matched one) or "binary".
        weight: Of the old classifier, [C, N], or [C, N, 1, 1] of a 1x1 convolution.
        bias: Of the old classifier, [C].
        features: What the classifier is given, [S, N], in random order.
        scale: Alpha, which is then not fitted; default: `initial_scale`, or for signs where logits are the nearest.
        channel_dim: See `FixedClassifier`.

    Raises:
        HeadSpecError: A spec of another kind or size, no such codebook, weights that are not finite or of which all
            classes have the same, or features that do not fit.
    """
    c, n = spec.num_classes, spec.num_features
    if weight.numel() != c * n or len(weight) != c:
        raise HeadSpecError(f"A head of {c} classes and {n} features cannot replace a weight {list(weight.shape)}.")
    weight = weight.detach().to("cpu", torch.float32).reshape(c, n)
    bias = None if bias is None else bias.detach().to("cpu", torch.float32)
    if features is None:
        spec, stored, note = _choose_codes(spec, weight, None)
    else:
        features = features.detach().to("cpu", torch.float32)
        if features.ndim != 2 or features.shape[1] != n:
            raise HeadSpecError(f"Features are given as [samples, {n}], got shape {list(features.shape)}.")
        statistics = feature_statistics(features, standardize=spec.standardize)
        spec, stored, note = _choose_codes(spec, weight * statistics.spread, statistics.covariance)
    if scale is not None:
        stored["scale"] = scale
    with torch.device("cpu"):
        head = FixedClassifier(spec, **stored, channel_dim=channel_dim)
    if features is not None:
        if spec.standardize:
            head.calibrate_(features.split(_ROWS_AT_ONCE))
        fit_(head, features, weight, bias, fit_scale=scale is None)
    elif head.bias is not None and bias is not None:
        with torch.no_grad():
            head.bias.copy_(bias)
    return Replacement(head, note)


def _choose_codes(
    spec: HeadSpec, class_vectors: Tensor, covariance: Tensor | None
) -> tuple[HeadSpec, dict[str, Any], str]:
    """The codes for some class vectors, as the head's features have them (covariance: of those features).

    Returns:
        The spec, what `FixedClassifier` is given beside it, and what to tell.
    """
    if spec.kind == "hadamard":
        found = match(class_vectors, seed=spec.seed, blocks=spec.blocks, feature_covariance=covariance)
        note = f"codes matched to the old class vectors, mean cosine {found.mean_correlation:.2f}"
        return replace(spec, matched=True, blocks=found.blocks), {"codes": torch.from_numpy(found.codes)}, note
    if spec.kind != "binary":
        raise HeadSpecError(
            f"The codes of head {spec.kind!r} cannot be chosen by an old classifier.",
            hint="Those of hadamard and binary can.",
        )
    signs = encode(spec, class_vectors, feature_moment=covariance)
    stored: dict[str, Any] = {"codes": torch.from_numpy(signs.codes), "scale": signs.scale}
    if spec.gains:
        stored["gains"] = torch.from_numpy(signs.gains)
    else:  # one length for all: the mean of what each would have had
        stored["scale"] *= float(signs.gains.mean()) / GAIN_STEPS
    return spec, stored, f"{spec.bits_per_class} signs a class taken from the old classifier"
