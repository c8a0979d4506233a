"""Counting parameters and bytes: what a classifier costs, and what fixing it saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from fixify.errors import FormatError
from fixify.heads import choose_kind
from fixify.heads.matching import default_blocks
from fixify.models.classifiers import ClassifierSite


@dataclass(frozen=True)
class Savings:
    """What a conversion saved. Parameters are elements of `nn.Parameter`s; bytes are those of every stored tensor.

    Attributes:
        parameters_before: Parameters of the original model, for its own number of classes.
        parameters_after: Parameters of the fixed model (backbone, bias and scale).
        classifier_parameters: Weights and biases of the original's classifier layers.
        removed: Classifier weights that the slim checkpoint no longer holds.
        bytes_before: Bytes of the original's tensors (not of the file, which may hold an optimiser as well).
        bytes_after: Bytes of the slim checkpoint's tensors.
        classifier_bytes_before: Bytes of the original's classifier tensors.
        classifier_bytes_after: Bytes of the fixed head's tensors (scale, bias, center, spread, codes).
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"removed_share": self.removed_share}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Savings:
        """Read back what `to_dict` wrote.

        Raises:
            FormatError: a count is missing or is not a whole number.
        """
        counts: dict[str, int] = {}
        for field in fields(cls):
            value = values.get(field.name)
            if not isinstance(value, int):
                raise FormatError(f"The savings in the header lack a whole number for {field.name}.")
            counts[field.name] = value
        return cls(**counts)


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters; a parameter used twice counts once. Works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def under(tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """The entries of a state dict that belong to the module at `path`."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(f"{path}.")}


def classifier_weights(site: ClassifierSite) -> int:
    """Elements of the layer's weight, without its bias: what a codebook replaces."""
    return site.num_parameters - (site.num_classes if site.has_bias else 0)


def head_bytes(kind: str, num_features: int, num_classes: int, *, bias: bool = True) -> int:
    """Bytes of a head's tensors as `fixify convert` stores them: scale, bias, statistics, and the codes if any are.

    Of a Hadamard head that is the index of each class's code, of a binary one its signs; the other kinds follow from
    the head spec alone. A binary head has no statistics unless it is calibrated.
    """
    scale_and_bias = 4 * (1 + (num_classes if bias else 0))
    statistics = 0 if kind == "binary" else 8 * num_features + 8  # center, spread and the count of batches
    return scale_and_bias + statistics + _code_bytes(kind, num_features, num_classes) * num_classes


def _code_bytes(kind: str, num_features: int, num_classes: int) -> int:
    """Bytes stored for each class."""
    if kind == "hadamard":
        codes = 2 * num_features * default_blocks(num_features, num_classes)
        return 1 if codes <= 1 << 8 else 2 if codes <= 1 << 16 else 4
    if kind == "binary":  # a sign a feature, and the code's length
        return -(-num_features // 8) + 1
    return 0


def project(
    model: nn.Module, sites: Iterable[ClassifierSite], tensors: Mapping[str, torch.Tensor] | None = None
) -> Savings:
    """What `fixify convert` would save on a model, by arithmetic: no codebook is built, the meta device will do.

    Args:
        tensors: The model's state dict as it is stored, for its bytes; default: the model's own.
    """
    sites = list(sites)
    state = model.state_dict() if tensors is None else tensors
    parameters = count_parameters(model)
    total_bytes = count_bytes(state.values())
    old_parameters = sum(site.num_parameters for site in sites)
    old_bytes = sum(count_bytes(under(state, site.path).values()) for site in sites)
    new_parameters = sum(1 + site.num_classes for site in sites)
    new_bytes = sum(
        head_bytes(choose_kind(site.num_features, site.num_classes)[0], site.num_features, site.num_classes)
        for site in sites
    )
    return Savings(
        parameters_before=parameters,
        parameters_after=parameters - old_parameters + new_parameters,
        classifier_parameters=old_parameters,
        removed=sum(classifier_weights(site) for site in sites),
        bytes_before=total_bytes,
        bytes_after=total_bytes - old_bytes + new_bytes,
        classifier_bytes_before=old_bytes,
        classifier_bytes_after=new_bytes,
    )
