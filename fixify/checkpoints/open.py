"""Open any checkpoint, slim or ordinary, as a model with its preprocessing and class names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fixify._files import unchanged
from fixify.checkpoints.beside import class_lists_beside, remark_on_class_lists
from fixify.checkpoints.header import is_onnx
from fixify.checkpoints.learned import Original, read_original
from fixify.checkpoints.locate import find_slim, locate_slim, short_name
from fixify.checkpoints.onnx_file import open_onnx
from fixify.checkpoints.slim import (
    Origin,
    SlimInfo,
    load,
    main_dtype,
    source_record,
)
from fixify.checkpoints.source import check_finite
from fixify.description import BARE_PATH
from fixify.errors import FormatError, SourceError
from fixify.heads import FixedClassifier
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
        slim: The header of a slim checkpoint, or of one that was exported to ONNX; None for an ordinary one.
        notes: How an ordinary checkpoint was recognised, and what was read of it and what was left out, for the user.
    """

    name: str
    model: nn.Module
    architecture: Architecture
    num_classes: int
    preprocessing: Preprocessing
    labels: list[str] | None
    slim: SlimInfo | None
    notes: tuple[str, ...] = ()


def open_model(ref: str | Path, *, arch: str | None = None, ema: bool = False) -> OpenModel:
    """Open a slim checkpoint, an ordinary checkpoint, an ONNX file of `fixify.export`, or a model by its name.

    Args:
        ref: A file, a folder, a repository of the Hugging Face hub (`hf-hub:organisation/name`), or a model name.
        arch: The architecture of an ordinary checkpoint, if the file does not show it.
        ema: Read the moving average of the weights of a training checkpoint.

    Raises:
        FormatError, CodebookMismatchError: a slim checkpoint is damaged, or an ONNX file was not written by fixify.
        UsageError: an ONNX file does not return the logits of all classes, or onnxruntime is not installed.
        SourceError: the weights hold a NaN or an infinity; the model has one logit, which is no probability of a class;
            or see `fixify.checkpoints.learned.read_original`.
        ArchitectureError, NoClassifierError: see `fixify.checkpoints.learned.read_original`.
    """
    slim = find_slim(ref)
    if slim is not None:
        model = load(slim, check=True)
        if isinstance(model, FixedClassifier):
            raise SourceError(
                f"{short_name(ref)} is a classifier without a network: it takes features, not images.",
                hint="Put its matrix onto a network: fixify convert MODEL --classifier FILE. Or use it in Python: "
                "fixify.load",
            )
        check_finite(model.state_dict())
        return _opened(short_name(ref), slim, model, model.fixify_info)  # type: ignore[arg-type]
    if is_onnx(ref):
        with unchanged(Path(ref), FormatError):
            info, model = open_onnx(ref)
        return _opened(Path(ref).name, Path(ref), model, info)
    original: Original = read_original(ref, arch=arch, ema=ema)
    check_finite(original.tensors)
    _refuse_one_logit(original.source.name, original.num_classes)
    made = original.model()
    made.fixify_origin = Origin(  # type: ignore[assignment]
        original.architecture,
        original.preprocessing,
        original.labels,
        source_record(original.source),
        main_dtype(original.tensors),
    )
    return OpenModel(
        name=original.source.name,
        model=made,
        architecture=original.architecture,
        num_classes=original.num_classes,
        preprocessing=original.preprocessing,
        labels=original.labels,
        slim=None,
        notes=original.notes,
    )


def open_bare(path: Path | str) -> OpenModel:
    """Open a slim classifier without a network. The model is a dictionary of modules with the classifier in it.

    Raises:
        FormatError, CodebookMismatchError: the file is damaged.
        SourceError: it holds a NaN or an infinity, or a repository of the Hugging Face hub cannot be read.
    """
    name, path = short_name(path), locate_slim(path)
    head = load(path, check=True)
    check_finite(head.state_dict())
    return _opened(name, path, nn.ModuleDict({BARE_PATH: head}), head.fixify_info)  # type: ignore[arg-type]


def _opened(name: str, path: Path, model: nn.Module, info: SlimInfo) -> OpenModel:
    _refuse_one_logit(name, info.num_classes)
    remark = None
    if info.labels is None:
        remark = remark_on_class_lists(class_lists_beside(path), info.num_classes)
    return OpenModel(
        name=name,
        model=model,
        architecture=info.architecture,
        num_classes=info.num_classes,
        preprocessing=info.data_config,
        labels=info.labels,
        slim=info,
        notes=() if remark is None else (remark,),
    )


def _refuse_one_logit(name: str, num_classes: int) -> None:
    """Refuse a model whose softmax is 1 for every image."""
    if num_classes == 1:
        raise SourceError(
            f"{name} has one logit. Its answer is a sigmoid or a number, and fixify compares classes.",
            hint="If it tells two classes apart, give both a logit: "
            "weight = torch.cat([torch.zeros_like(weight), weight]), and the same for the bias.",
        )
