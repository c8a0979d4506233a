"""What a network without values shows: the shapes of its tensors, its parameters, and its classifier layers.

Importing this module needs neither torch nor timm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from fixify.catalogue.signature import Shape
from fixify.description import HeadRecord
from fixify.heads.spec import HeadSpec


@dataclass(frozen=True)
class ClassifierSite:
    """One classifier layer of a model.

    Attributes:
        path: Its name in `model.named_modules()`.
        layer_type: "Linear" or "Conv2d" (1x1), or the name of the subclass.
        num_features: Width of its input.
        num_classes: Width of its output.
        channel_dim: The dimension of its input that holds the features: -1 for a Linear, 1 for a Conv2d.
        num_parameters: Number of elements of its weight and bias.
        has_bias: Whether it has a bias.
    """

    path: str
    layer_type: str
    num_features: int
    num_classes: int
    channel_dim: int
    num_parameters: int
    has_bias: bool

    @classmethod
    def of_shapes(cls, path: str, layer_type: str, shapes: Mapping[str, Sequence[int]]) -> ClassifierSite:
        """Describe a Linear or a 1x1 convolution by the shapes in a state dict.

        >>> ClassifierSite.of_shapes("fc", "Linear", {"fc.weight": (10, 512), "fc.bias": (10,)}).num_parameters
        5130
        """
        weight, bias = shapes[f"{path}.weight"], shapes.get(f"{path}.bias")
        return cls(
            path=path,
            layer_type=layer_type,
            num_features=weight[1],
            num_classes=weight[0],
            channel_dim=1 if len(weight) == 4 else -1,
            num_parameters=prod(weight) + (0 if bias is None else prod(bias)),
            has_bias=bias is not None,
        )

    def record(self, spec: HeadSpec) -> HeadRecord:
        """Describe a fixed head that replaces this layer."""
        return HeadRecord(self.path, self.layer_type, self.channel_dim, spec)


@dataclass(frozen=True)
class Skeleton:
    """A network without values.

    Attributes:
        shapes: Name -> shape of each tensor in its state dict.
        floats: The names of those that hold floating-point numbers.
        num_parameters: Elements of all parameters, a shared parameter once.
        sites: Its classifier layers, in the order of its modules.
    """

    shapes: Mapping[str, Shape]
    floats: frozenset[str]
    num_parameters: int
    sites: tuple[ClassifierSite, ...]
