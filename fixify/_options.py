"""pydantic's errors as sentences for the person who wrote the value: what is allowed, and what was given."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fixify.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

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
    "string_too_short": "text that is not empty",
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


class CheckedOptions(BaseModel):
    """Options that are checked when they are made, and explain every mistake at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    machine: ClassVar[tuple[str, ...]] = ()
    """Options that suit a machine and do not change the result."""

    @classmethod
    def create(cls, **given: Any) -> Self:
        """Options with these values and the defaults.

        Raises:
            UsageError: unknown names (the nearest is named) and values out of range, all of them at once.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            problems = mistakes(cls.model_validate, given)
            raise UsageError("\n".join(_sentence(problem, cls.model_fields) for problem in problems)) from error

    def replace(self, **given: Any) -> Self:
        """These options with some changed; raises like `create`."""
        return self.create(**{**self.model_dump(), **given})

    def recipe(self) -> dict[str, Any]:
        """What determines the result, JSON-safe: everything except `machine`."""
        return self.model_dump(mode="json", exclude=set(self.machine))

    @model_validator(mode="after")
    def _fits_together(self) -> CheckedOptions:
        refuse(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        """What does not go together."""
        yield from ()


def _sentence(problem: Any, known: Iterable[str]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"There is no option {name!r}{did_you_mean(name, known)}"
    return f"{name}: {explain(problem)}." if name else f"{explain(problem)}."
