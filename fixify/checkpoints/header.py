"""The header of a safetensors file that fixify wrote: read it, and check what it says.

Importing this module needs neither torch nor timm nor NumPy, so that `fixify inspect` is quick.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from fixify._files import require_regular
from fixify._values import counted, parse_json
from fixify.checkpoints.records import CalibrationRecord, SavingsRecord, SourceRecord, TrainingRecord, checked
from fixify.description import (
    BARE,
    BARE_PATH,
    BEHIND_PROJECTION,
    Architecture,
    HeadRecord,
    Preprocessing,
    check_preprocessing,
)
from fixify.errors import ArchitectureError, FormatError

# Metadata keys of the files that fixify writes.
SLIM_KEY = "fixify"
LANGUAGE_KEY = "fixify.language"
VERSION_KEY = "fixify.version"
DIGEST_KEY = "fixify.tensors"  # files of older versions lack it

ONNX_SUFFIX = ".onnx"

FORMAT_VERSION = "1"
DTYPE_NAMES = ("float32", "float16", "bfloat16", "float64")
MAX_HEADER = 100_000_000
"""Bytes of a header that the safetensors library allows."""

_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_LEFT_OUT = ("projection",)  # if it is None, so that other files are as those of older versions
_MAX_HEADS = 16
_MAX_TEXT = 10_000  # characters of a class name or a path


class SlimInfo(BaseModel):
    """What a slim checkpoint says about itself: plain values, without a path of the machine that wrote it.

    Attributes:
        architecture: The architecture to build.
        heads: The fixed heads, in the order in which the model has them.
        preprocessing: timm's names: input_size, mean, std, interpolation, crop_pct, crop_mode.
        labels: Class names in class order, or None if they are not known.
        source: What was converted: file name, SHA-256, bytes.
        savings: `fixify.savings.Savings` as a dictionary.
        dtype: The floating type of the backbone as stored, for example "float16".
        calibration: `fixify.features.Calibration` as a dictionary, if it was calibrated on images.
        training: Data, options and metrics before and after, if the model was fine-tuned.
        projection: The linear layer of the architecture whose output goes to the head, if the head was put behind it;
            None where the head takes the place of a layer.
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
    projection: str | None = None

    @property
    def is_bare(self) -> bool:
        """Whether the file holds a classifier alone, without a network."""
        return self.architecture == BARE

    @property
    def num_classes(self) -> int:
        """Number of classes; all heads of a model have the same."""
        return self.heads[0].spec.num_classes

    @property
    def data_config(self) -> Preprocessing:
        """`preprocessing`, typed; the header was checked when it was read."""
        return cast(Preprocessing, self.preprocessing)

    @field_validator("architecture", mode="before")
    @classmethod
    def _read_architecture(cls, value: Any) -> Any:
        return Architecture.from_dict(value) if isinstance(value, dict) else value

    @field_validator("heads", mode="before")
    @classmethod
    def _read_heads(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= _MAX_HEADS:
            raise ValueError(f"a slim checkpoint has a list of 1 to {_MAX_HEADS} heads")
        return tuple(HeadRecord.from_dict(entry) if isinstance(entry, dict) else entry for entry in value)

    @field_validator("heads")
    @classmethod
    def _check_heads(cls, value: tuple[HeadRecord, ...]) -> tuple[HeadRecord, ...]:
        if len({record.path for record in value}) < len(value) or any(len(record.path) > _MAX_TEXT for record in value):
            raise ValueError("each head has a path of its own")
        if len({record.spec.num_classes for record in value}) > 1:
            raise ValueError("all heads of a model have the same classes")
        return value

    @field_validator("preprocessing")
    @classmethod
    def _check_preprocessing(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            check_preprocessing(value)
        except ArchitectureError as error:
            raise ValueError(error.message) from None
        return value

    @field_validator("source", "savings", "calibration", "training")
    @classmethod
    def _check_records(cls, value: dict[str, Any] | None, field: ValidationInfo) -> dict[str, Any] | None:
        return checked(_RECORDS[field.field_name or ""], value) if value else value

    @model_validator(mode="after")
    def _check_labels(self) -> SlimInfo:
        if self.labels is not None:
            if len(self.labels) != self.num_classes:
                raise ValueError(
                    f"the labels are not one per class: {counted(len(self.labels), 'label')}, "
                    f"{counted(self.num_classes, 'class', 'classes')}"
                )
            if any(len(label) > _MAX_TEXT for label in self.labels):
                raise ValueError(f"a label is longer than {_MAX_TEXT} characters")
        return self

    @model_validator(mode="after")
    def _check_places(self) -> SlimInfo:
        paths = [record.path for record in self.heads]
        if self.projection is not None and paths != [f"{self.projection}.{BEHIND_PROJECTION}"]:
            raise ValueError("the head behind a projection is not where it belongs")
        if self.is_bare and (paths != [BARE_PATH] or self.heads[0].channel_dim != -1):
            raise ValueError(f"a classifier alone is called {BARE_PATH}")
        missing = [key for key in ("input_size", "mean", "std") if key not in self.preprocessing]
        if missing and not self.is_bare:
            raise ValueError(f"it does not say how images are preprocessed: {', '.join(missing)}")
        return self

    @field_validator("dtype")
    @classmethod
    def _check_dtype(cls, value: str) -> str:
        if value not in DTYPE_NAMES:
            raise ValueError(f"dtype is one of {', '.join(DTYPE_NAMES)}")
        return value

    @field_serializer("architecture")
    def _write_architecture(self, value: Architecture) -> dict[str, Any]:
        return value.to_dict()

    @field_serializer("heads")
    def _write_heads(self, value: tuple[HeadRecord, ...]) -> list[dict[str, Any]]:
        return [record.to_dict() for record in value]


_RECORDS: dict[str, type[BaseModel]] = {
    "source": SourceRecord,
    "savings": SavingsRecord,
    "calibration": CalibrationRecord,
    "training": TrainingRecord,
}


@dataclass(frozen=True)
class Header:
    """The header of a slim checkpoint.

    Attributes:
        info: What the file says about itself.
        digest: The recorded digest of the tensors; None in files of older versions, which have none.
    """

    info: SlimInfo
    digest: str | None


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a safetensors file, and check that the file has the length that its header describes.

    Raises:
        FormatError: the file is not a regular file, is no safetensors file, or is damaged.
    """
    require_regular(Path(path), FormatError)
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError("it has no header")
            entries = parse_json(file.read(length).decode())
        metadata = entries.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"its header describes {8 + length + end} bytes, it has {size}")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = error if type(error) is ValueError else "its header is damaged"
        raise FormatError(
            f"{path} is not a readable .safetensors file: {what}.",
            hint=f"If it is an ordinary checkpoint, make a slim one of it first: fixify convert {path}",
        ) from error
    return cast("dict[str, str]", metadata)


def has_metadata(path: Path | str, key: str) -> bool:
    """Return whether a file is a safetensors file with this key in its metadata. Only the header is read."""
    try:
        return key in read_metadata(path)
    except FormatError:
        return False


def read_header(path: Path | str) -> Header:
    """Read the header of a slim checkpoint, and nothing else of the file.

    Whether the installed libraries have its architecture is not asked.

    Raises:
        FormatError: The file is not a safetensors file, is damaged, was not written by fixify, or has a newer version.
    """
    return parse_metadata(path, read_metadata(path))


def parse_metadata(path: Path | str, metadata: Mapping[str, str]) -> Header:
    """Parse the metadata of a slim checkpoint.

    Raises:
        FormatError: fixify did not write it, it is damaged, or has a newer version.
    """
    if LANGUAGE_KEY in metadata:
        raise FormatError(
            f"{path} is a language model, not one of images.", hint="Load it: fixify.language.load_language"
        )
    if SLIM_KEY not in metadata:
        raise FormatError(
            f"{path} is not a slim checkpoint: fixify did not write it.", hint=f"Make one: fixify convert {path}"
        )
    version = metadata.get(VERSION_KEY)
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {str(version)[:20]}; this fixify reads version {FORMAT_VERSION}.",
            hint="Upgrade: pip install --upgrade fixify",
        )
    try:
        return Header(info_of_text(metadata[SLIM_KEY]), recorded_digest(path, metadata))
    except ValueError as error:
        raise FormatError(f"The header of {path} is damaged: {error}.") from error


def recorded_digest(path: Path | str, metadata: Mapping[str, str]) -> str | None:
    """Return the digest of the tensors that a file's metadata records; None in files of older versions.

    Raises:
        FormatError: it is not a digest.
    """
    digest = metadata.get(DIGEST_KEY)
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise FormatError(f"The header of {path} is damaged: {digest[:40]!r} is not a digest.")
    return digest


def info_as_text(info: SlimInfo) -> str:
    """Write what a checkpoint says about itself as JSON, the same text for the same values."""
    values = {key: value for key, value in info.model_dump().items() if value is not None or key not in _LEFT_OUT}
    return json.dumps(values, allow_nan=False, separators=(",", ":"), sort_keys=True)


def info_of_text(text: str) -> SlimInfo:
    """Read what `info_as_text` wrote; the text may come from a file.

    Raises:
        ValueError: a value is missing or is not allowed; the message names it.
    """
    try:
        return SlimInfo.model_validate(parse_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}".removeprefix(": ").rstrip(".")) from error


def is_onnx(path: Path | str) -> bool:
    """Check whether a path is a file with the suffix of ONNX."""
    return str(path).endswith(ONNX_SUFFIX) and Path(path).is_file()
