"""Read the files in the folder of a run; each is checked once, when it is read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from fixify._values import Number, Percent, Text
from fixify.errors import FormatError

T = TypeVar("T")

_LARGEST_FILE = 1 << 28
_MOST_VALUES = 100_000
_LONGEST_NUMBER = 2**63
_LOGS_HINT = "Resuming the run writes its logs again."
_STRICT = ConfigDict(strict=True, frozen=True)


class _ReportedOptions(BaseModel):
    """The options that reports calculate with; a run has them or not, depending on its kind."""

    model_config = _STRICT

    epochs: Annotated[int, AfterValidator(lambda value: _within(value, 0, 10**9))] = 0
    original_top1: Percent | None = None
    head_scale: Number | None = None
    head_fixed_scale: bool | None = None


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    _ReportedOptions.model_validate({name: options[name] for name in _ReportedOptions.model_fields if name in options})
    left = [_MOST_VALUES]
    for name, value in options.items():
        _check_plain(name, value, left)
    return options


def _check_plain(name: str, value: object, left: list[int]) -> None:
    """Check that a value of an option is short enough to be shown."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("there are too many values")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for each in value:
            _check_plain(name, each, left)
    elif isinstance(value, str) and len(value) > _MOST_VALUES:
        raise ValueError(f"{name} has {len(value):,} characters")
    elif isinstance(value, int):
        _within(value, -_LONGEST_NUMBER, _LONGEST_NUMBER)


def _within(value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ValueError(f"a whole number between {low} and {high} is needed")
    return value


class StartedRun(BaseModel):
    """What run.json says of any run.

    Attributes:
        fixify: The version that wrote it.
        options: Every option.
        section: The recipe's section of a language model's run; None for images.
        launch: The start of torchrun that began the run.
    """

    model_config = _STRICT

    fixify: Text
    options: Annotated[dict[Text, Any], AfterValidator(_checked_options)]
    section: Text | None = None
    launch: Text | None = None


Started = TypeVar("Started", bound=StartedRun)


def read_run_file(folder: Path, kind: type[Started]) -> Started:
    """Read run.json.

    Args:
        folder: Folder of the run.
        kind: What to read of it.

    Raises:
        FormatError: the file is missing, damaged, or another program's; the message names the entry.
    """
    return read_record(folder / "run.json", kind, hint=None)


def read_record(path: Path, kind: type[T], *, hint: str | None = _LOGS_HINT) -> T:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        kind: A pydantic model, or a dataclass.
        hint: What to do if it is damaged.

    Raises:
        FormatError: it is missing or damaged; the message names the entry.
    """
    return _parsed(path, TypeAdapter(kind), read_file(path), "", hint)


def read_records(path: Path, kind: type[T]) -> tuple[T, ...]:
    """Read a file that holds one JSON object per line.

    Raises:
        FormatError: it is missing or damaged; the message names the line and the entry.
    """
    adapter, lines = TypeAdapter(kind), read_file(path).splitlines()
    return tuple(
        _parsed(path, adapter, line, f", line {number}", _LOGS_HINT) for number, line in enumerate(lines, start=1)
    )


def read_file(path: Path) -> bytes:
    """Read a whole file of a run.

    Raises:
        FormatError: it is missing, is no file, or is far larger than what fixify writes.
    """
    try:
        # Without O_NONBLOCK a named pipe would wait for a writer for ever.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _unreadable(path, "it is not a file")
            if found.st_size > _LARGEST_FILE:
                raise _unreadable(path, f"it has {found.st_size:,} bytes")
            return file.read(_LARGEST_FILE)
    except OSError as error:
        raise _unreadable(path, error.strerror or "it cannot be read") from error


def _unreadable(path: Path, why: str) -> FormatError:
    return FormatError(f"The run in {path.parent} cannot be read: {path.name}: {why}.")


def _parsed(path: Path, adapter: TypeAdapter[T], text: bytes, where: str, hint: str | None) -> T:
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        raise FormatError(
            f"The run in {path.parent} is damaged: {path.name}{where}: {first_problem(error)}.", hint=hint
        ) from None


def from_plain(cls: type[T], stored: Mapping[str, Any], name: str) -> T:
    """Read what `dataclasses.asdict` made of a dataclass.

    Args:
        cls: The dataclass.
        stored: Its values by name.
        name: What it is called in messages.

    Raises:
        ValueError: a value has another type, is out of range, or is unknown; the message names it.
    """
    unknown = sorted(str(key) for key in stored.keys() - {each.name for each in fields(cls)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{name} has an unknown entry {unknown[0]!r}")
    try:
        return TypeAdapter(cls).validate_json(json.dumps(stored), strict=True)  # JSON keeps every bit of a float
    except ValidationError as error:
        raise ValueError(f"{name}.{first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Return the entry and the sentence of the first thing that is wrong, printable."""
    first = error.errors(include_url=False, include_input=False)[0]
    return _shown(": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"]]))


def _shown(text: str) -> str:
    """Shorten a text from a file, and make what is not printable visible."""
    text = text if len(text) <= 200 else text[:200] + "..."
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
