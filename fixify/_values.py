"""Values that are read from files, and how they are written for people.

`pydantic.TypeAdapter` checks dataclasses whose fields have the bounded types below; within the program they are plain
numbers and texts. `parse_json` reads JSON that somebody else wrote: Python's own parser accepts NaN, integers as long
as a book, and halves of surrogate pairs, which no terminal and no file can be given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BeforeValidator, Field

_MOST_NAMES = 6
_LARGEST = 1e39
"""Above what a float32 can hold."""


def _nan_for_none(value: object) -> object:
    return math.nan if value is None else value


def _bounded(value: float) -> float:
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError(f"{value:g} is too large")
    return value


Count = Annotated[int, Field(ge=0, le=2**53)]
"""How many of something there are."""
Number = Annotated[float, AfterValidator(_bounded)]
"""A number that may be NaN or infinite."""
Measured = Annotated[Number, BeforeValidator(_nan_for_none)]
"""A number that is null in JSON if it is not finite."""
Percent = Annotated[float, Field(ge=0, le=100.001, allow_inf_nan=False)]
"""A percentage, with room for rounding."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A part of a whole."""
Text = Annotated[str, Field(max_length=100_000)]
"""A name, a command, or a sentence."""


def finite_or_none(value: object) -> object:
    """Return a value as JSON may hold it: None for a number that is not finite.

    >>> [finite_or_none(value) for value in (1.5, math.nan, "nan")]
    [1.5, None, 'nan']
    """
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun.

    >>> counted(1, "class", "classes"), counted(1000, "class", "classes"), counted(2, "tensor")
    ('1 class', '1,000 classes', '2 tensors')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def shorten(names: Sequence[str]) -> str:
    """List the first names, and count the others.

    >>> shorten(["a", "b"]), shorten(list("abcdefgh"))
    ('a, b', 'a, b, c, d, e, f and 2 more')
    """
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


_LARGEST_IN_JSON = 2**64
_DEPTH = 100


def parse_json(text: str) -> Any:
    """Parse JSON with finite numbers up to 2^64, at most 100 levels of nesting, and text that can be encoded.

    Raises:
        ValueError: the text is not such JSON.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value, 0)
    return value


def _integer(digits: str) -> int:
    if len(digits) > 21 or abs(int(digits)) > _LARGEST_IN_JSON:
        raise ValueError(f"the number {digits[:30]} is too large")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:30]} is too large")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _check(value: object, depth: int) -> None:
    if depth > _DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth)
            _check(item, depth + 1)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text[:40]!r} holds half a character") from None
