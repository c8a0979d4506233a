"""The slim checkpoint, format version 1: reading, writing, loading, saving.

A slim checkpoint is an ordinary `.safetensors` file. Its tensors are the backbone under its library's own key names
and, below the classifier's path, `scale`, `bias`, `center`, `spread`, `num_batches_tracked`, `codes` and `gains` as far
as the head has them. Its metadata holds `format: "pt"`, `fixify.version` and, under `fixify`, one JSON object:
`SlimInfo`. The codebook is not in the file: it is rebuilt from the head spec and its digest is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_serializer, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fixify._files import atomic_path, refuse_existing
from fixify.checkpoints.files import LANGUAGE_KEY, SLIM_KEY, has_metadata
from fixify.errors import FormatError, HeadSpecError, OutputError, UsageError
from fixify.models.architectures import Architecture, build
from fixify.models.build import load_weights
from fixify.surgery import HeadRecord, apply_heads_

FORMAT_VERSION = "1"
SUFFIX = ".fixed.safetensors"
_LARGEST_INPUT = 1 << 14  # of channels and pixels: a header comes from outside, and images of its size are made


class SlimInfo(BaseModel):
    """Everything a slim checkpoint says about itself. Plain values; no path of the machine that wrote it.

    Attributes:
        architecture: What to build.
        heads: The fixed heads, in the order in which the model has them.
        preprocessing: timm's names: input_size, mean, std, interpolation, crop_pct, crop_mode.
        labels: Class names in class order, or None if they are not known.
        source: What was converted: file name, SHA-256, bytes.
        savings: `fixify.savings.Savings` as a dictionary.
        dtype: The floating type of the backbone as stored, for example "float16".
        calibration: `fixify.features.Calibration` as a dictionary, if images were at hand when it was converted.
        training: Data, options and metrics before and after, if the model was fine-tuned.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    architecture: Architecture
    heads: tuple[HeadRecord, ...]
    preprocessing: dict[str, Any]
    labels: list[str] | None = None
    source: dict[str, Any] = {}
    savings: dict[str, Any] = {}
    dtype: str = "float32"
    calibration: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; every head of a model has the same."""
        return self.heads[0].spec.num_classes

    @field_validator("architecture", mode="before")
    @classmethod
    def _read_architecture(cls, value: Any) -> Any:
        return Architecture.from_dict(value) if isinstance(value, dict) else value

    @field_validator("heads", mode="before")
    @classmethod
    def _read_heads(cls, value: Any) -> Any:
        return tuple(HeadRecord.from_dict(entry) if isinstance(entry, dict) else entry for entry in value)

    @field_validator("heads")
    @classmethod
    def _check_heads(cls, value: tuple[HeadRecord, ...]) -> tuple[HeadRecord, ...]:
        if not value:
            raise ValueError("a slim checkpoint has at least one head")
        return value

    @field_validator("preprocessing")
    @classmethod
    def _check_preprocessing(cls, value: dict[str, Any]) -> dict[str, Any]:
        size = value.get("input_size")
        if size is not None and not (
            isinstance(size, list)
            and len(size) == 3
            and all(isinstance(number, int) and 0 < number <= _LARGEST_INPUT for number in size)
        ):
            raise ValueError(f"input_size is [channels, height, width], each up to {_LARGEST_INPUT}")
        return value

    @field_validator("dtype")
    @classmethod
    def _check_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}")
        return value

    @field_serializer("architecture")
    def _write_architecture(self, value: Architecture) -> dict[str, Any]:
        return value.to_dict()

    @field_serializer("heads")
    def _write_heads(self, value: tuple[HeadRecord, ...]) -> list[dict[str, Any]]:
        return [record.to_dict() for record in value]


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def is_slim(path: Path | str) -> bool:
    """Return whether a file is a slim checkpoint, of any format version."""
    return has_metadata(path, SLIM_KEY)


def read_info(path: Path | str) -> SlimInfo:
    """Read what a slim checkpoint says about itself. Only the header is read.

    Raises:
        FormatError: not a safetensors file, damaged, not written by fixify, or of a newer version.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise FormatError(f"There is no file {path}.") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is not a readable .safetensors file: {error}.",
            hint=f"If it is an ordinary checkpoint, make a slim one of it first: fixify convert {path}",
        ) from error
    if LANGUAGE_KEY in metadata:
        raise FormatError(
            f"{path} is a language model, not one of images.", hint="Load it: fixify.language.load_language"
        )
    if SLIM_KEY not in metadata:
        raise FormatError(
            f"{path} is not a slim checkpoint: fixify did not write it.", hint=f"Make one: fixify convert {path}"
        )
    version = metadata.get("fixify.version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}; this fixify reads version {FORMAT_VERSION}.",
            hint="Upgrade: pip install --upgrade fixify",
        )
    try:
        return SlimInfo.model_validate(json.loads(metadata[SLIM_KEY]))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"The header of {path} is damaged: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"The header of {path} is damaged: {where}: {first['msg']}.") from error


def read_tensors(path: Path | str) -> dict[str, torch.Tensor]:
    """Read the stored tensors without changing them (memory-mapped).

    Raises:
        FormatError: the file cannot be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a readable .safetensors file: {error}.") from error


def load(path: Path | str, *, device: str | torch.device = "cpu") -> nn.Module:
    """Load a slim checkpoint as a model that is ready for inference.

    The architecture is built, the codebook rebuilt from the head spec and compared with its digest, and the stored
    weights are put in. As with timm, weights stored in half precision become float32.

    Args:
        path: A slim checkpoint.
        device: Where the model goes.

    Returns:
        The model in eval mode. `model.fixify_info` is its `SlimInfo`; `save` needs it.

    Raises:
        FormatError: the file is damaged, or its tensors do not fit its architecture.
        CodebookMismatchError: the codebook rebuilt here is not the one the file was written with.
    """
    path = Path(path)
    info = read_info(path)
    model = build(info.architecture, num_classes=info.num_classes, blank=True)
    apply_heads_(model, info.heads)
    try:
        load_weights(model, read_tensors(path))
    except RuntimeError as error:
        raise FormatError(
            f"The tensors of {path} are not those of {info.architecture.ref}: {_first_problem(error)}"
        ) from error
    except HeadSpecError as error:
        raise FormatError(
            f"The codes in {path} do not fit its head spec: {error.message}",
            hint="The file is damaged or was edited. Convert the original again.",
        ) from error
    model.fixify_info = info  # type: ignore[assignment]
    return model.to(device).eval()


def save(model: nn.Module, path: Path | str, *, force: bool = False, training: Mapping[str, Any] | None = None) -> Path:
    """Write a model that came from `load` (or from `fixify.convert`) as a slim checkpoint.

    Weights are stored in the floating type that the model was loaded from (`SlimInfo.dtype`); the head's own tensors
    stay as they are.

    Args:
        model: A model with a `fixify_info`.
        path: Where to write.
        force: Replace an existing file.
        training: What the model was trained on and what came of it; kept in `SlimInfo.training`.

    Raises:
        UsageError: the model has no `fixify_info`.
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    info = getattr(model, "fixify_info", None)
    if not isinstance(info, SlimInfo):
        raise UsageError(
            "This model has no fixify_info, so a reader could not tell what to build.",
            hint="Save models that came from fixify.load(path) or fixify.convert(source).",
        )
    if training is not None:
        info = info.model_copy(update={"training": dict(training)})
    head_keys = tuple(f"{record.path}." for record in info.heads)
    tensors = {
        key: tensor.to(DTYPES[info.dtype]) if tensor.is_floating_point() and not key.startswith(head_keys) else tensor
        for key, tensor in model.state_dict().items()
    }
    return write_slim(Path(path), tensors, info, force=force)


def write_slim(path: Path, tensors: Mapping[str, torch.Tensor], info: SlimInfo, *, force: bool = False) -> Path:
    """Write tensors and their description as a slim checkpoint, in one step.

    Raises:
        OutputExistsError: `path` exists and `force` is not given.
        OutputError: the file cannot be written; nothing half-written is left.
    """
    refuse_existing(path, force=force)
    metadata = {
        "format": "pt",  # Hugging Face's loaders insist on it
        "fixify.version": FORMAT_VERSION,
        SLIM_KEY: json.dumps(info.model_dump(), allow_nan=False, separators=(",", ":"), sort_keys=True),
    }
    with atomic_path(path) as temporary:
        try:
            save_file(storable(tensors), temporary, metadata=metadata)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OutputError(f"Cannot write {path}: {error}.", hint="Nothing was changed.") from error
    return path


def storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Detached, on the CPU, contiguous, and tied weights copied (safetensors refuses tensors that share memory)."""
    seen: set[int] = set()
    stored = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in seen and tensor.numel():
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        stored[key] = tensor
    return stored


def _first_problem(error: RuntimeError) -> str:
    """Return the first problem that `load_state_dict` reports, without the class name and the lines that follow."""
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    return lines[0] if lines else str(error)
