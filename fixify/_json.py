"""Parse JSON that somebody else wrote.

Python's parser accepts what no reader of fixify expects: NaN, integers as long as a book, and halves of surrogate
pairs, which no terminal and no file can be given.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

_LARGEST = 2**64
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
    if len(digits) > 21 or abs(int(digits)) > _LARGEST:
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
