"""What every way of opening a checkpoint ends in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fixify.checkpoints.reference_code import ReferenceCodeHead, as_learned, find_reference_code_head
from fixify.errors import SourceError

# Elements looked at in one go by `check_finite`.
_CHUNK = 1 << 22
# Scalars that bound an activation and are infinite where there is no bound (timm's gemma4_vit).
_BOUNDS = ("_min", "_max")


@dataclass(frozen=True)
class Facts:
    """What a checkpoint, or a file beside it, says about the model. All of it hints, none of it checked."""

    architecture: str | None = None
    architecture_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    pretrained_cfg: dict[str, Any] | None = None
    labels: list[str] | None = None

    def or_else(self, other: Facts) -> Facts:
        """These facts, with what they leave open taken from `other`."""
        return Facts(
            architecture=self.architecture or other.architecture,
            architecture_kwargs=self.architecture_kwargs if self.architecture else other.architecture_kwargs,
            num_classes=self.num_classes or other.num_classes,
            pretrained_cfg=self.pretrained_cfg or other.pretrained_cfg,
            labels=self.labels or other.labels,
        )


@dataclass
class Source:
    """A checkpoint that was read: its weights under the library's key names, and what is known about them.

    Attributes:
        name: File name or model name; never a path of the machine.
        tensors: Weights in stored order and dtype, without the prefixes that wrappers add (`module.`, `_orig_mod.`,
            `model.`, ...). Memory-mapped where the file allows it; on the meta device if only the header was read.
        architecture: What the file or the name says it is, as `timm/resnet18` or `torchvision/resnet50`, or None.
        architecture_kwargs: Arguments the architecture was built with (`in_chans`, `img_size`, ...), plain values.
        num_classes: Number of classes as the file says it, or None.
        pretrained_cfg: Preprocessing as found, in timm's words (`input_size`, `mean`, `std`, `interpolation`, ...).
        labels: One label a class, in the order of the logits, or None.
        sha256: Of the file, 64 hexadecimal digits; None if only the header was read, or if there are several files.
        num_bytes: Size of the file or files.
        used_ema: The tensors are the moving average of the weights.
        has_ema: The file holds a moving average as well.
        dropped: Names of the entries that were left out: no tensors (`_extra_state`, counters), or not of the model.
    """

    name: str
    tensors: dict[str, Tensor]
    architecture: str | None = None
    architecture_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    pretrained_cfg: dict[str, Any] | None = None
    labels: list[str] | None = None
    sha256: str | None = None
    num_bytes: int | None = None
    used_ema: bool = False
    has_ema: bool = False
    dropped: tuple[str, ...] = ()

    @property
    def reference_code_head(self) -> ReferenceCodeHead | None:
        """Its classifier, if that is a fixed one of the paper's published code.

        Raises:
            SourceError: it does not tell how many classes it has.
        """
        return find_reference_code_head(self.tensors)

    @property
    def learned(self) -> dict[str, Tensor]:
        """The tensors; in the place of a published head those of a learned classifier, weights on the meta device."""
        return as_learned(self.tensors, self.reference_code_head)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in stored order, of `learned`: what an architecture is identified from."""
        return {name: tuple(tensor.shape) for name, tensor in self.learned.items()}

    @property
    def facts(self) -> Facts:
        """What the source says about the model."""
        return Facts(self.architecture, self.architecture_kwargs, self.num_classes, self.pretrained_cfg, self.labels)

    def with_facts(self, facts: Facts) -> Source:
        """This source, saying what `facts` say instead."""
        self.architecture = facts.architecture
        self.architecture_kwargs = facts.architecture_kwargs
        self.num_classes = facts.num_classes
        self.pretrained_cfg = facts.pretrained_cfg
        self.labels = facts.labels
        return self


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise `SourceError` naming the first tensor that holds a NaN or an infinity.

    Looks at a few million elements at a time, so that a memory-mapped file is streamed and never copied.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or (tensor.ndim == 0 and name.endswith(_BOUNDS) and bool(tensor.isinf())):
            continue
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            piece = flat[start : start + _CHUNK]
            least, most = torch.aminmax(piece)  # NaN if there is one, and ten times as fast as looking at each
            if not bool(least.isfinite() & most.isfinite()):
                first = start + int((~piece.isfinite()).nonzero()[0])
                raise SourceError(
                    f"The weights hold {float(flat[first])} in {name} (element {first} of {flat.numel()}): "
                    "training diverged, or the file is damaged.",
                    hint="Use an earlier checkpoint of the run.",
                )
