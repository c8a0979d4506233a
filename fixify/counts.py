"""Counting parameters and bytes: what a classifier costs, and what fixing it saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn


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


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters; a parameter used twice counts once. Works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def under(tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """The entries of a state dict that belong to the module at `path`."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(f"{path}.")}
