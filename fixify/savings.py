"""Count parameters and bytes: what a classifier costs, and what a fixed head saves.

Importing this module needs no torch, so that printing counts from the header of a file is quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fixify.catalogue.skeleton import ClassifierSite
from fixify.errors import FormatError
from fixify.heads.kinds import KINDS
from fixify.heads.spec import choose_kind

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fixify.heads import FixedClassifier

T = TypeVar("T")


class Sized(Protocol):
    """What is asked of a tensor here."""

    def numel(self) -> int:
        """Count its elements."""

    def element_size(self) -> int:
        """Return the bytes of an element."""


@dataclass(frozen=True)
class Savings:
    """Parameters and bytes of a model before and after its classifier was replaced.

    Parameters are elements of `nn.Parameter`s. Bytes are those of every stored tensor.

    Attributes:
        parameters_before: Parameters of the original model, with its own number of classes.
        parameters_after: Parameters of the fixed model (backbone, bias and scale).
        classifier_parameters: Weights and biases of the original's classifier layers.
        removed: Classifier weights that the slim checkpoint no longer holds.
        bytes_before: Bytes of the original's tensors. Its file may be larger, if it holds an optimiser as well.
        bytes_after: Bytes of the slim checkpoint's tensors.
        classifier_bytes_before: Bytes of the original's classifier tensors.
        classifier_bytes_after: Bytes of the fixed head's tensors (scale, bias, mean, std, codes).
    """

    parameters_before: int
    parameters_after: int
    classifier_parameters: int
    removed: int
    bytes_before: int
    bytes_after: int
    classifier_bytes_before: int
    classifier_bytes_after: int

    @property
    def removed_share(self) -> float:
        """Removed weights as a share (0 to 1) of the original's parameters."""
        return self.removed / self.parameters_before

    @classmethod
    def measure(
        cls,
        original: nn.Module,
        sites: Sequence[ClassifierSite],
        *,
        learned: Mapping[str, torch.Tensor],
        backbone: Mapping[str, torch.Tensor],
        heads: Iterable[FixedClassifier],
    ) -> Savings:
        """Count what fixed heads save.

        Args:
            original: The model with its learned classifier; the meta device is enough.
            sites: Its classifier layers.
            learned: The original's state dict in the types in which it is stored.
            backbone: The tensors that the slim checkpoint keeps, without those of the heads.
            heads: The fixed heads.
        """
        made = list(heads)
        return cls._of_changes(
            count_parameters(original),
            sites,
            learned,
            backbone_bytes=count_bytes(backbone.values()),
            head_parameters=sum(count_parameters(head) for head in made),
            head_bytes=sum(count_bytes(head.state_dict().values()) for head in made),
        )

    @classmethod
    def of_bare(cls, head: FixedClassifier, *, has_bias: bool, stored_bytes: int | None = None) -> Savings:
        """Count what a fixed head saves that replaces a classifier without a network.

        Args:
            head: The fixed head.
            has_bias: Whether the old classifier had a bias.
            stored_bytes: Bytes of the old classifier as it was stored; None: in float32.
        """
        removed = head.out_features * head.in_features
        parameters = removed + (head.out_features if has_bias else 0)
        before = 4 * parameters if stored_bytes is None else stored_bytes
        after = count_bytes(head.state_dict().values())
        return cls(parameters, count_parameters(head), parameters, removed, before, after, before, after)

    @classmethod
    def project(
        cls,
        num_parameters: int,
        sites: Sequence[ClassifierSite],
        learned: Mapping[str, Sized],
    ) -> Savings:
        """Calculate what `fixify convert` would save with its defaults, without building a head.

        Args:
            num_parameters: Parameters of the model with its learned classifier.
            sites: Its classifier layers.
            learned: Its state dict as it is stored; tensors without values are enough.
        """
        sizes = [(site.num_features, site.num_classes) for site in sites]
        return cls._of_changes(
            num_parameters,
            sites,
            learned,
            backbone_bytes=count_bytes(learned.values()) - _classifier_bytes(learned, sites),
            head_parameters=sum(1 + num_classes for _, num_classes in sizes),
            head_bytes=sum(KINDS[choose_kind(*size)[0]].planned_bytes(*size) for size in sizes),
        )

    @classmethod
    def _of_changes(
        cls,
        parameters: int,
        sites: Sequence[ClassifierSite],
        learned: Mapping[str, Sized],
        *,
        backbone_bytes: int,
        head_parameters: int,
        head_bytes: int,
    ) -> Savings:
        classifier = sum(site.num_parameters for site in sites)
        return cls(
            parameters_before=parameters,
            parameters_after=parameters - classifier + head_parameters,
            classifier_parameters=classifier,
            removed=sum(classifier_weights(site) for site in sites),
            bytes_before=count_bytes(learned.values()),
            bytes_after=backbone_bytes + head_bytes,
            classifier_bytes_before=_classifier_bytes(learned, sites),
            classifier_bytes_after=head_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and `removed_share` as plain values for JSON."""
        return asdict(self) | {"removed_share": self.removed_share}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Savings:
        """Read what `to_dict` wrote.

        Raises:
            FormatError: A count is missing or is not a whole number.
        """
        counts: dict[str, int] = {}
        for field in fields(cls):
            value = values.get(field.name)
            if not isinstance(value, int):
                raise FormatError(f"The savings in the header lack a whole number for {field.name}.")
            counts[field.name] = value
        return cls(**counts)


def count_parameters(model: nn.Module) -> int:
    """Count the elements of all parameters, a shared parameter once. The meta device is enough.

    >>> from torch import nn
    >>> count_parameters(nn.Linear(4, 3))
    15
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(tensors: Iterable[Sized]) -> int:
    """Count the bytes of the elements of some tensors; tensors without values are enough."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def under(tensors: Mapping[str, T], path: str) -> dict[str, T]:
    """Return the entries of a state dict that belong to the module at `path`."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(f"{path}.")}


def classifier_weights(site: ClassifierSite) -> int:
    """Count the elements of a classifier layer's weight, without its bias: what a codebook replaces."""
    return site.num_parameters - (site.num_classes if site.has_bias else 0)


def _classifier_bytes(tensors: Mapping[str, Sized], sites: Sequence[ClassifierSite]) -> int:
    return sum(count_bytes(under(tensors, site.path).values()) for site in sites)
