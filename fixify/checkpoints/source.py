"""The result of opening a checkpoint: its tensors, and what is known about the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fixify.checkpoints.extras import Extras
from fixify.checkpoints.outline import AnyTensor, dtype_name
from fixify.checkpoints.reference_code import ReferenceCodeHead, as_learned, find_reference_code_head
from fixify.errors import SourceError

# Number of elements that `check_finite` looks at in one step.
_CHUNK = 1 << 22
# The largest absolute value of a weight.
_LARGEST = 1e18
# Scalars that bound an activation, and are infinite if there is no bound (timm's gemma4_vit).
_BOUNDS = ("_min", "_max")


@dataclass(frozen=True)
class Facts:
    """What a checkpoint, or a file beside it, says about the model. These are hints; none has been checked.

    Attributes:
        architecture: `timm/resnet18` or `torchvision/resnet50`, or None.
        architecture_kwargs: Arguments that the architecture was built with (`in_chans`, `img_size`, ...), plain values.
        num_classes: Number of classes, or None.
        pretrained_cfg: Preprocessing with timm's names (`input_size`, `mean`, `std`, `interpolation`, ...), or None.
        labels: One label per class, in the order of the logits, or None.
        label_lists: Every list of labels that a training checkpoint holds, by the name of its place (`class_to_idx`,
            `meta.CLASSES`), the most certain first.
        unread: Places of that kind whose values are not understood.
        global_pool: timm's name of the pooling that the file says it was trained with, or None.
    """

    architecture: str | None = None
    architecture_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    pretrained_cfg: dict[str, Any] | None = None
    labels: list[str] | None = None
    label_lists: Mapping[str, list[str]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    global_pool: str | None = None

    def or_else(self, other: Facts) -> Facts:
        """Return these facts, completed from `other`.

        >>> Facts(num_classes=3).or_else(Facts("timm/resnet18", num_classes=1000)).num_classes
        3
        """
        return Facts(
            architecture=self.architecture or other.architecture,
            architecture_kwargs=self.architecture_kwargs if self.architecture else other.architecture_kwargs,
            num_classes=self.num_classes or other.num_classes,
            pretrained_cfg=self.pretrained_cfg or other.pretrained_cfg,
            labels=self.labels or other.labels,
            label_lists={**self.label_lists, **other.label_lists},
            unread=(*self.unread, *other.unread),
            global_pool=self.global_pool or other.global_pool,
        )


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read.

    Attributes:
        name: File name or model name; never a path of the machine.
        tensors: Weights in stored order and dtype, without the prefixes that wrappers add (`module.`, `_orig_mod.`,
            `model.`, ...). Memory-mapped where the file allows it; outlines if only the header was read.
        facts: What the checkpoint says about the model.
        sha256: SHA-256 of the file, 64 hexadecimal digits; None if only the header was read or there are several files.
        num_bytes: Size of the file or files.
        used_ema: Whether the tensors are the moving average of the weights.
        has_ema: Whether the file also holds a moving average.
        dropped: Names of the entries that were left out because they are not tensors (`_extra_state`), are counters, or
            do not belong to the model.
        beside: What else the file holds of tensors, and is not read, in words.
        extras: What was applied of the tensors that the network itself does not have.
        class_lists: Files beside the checkpoint that may hold class names; they are not read without being named.
        joined: The two keys of the file whose state dicts were put together, or None.
    """

    name: str
    tensors: dict[str, AnyTensor]
    facts: Facts = Facts()
    sha256: str | None = None
    num_bytes: int | None = None
    used_ema: bool = False
    has_ema: bool = False
    dropped: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    extras: Extras = field(default_factory=Extras)
    class_lists: tuple[Path, ...] = ()
    joined: tuple[str, str] | None = None

    @property
    def reference_code_head(self) -> ReferenceCodeHead | None:
        """Its classifier, if that is a fixed one of the paper's reference code.

        Raises:
            SourceError: the head does not show how many classes it has.
        """
        return find_reference_code_head(self.tensors)

    @property
    def learned(self) -> dict[str, AnyTensor]:
        """The tensors, with a head of the reference code replaced by a learned classifier (weights as an outline)."""
        return as_learned(self.tensors, self.reference_code_head)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of `learned`, in stored order; an architecture is identified from these."""
        return {name: tuple(tensor.shape) for name, tensor in self.learned.items()}


def check_finite(tensors: Mapping[str, AnyTensor]) -> None:
    """Raise `SourceError` that names the first tensor with a NaN, an infinity, or a value that no weight has.

    A weight beyond 1e18 overflows when it is squared, and a variance is not negative. A few million elements are
    checked at a time, so a memory-mapped file is streamed and never copied.

    >>> import torch
    >>> check_finite({"weight": torch.ones(3)})
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or (tensor.ndim == 0 and name.endswith(_BOUNDS) and bool(tensor.isinf())):
            continue
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            piece = flat[start : start + _CHUNK]
            # aminmax returns NaN if there is one, and is ten times as fast as testing each element.
            least, most = piece.aminmax()
            if name.endswith("running_var") and bool(least < 0):
                raise SourceError(
                    f"The weights hold a negative variance, {float(least):g}, in {name}: the file is damaged.",
                    hint="Use an earlier checkpoint of the run.",
                )
            if bool(least.isfinite() & most.isfinite()) and max(-float(least), float(most)) > _LARGEST:
                raise SourceError(
                    f"The weights hold {float(max(-least, most)):g} in {name}, which is beyond any weight: training "
                    "diverged, or the file is damaged.",
                    hint="Use an earlier checkpoint of the run.",
                )
            if not bool(least.isfinite() & most.isfinite()):
                first = start + int((~piece.isfinite()).nonzero()[0])
                raise SourceError(
                    f"The weights hold {float(flat[first])} in {name} (element {first} of {flat.numel()}): "
                    "training diverged, or the file is damaged.",
                    hint="Use an earlier checkpoint of the run.",
                )


def refuse_integers(name: str, tensors: Mapping[str, AnyTensor], floats: Collection[str]) -> None:
    """Refuse integers where the architecture has floating point: quantised weights without their scales.

    Args:
        name: The file's name, for messages.
        tensors: The tensors of a file, under the architecture's names.
        floats: The names of those in which the architecture has floating point.

    Raises:
        SourceError: there are such integers.
    """
    for key, tensor in tensors.items():
        if key in floats and not tensor.is_floating_point():
            raise SourceError(
                f"{name} stores {key} as {dtype_name(tensor)}, where the architecture has "
                "floating point: quantised weights without their scales.",
                hint="Give the checkpoint from before quantisation, or dequantise it: module.weight.dequantize()",
            )
