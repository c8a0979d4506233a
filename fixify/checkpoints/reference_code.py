"""Recognise checkpoints of the paper's reference code, whose classifier is fixed and has no weights in the file.

The reference code is what the paper's authors published: github.com/eladhoffer/fix_your_classifier (fixed_proj.py; the
same file is in the author's convNet.pytorch). Two of its layers replace `nn.Linear`. Their matrix is a plain attribute
and not a buffer, so a state dict holds only

- of `HadamardProj`: `scale` [1] (unless it is fixed) and `bias` [C] (see `fixify.heads.kinds`);
- of `Proj` (random orthogonal): `weight` [1], which is its scale, and `bias` [C]; its matrix comes from
  `torch.manual_seed(123)` and torch's initialisation.

A layer that was changed to save its matrix has it as `proj`. No architecture of timm, torchvision or fixify has a
module with these names and shapes (all 1,450 were checked).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fixify.checkpoints.outline import AnyTensor, Outline, dtype_name
from fixify.errors import SourceError
from fixify.heads import REFERENCE_CONSTRUCTION, HeadSpec, codebook

_NEW_HEAD = "--head hadamard puts a new head on its backbone; the network must then be trained with it."


@dataclass(frozen=True)
class ReferenceCodeHead:
    """The classifier layer of such a checkpoint.

    Attributes:
        path: Its name in the file.
        num_classes: C, the length of its bias.
        num_features: N, taken from the tensor before it. The architecture's own number takes precedence.
        scale_name: "scale" (Hadamard), "weight" (random orthogonal), or None if no scale is stored.
        matrix: The projection matrix if it was saved, else None.
        dtype: torch's name of the type of its bias.
    """

    path: str
    num_classes: int
    num_features: int
    scale_name: str | None
    matrix: AnyTensor | None
    dtype: str

    @property
    def weight_key(self) -> str:
        """The name that the weights of a learned classifier in its place would have."""
        return f"{self.path}.weight"

    def placeholder(self) -> Outline:
        """Describe such weights, [C, N]: a shape and a dtype without values."""
        return Outline(self.dtype, (self.num_classes, self.num_features))

    def spec(self, num_features: int, *, fixed_scale: bool = False) -> HeadSpec:
        """Return the head spec from which it can be rebuilt.

        Args:
            num_features: Width of its input in the architecture.
            fixed_scale: See `HeadSpec`.

        Raises:
            SourceError: its codes or its scale are unknown.
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
                    f"{self.path} has no scale: the paper's published code does not save a fixed scale.",
                    hint=f"If it was made with fixed_scale=S, {self._add_scale()}",
                )
        shape = [] if self.matrix is None else list(self.matrix.shape)
        raise SourceError(
            f"{self.path}.proj is a projection matrix of its own, {shape}. No seed reproduces it, and a slim "
            "checkpoint stores no matrix.",
            hint=_NEW_HEAD,
        )

    def _without_matrix(self) -> SourceError:
        if self.scale_name == "weight":
            return SourceError(
                f"{self.path} is the random orthogonal classifier of the paper's published code. Its matrix is not in "
                "the file: torch drew it from seed 123, and another version of torch may draw a different one.",
                hint=_NEW_HEAD,
            )
        return SourceError(
            f"{self.path} has a bias and nothing else: the paper's published code saves neither a fixed scale nor a "
            "random orthogonal matrix.",
            hint=f"If it was HadamardProj with fixed_scale=S, {self._add_scale()} Otherwise, {_NEW_HEAD}",
        )

    def _add_scale(self) -> str:
        return f"add state['{self.path}.scale'] = torch.tensor([S]) to the state dict."


def find_reference_code_head(tensors: Mapping[str, AnyTensor]) -> ReferenceCodeHead | None:
    """Find the classifier layer of the reference code in a state dict; None if there is none.

    Raises:
        SourceError: there is one without a bias, so its number of classes is unknown.

    >>> import torch
    >>> find_reference_code_head({"fc.scale": torch.ones(1), "fc.bias": torch.zeros(10)}).num_classes
    10
    """
    modules: dict[str, dict[str, AnyTensor]] = {}
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
            f"{path} has a scale and no bias, so its number of classes is not in the file.",
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
        dtype=dtype_name(own["bias"]),
    )


def as_learned(tensors: Mapping[str, AnyTensor], head: ReferenceCodeHead | None) -> dict[str, AnyTensor]:
    """Replace a head of the reference code by a learned classifier whose weights have no values."""
    if head is None:
        return dict(tensors)
    found: dict[str, AnyTensor] = {}
    for key, tensor in tensors.items():
        if key == f"{head.path}.bias":
            found[head.weight_key] = head.placeholder()
        elif key.startswith(f"{head.path}."):
            continue
        found[key] = tensor
    return found


def _is_head(own: Mapping[str, AnyTensor], *, is_last: bool) -> bool:
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
    if bias is None:  # activations with a scale have no bias either; only the last module is a classifier
        return "scale" in names and is_last
    return bias.ndim == 1 and len(bias) > 1


def _is_hadamard(matrix: AnyTensor, spec: HeadSpec) -> bool:
    """Check that a matrix is the Hadamard matrix of its size; on the meta device, check only its shape."""
    if matrix.is_meta:
        rows, columns = matrix.shape
        return rows == columns == 1 << (rows - 1).bit_length()
    import torch

    corner = matrix[: spec.num_classes, : spec.num_features].double()
    return torch.equal(corner, torch.from_numpy(-np.sign(codebook(spec))).double())
