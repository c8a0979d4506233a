"""pydantic's errors as sentences for the person who wrote the value: what is allowed, and what was given."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

_CONFLICTS = "conflicts"

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


@dataclass(frozen=True)
class Conflict:
    """Options that do not go together.

    Attributes:
        options: Their names, the one to change first.
        sentence: What is wrong, naming them; without a full stop.
        hint: What to type next, where the sentence does not say it.
    """

    options: tuple[str, ...]
    sentence: str
    hint: str | None = None


def refuse(conflicts: Iterable[Conflict]) -> None:
    """For a model's validator of mode "after": raise if there are any; `mistakes` tells them one by one."""
    found = list(conflicts)
    if found:
        raise PydanticCustomError(
            _CONFLICTS, "{sentences}", {"sentences": ". ".join(each.sentence for each in found), "conflicts": found}
        )


def mistakes(validate: Callable[[dict[str, Any]], object], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything that is wrong with some values, at once.

    pydantic looks at what goes together only when each field is right by itself. Here the fields that are wrong are
    left out, and what is said about the others is told too.

    Args:
        validate: Raises `pydantic.ValidationError`.
        values: What to validate, possibly sections of such.

    Returns:
        Items as of `ValidationError.errors()`. Each conflict is an item of type "conflicts" with its sentence as
        "msg", and the names of the options as "options"; its "loc" is that of the section.
    """
    problems = _problems(validate, values)
    rest = copy.deepcopy(dict(values))
    left_out: set[tuple[Any, ...]] = set()
    for problem in problems:
        if problem["type"] != _CONFLICTS and (path := _remove(rest, problem["loc"])):
            left_out.add(path)
    if left_out:
        problems += [
            problem
            for problem in _problems(validate, rest)
            if problem["type"] == _CONFLICTS
            and problem not in problems
            # A wrong value was replaced by its default, about which there is nothing to say.
            and not any((*problem["loc"], option) in left_out for option in problem["options"])
        ]
    return problems


def _problems(validate: Callable[[dict[str, Any]], object], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        validate(dict(values))
    except ValidationError as error:
        found: list[dict[str, Any]] = []
        for problem in error.errors(include_url=False):
            if problem["type"] == _CONFLICTS:
                common = {"type": _CONFLICTS, "loc": problem["loc"], "input": problem["input"]}
                conflicts: list[Conflict] = problem["ctx"]["conflicts"]
                found += [{**common, "msg": each.sentence, "options": each.options} for each in conflicts]
            else:
                found.append(dict(problem))
        return found
    return []


def _remove(values: dict[str, Any], location: tuple[int | str, ...]) -> tuple[Any, ...]:
    """Take the value at a location out of nested sections, or the list that it is in; its path, () if none is."""
    section: Any = values
    for depth, part in enumerate(location, start=1):
        if not isinstance(section, dict) or part not in section:
            return ()
        if depth == len(location) or not isinstance(section[part], dict):
            del section[part]
            return tuple(location[:depth])
        section = section[part]
    return ()


def explain(problem: Any) -> str:
    """What is wrong with one value, to be read after its name: "must be a whole number, not the text 'five'".

    Args:
        problem: One item of `pydantic.ValidationError.errors()`.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == _CONFLICTS:
        return str(problem["msg"])
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
