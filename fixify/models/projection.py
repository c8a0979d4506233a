"""Networks whose classifier stands behind a projection, as the zero-shot classifiers of CLIP do.

timm builds the image tower of a CLIP model with the projection to the embedding as its last linear layer. A classifier
of text embeddings takes the output of that layer. The projection keeps its names in the state dict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fixify.description import BEHIND_PROJECTION, Architecture
from fixify.errors import ArchitectureError
from fixify.models.architectures import build
from fixify.models.build import Bounds

# What the layers of timm raise for an input that they were not made for, or on the meta device.
_FORWARD_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError, AttributeError)


class ProjectedClassifier(nn.Linear):
    """A projection whose output goes to a classifier: `classifier(x @ weight.T + bias)`.

    Args:
        projection: The projection; its parameters are taken over, not copied.
        num_classes: Number of classes of the classifier, a `Linear` without bias until it is replaced.
    """

    classifier: nn.Module

    def __init__(self, projection: nn.Linear, num_classes: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = projection.in_features, projection.out_features
        self.weight, self.bias = projection.weight, projection.bias
        device, dtype = self.weight.device, self.weight.dtype
        self.classifier = nn.Linear(self.out_features, num_classes, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [..., C] of features [..., N]."""
        return self.classifier(super().forward(x))


def build_with(
    architecture: Architecture,
    num_classes: int,
    *,
    projection: str | None = None,
    width: int | None = None,
    meta: bool = False,
    blank: bool = False,
    within: Bounds | None = None,
) -> nn.Module:
    """Build a network with a classifier, in the place of its own or behind one of its layers.

    Args:
        architecture: The network.
        num_classes: Number of classes of the classifier.
        projection: The layer whose output the classifier takes; None to build the network with that many classes.
        width: Number of outputs of that layer.
        meta: See `fixify.models.architectures.build`.
        blank: See there.
        within: See there.

    Raises:
        ArchitectureError: The network cannot be built, or has no such linear layer.
    """
    if projection is None:
        return build(architecture, num_classes=num_classes, meta=meta, blank=blank, within=within)
    model = build(architecture, num_classes=width, meta=meta, blank=blank, within=within)
    put_classifier_behind_(model, projection, num_classes)
    return model


def put_classifier_behind_(model: nn.Module, projection: str, num_classes: int) -> None:
    """Put a classifier behind a layer of a network.

    Args:
        model: The network.
        projection: The layer, a `Linear`.
        num_classes: Number of classes.

    Raises:
        ArchitectureError: The network has no such linear layer.
    """
    layer = dict(model.named_modules()).get(projection)
    if type(layer) is not nn.Linear:
        raise ArchitectureError(
            f"{type(model).__name__} has no linear layer {projection[:200]} to put a classifier behind."
        )
    parent, _, name = projection.rpartition(".")
    setattr(model.get_submodule(parent), name, ProjectedClassifier(layer, num_classes))
    model.num_classes = num_classes  # type: ignore[assignment]


def behind(projection: str) -> str:
    """Return the path of the classifier behind a projection.

    >>> behind("head")
    'head.classifier'
    """
    return f"{projection}.{BEHIND_PROJECTION}"


def output_width(model: nn.Module, input_size: Sequence[int]) -> int | None:
    """Find out by a forward pass without values how wide the output of a network is.

    Args:
        model: The network, on the meta device.
        input_size: Channels, height and width.

    Returns:
        N if the output of one image is [1, N]; None if it is something else, or the network cannot be run there.
    """
    try:
        with torch.no_grad():
            made = model.eval()(torch.empty(1, *input_size, device="meta"))
    except _FORWARD_ERRORS:
        return None
    return int(made.shape[1]) if isinstance(made, Tensor) and made.ndim == 2 else None
