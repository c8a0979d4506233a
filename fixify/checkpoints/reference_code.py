"""Checkpoints of the paper's published code, whose classifier is fixed already and whose weights are not in the file.

github.com/eladhoffer/fix_your_classifier (fixed_proj.py; the same in its author's convNet.pytorch) has two layers that
take the place of `nn.Linear`. Their matrix is a plain attribute, no buffer, so a state dict holds of

- `HadamardProj`: `scale` [1] (unless it is fixed) and `bias` [C]. What it computes: see `fixify.heads.kinds`.
- `Proj`, random orthogonal: `weight` [1], which is its scale, and `bias` [C]. Its matrix comes from
  `torch.manual_seed(123)` and torch's initialisation.

A layer that was made to save its matrix has it as `proj` besides. No architecture of timm, torchvision or fixify has a
module with these names and shapes (all 1,450 were looked through).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixify.errors import SourceError
from fixify.heads import REFERENCE_CONSTRUCTION, HeadSpec, codebook

_NEW_HEAD = "--head hadamard puts a new head on its backbone, for which the network then has to be trained."


@dataclass(frozen=True)
class ReferenceCodeHead:
    """The classifier layer of such a checkpoint.

    Attributes:
        path: Its name in the file.
        num_classes: C, of its bias.
        num_features: N, taken from the tensor before it; what the architecture says counts more.
        scale_name: "scale" (Hadamard), "weight" (random orthogonal), or None if it stores none.
        matrix: The projection matrix, if it was saved.
        dtype: Of its bias.
    """

    path: str
    num_classes: int
    num_features: int
    scale_name: str | None
    matrix: Tensor | None
    dtype: torch.dtype

    @property
    def weight_key(self) -> str:
        """What the weights of a learned classifier in its place are called."""
        return f"{self.path}.weight"

    def placeholder(self) -> Tensor:
        """Such weights, [C, N] on the meta device: a shape and a type."""
        return torch.empty(self.num_classes, self.num_features, dtype=self.dtype, device="meta")

    def spec(self, num_features: int, *, fixed_scale: bool = False) -> HeadSpec:
        """The head spec from which it can be rebuilt.

        Args:
            num_features: Width of its input, as the architecture has it.
            fixed_scale: See `HeadSpec`.

        Raises:
            SourceError: its codes or its scale are not to be had.
            HeadSpecError: two classes have the same code.
        """
        if self.scale_name != "scale" and self.matrix is None:
            raise self._without_matrix()
        if self.scale_name != "weight":
            spec = HeadSpec(
                "hadamard", num_features, self.num_classes, fixed_scale=fixed_scale, construction=REFERENCE_CONSTRUCTION
            )
            if self.matrix is None or _is_hadamard(self.matrix, spec):
                if self.scale_name is not None:
                    return spec.resolve()
                raise SourceError(
                    f"{self.path} has no scale: the paper's published code leaves a fixed one out of its checkpoints.",
                    hint=f"If it was fixed_scale=S: {self._add_scale()}",
                )
        shape = [] if self.matrix is None else list(self.matrix.shape)
        raise SourceError(
            f"{self.path}.proj is a projection matrix of its own, {shape}: no seed gives it back, and a slim "
            "checkpoint stores no matrix.",
            hint=_NEW_HEAD,
        )

    def _without_matrix(self) -> SourceError:
        if self.scale_name == "weight":
            return SourceError(
                f"{self.path} is the random orthogonal classifier of the paper's published code. Its matrix is not in "
                "the file: torch drew it from seed 123, and another version of torch may draw another.",
                hint=_NEW_HEAD,
            )
        return SourceError(
            f"{self.path} has a bias and nothing else: the paper's published code leaves a scale that is fixed out of "
            "its checkpoints, and a random orthogonal matrix too.",
            hint=f"If it was HadamardProj with fixed_scale=S: {self._add_scale()} Otherwise {_NEW_HEAD}",
        )

    def _add_scale(self) -> str:
        return f"add state['{self.path}.scale'] = torch.tensor([S]) to the state dict."


def find_reference_code_head(tensors: Mapping[str, Tensor]) -> ReferenceCodeHead | None:
    """The classifier layer of the paper's published code in a state dict, if there is one.

    Raises:
        SourceError: there is one without a bias, which alone says how many classes it has.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        modules.setdefault(path, {})[name] = tensor
    last = next(reversed(modules), "")
    found = [path for path, own in modules.items() if path and _is_head(own, is_last=path == last)]
    if len(found) != 1:
        return None
    path, own = found[0], modules[found[0]]
    if "bias" not in own:
        raise SourceError(
            f"{path} has a scale and no bias, so that the number of its classes is not in the file.",
            hint=f"Add a bias of zeros to the state dict: state['{path}.bias'] = torch.zeros(C) for C classes",
        )
    keys = list(tensors)
    before = [tensors[key] for key in keys[: min(keys.index(f"{path}.{name}") for name in own)]]
    widths = [tensor.shape[0] for tensor in before if tensor.ndim and tensor.is_floating_point()]
    return ReferenceCodeHead(
        path=path,
        num_classes=own["bias"].shape[0],
        num_features=widths[-1] if widths else 0,
        scale_name=next((name for name in ("scale", "weight") if name in own), None),
        matrix=own.get("proj"),
        dtype=own["bias"].dtype,
    )


def as_learned(tensors: Mapping[str, Tensor], head: ReferenceCodeHead | None) -> dict[str, Tensor]:
    """The tensors as they would be with a learned classifier, whose weights are on the meta device."""
    if head is None:
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key == f"{head.path}.bias":
            found[head.weight_key] = head.placeholder()
        elif key.startswith(f"{head.path}."):
            continue
        found[key] = tensor
    return found


def _is_head(own: Mapping[str, Tensor], *, is_last: bool) -> bool:
    names, bias = set(own), own.get("bias")
    scales = names & {"scale", "weight"}
    if (
        len(scales) > 1
        or names - {"scale", "weight", "bias", "proj"}
        or any(own[name].shape != (1,) for name in scales)
    ):
        return False
    if "proj" in names and own["proj"].ndim != 2:
        return False
    if bias is None:  # activations with a scale have none either; the classifier is what comes last
        return "scale" in names and is_last
    return bias.ndim == 1 and len(bias) > 1


def _is_hadamard(matrix: Tensor, spec: HeadSpec) -> bool:
    """Whether a matrix is the one that follows from the sizes; of a header alone, whether it can be."""
    if matrix.is_meta:
        rows, columns = matrix.shape
        return rows == columns == 1 << (rows - 1).bit_length()
    corner = matrix[: spec.num_classes, : spec.num_features].double()
    return torch.equal(corner, torch.from_numpy(-np.sign(codebook(spec))).double())
