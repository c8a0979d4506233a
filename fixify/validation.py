"""pydantic's errors as sentences for the person who wrote the value: what is allowed, and what was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_ALLOWED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
}


def explain(problem: Any) -> str:
    """What is wrong with one value, to be read after its name: "must be a whole number, not the text 'five'".

    Args:
        problem: One item of `pydantic.ValidationError.errors()`.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":  # our own validators, whose sentences say what was given
        return str(problem["msg"]).removeprefix("Value error, ")
    if kind in ("too_short", "too_long") and problem["loc"]:
        bound = context.get("min_length") if kind == "too_short" else context.get("max_length")
        return f"must be a list of {bound}, not of {context.get('actual_length')}: {shown(problem['input'])}"
    if kind == "missing":
        place = problem["loc"][-1]
        return f"has no value number {place + 1}: {shown(problem['input'])}" if isinstance(place, int) else "is missing"
    allowed = _ALLOWED.get(kind)
    if allowed is None:
        allowed = str(problem["msg"]).removeprefix("Input should be ")
    return f"must be {allowed}, not {shown(problem['input'])}"


def shown(value: Any) -> str:
    """A value as YAML and the command line spell it, shortened; text is called text, so that '3' is not taken for 3."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = f"the text {value!r}"
    elif isinstance(value, dict):
        text = "a section"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(str, value)) + "]"
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'epochs'?`, or a full stop if nothing is near."""
    near = difflib.get_close_matches(name[:60], list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
