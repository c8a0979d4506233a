"""The parts of a slim checkpoint's metadata that are plain records, and what their values may be.

They are checked once, when the header is read, so that nothing that prints or uses them has to doubt them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Count = Annotated[int, Field(ge=0, le=2**53, strict=True)]
_Positive = Annotated[int, Field(ge=1, le=2**53, strict=True)]
_Number = Annotated[float, Field(ge=-1e39, le=1e39, allow_inf_nan=False)]
_Word = Annotated[str, Field(max_length=10_000, strict=True)]
_Values = dict[str, _Number | bool | _Word | None]


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", defer_build=True)  # a file has some of these records


class ClassifierRecord(_Record):
    """A classifier without a network that was converted, or put onto an encoder."""

    name: _Word
    keys: Annotated[list[_Word], Field(min_length=1, max_length=2)]
    rows: Literal["classes", "features"]
    logit_scale: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    class_mean: Annotated[str, Field(max_length=1 << 20, pattern="^[A-Za-z0-9+/]+={0,2}$")] | None = None


class SourceRecord(_Record):
    """What was converted."""

    name: _Word | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    bytes: _Count | None = None
    ema: Annotated[bool, Field(strict=True)] = False
    classifier: ClassifierRecord | None = None


class SavingsRecord(_Record):
    """The counts of `fixify.savings.Savings`; shares are computed from those before."""

    parameters_before: _Positive
    parameters_after: _Count
    classifier_parameters: _Count
    removed: _Count
    bytes_before: _Positive
    bytes_after: _Count
    classifier_bytes_before: _Count
    classifier_bytes_after: _Count
    removed_share: _Number = 0.0


class CalibrationRecord(_Record):
    """The values of `fixify.features.Calibration`."""

    data: _Word
    num_images: _Count
    held_out: _Count
    agreement: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class TrainingRecord(_Record):
    """What is read of the facts about a run; the others are only kept."""

    class_names: list[_Word] | None = None
    before: _Values | None = None
    after: _Values | None = None
    original_top1: _Number | None = None
    epochs_done: _Number | None = None


def checked(record: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Return values as they are, if they are those of a record.

    Raises:
        ValueError: one is missing or is not allowed; the message names it.

    >>> checked(SourceRecord, {"name": "a.pth", "bytes": 3})
    {'name': 'a.pth', 'bytes': 3}
    """
    try:
        record.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return values
