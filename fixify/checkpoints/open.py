"""Open any checkpoint, slim or ordinary, as a model with its preprocessing and class names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fixify._files import unchanged
from fixify.checkpoints.learned import Original, read_original
from fixify.checkpoints.slim import (
    Origin,
    SlimInfo,
    is_slim,
    load_contents,
    main_dtype,
    read_contents,
    source_record,
)
from fixify.checkpoints.source import check_finite
from fixify.errors import FormatError
from fixify.models.architectures import Architecture, Preprocessing


@dataclass(frozen=True)
class OpenModel:
    """A model in eval mode on the CPU, in float32.

    Attributes:
        name: The name of the file or model, without folders.
        model: The model.
        architecture: Its architecture.
        num_classes: Width of its logits.
        preprocessing: timm's names and plain values: input_size, mean, std, interpolation, crop_pct, crop_mode.
        labels: Class names, or None.
        slim: The header of a slim checkpoint; None for an ordinary one.
    """

    name: str
    model: nn.Module
    architecture: Architecture
    num_classes: int
    preprocessing: Preprocessing
    labels: list[str] | None
    slim: SlimInfo | None


def open_model(ref: str | Path, *, arch: str | None = None, ema: bool = False) -> OpenModel:
    """Open a slim checkpoint, an ordinary checkpoint, or a model by its name.

    Args:
        ref: A file, a folder, or a model name.
        arch: The architecture of an ordinary checkpoint, if the file does not show it.
        ema: Read the moving average of the weights of a training checkpoint.

    Raises:
        FormatError, CodebookMismatchError: a slim checkpoint is damaged.
        SourceError: the weights hold a NaN or an infinity, or see `fixify.checkpoints.learned.read_original`.
        ArchitectureError, NoClassifierError: see `fixify.checkpoints.learned.read_original`.
    """
    if is_slim(ref):
        with unchanged(Path(ref), FormatError):
            contents = read_contents(ref)
            check_finite(contents.tensors)
            contents.check_digest(ref)
            model = load_contents(contents, ref)
        info: SlimInfo = model.fixify_info  # type: ignore[assignment]
        return OpenModel(
            name=Path(ref).name,
            model=model,
            architecture=info.architecture,
            num_classes=info.num_classes,
            preprocessing=info.data_config,
            labels=info.labels,
            slim=info,
        )
    original: Original = read_original(ref, arch=arch, ema=ema)
    check_finite(original.tensors)
    model = original.model()
    model.fixify_origin = Origin(  # type: ignore[assignment]
        original.architecture,
        original.preprocessing,
        original.labels,
        source_record(original.source),
        main_dtype(original.tensors),
    )
    return OpenModel(
        name=original.source.name,
        model=model,
        architecture=original.architecture,
        num_classes=original.num_classes,
        preprocessing=original.preprocessing,
        labels=original.labels,
        slim=None,
    )
