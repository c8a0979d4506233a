"""Option classes: fields with help and flags, checks that report every mistake at once, and sentences for a person."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fixify.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from typing_extensions import Self

Path = tuple[str | int, ...]
"""Where a value is within nested sections: ("finetune", "scale", 0)."""

CONFLICT = "conflict"
"""Kind of a mistake: options that exclude each other."""
UNKNOWN = "extra_forbidden"
MISSING = "missing"
NOT_A_SECTION = ("model_type", "model_attributes_type")

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


_NUMBER_OR_WORD = ("constrained-float", "literal['auto']")
"""The alternatives of an option that takes a number or a word; mistakes are told of the number."""


@dataclass(frozen=True)
class Conflict:
    """Options that exclude each other.

    Attributes:
        options: Their names, the one to change first.
        sentence: What is wrong, naming them; without a full stop.
        hint: What to type next, if the sentence does not say it.
    """

    options: tuple[str, ...]
    sentence: str
    hint: str | None = None


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong with some values.

    Attributes:
        path: The value; for a conflict, the section that holds the options.
        kind: `CONFLICT`, or pydantic's type of the error.
        text: What is wrong, to be read after the name of the value; a whole sentence for a conflict.
        given: The value, or the section.
        options: The names of the options in conflict.
        hint: What to type next.
    """

    path: Path
    kind: str
    text: str
    given: Any = field(compare=False)
    options: tuple[str, ...] = ()
    hint: str | None = None


@dataclass(frozen=True)
class Flag:
    """How the command line shows a field.

    Attributes:
        names: Its spellings; empty if the field has no flag and only recipes and Python set it.
        panel: The part of the help that lists it; None for the first part.
        hidden: Old spellings that still work but are not listed.
        metavar: What the help calls its value; None for the type.
    """

    names: tuple[str, ...]
    panel: str | None = None
    hidden: tuple[str, ...] = ()
    metavar: str | None = None


def option(
    default: Any,
    description: str,
    *,
    flags: Sequence[str] | None = None,
    panel: str | None = None,
    hidden: Sequence[str] = (),
    metavar: str | None = None,
    **limits: Any,
) -> Any:
    """Declare a field of an option class, with everything that the command line needs to offer it.

    Args:
        default: Its default; `...` if the field is required.
        description: Its help. The default and the allowed values of a `Literal` are appended from the class.
        flags: Its spellings on the command line; None for `--the-name`, () for no flag.
        panel: See `Flag`, like `hidden` and `metavar`.
        hidden: Old spellings.
        metavar: What the help calls its value.
        limits: What `pydantic.Field` takes: ge, gt, le, lt, allow_inf_nan, min_length.
    """
    flag: dict[str, Any] = {
        "flags": None if flags is None else tuple(flags),
        "panel": panel,
        "hidden": tuple(hidden),
        "metavar": metavar,
    }
    return Field(default, description=description, json_schema_extra=flag, **limits)


def flag_of(name: str, info: FieldInfo) -> Flag:
    """Return how the command line shows a field that `option` declared."""
    extra: Any = info.json_schema_extra or {}
    names = extra.get("flags")
    names = (f"--{name.replace('_', '-')}",) if names is None else names
    return Flag(names, extra.get("panel"), extra.get("hidden", ()), extra.get("metavar"))


class CheckedOptions(BaseModel):
    """Options that are checked when they are made, and that explain every mistake at once."""

    # The validator is built on first use: the command line reads the fields for its help and needs none.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    machine: ClassVar[tuple[str, ...]] = ()
    """Options that suit the machine and do not change the result."""

    @classmethod
    def create(cls, **given: Any) -> Self:
        """Create options from these values and the defaults.

        Raises:
            UsageError: there are unknown names (the message names the nearest) or values out of range; all at once.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            found = mistakes(cls.model_validate, given)
            hints = dict.fromkeys(each.hint for each in found if each.hint is not None)
            sentences = "\n".join(_sentence(each, cls.model_fields) for each in found)
            raise UsageError(sentences, hint=" ".join(hints) or None) from error

    def replace(self, **given: Any) -> Self:
        """Return these options with some changed; raises like `create`."""
        return self.create(**{**self.model_dump(), **given})

    def recipe(self) -> dict[str, Any]:
        """Return what determines the result, JSON-safe: everything except `machine`."""
        return self.model_dump(mode="json", exclude=set(self.machine))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return `recipe()` of the defaults, without the options that are required."""
        made = cls.model_construct().recipe()
        return {name: made[name] for name, info in cls.model_fields.items() if name in made and not info.is_required()}

    @model_validator(mode="after")
    def _fits_together(self) -> CheckedOptions:
        refuse(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        """Find options that exclude each other."""
        yield from ()


def refuse(conflicts: Iterable[Conflict]) -> None:
    """Raise if there are conflicts; for a model's validator of mode "after", and for `mistakes`."""
    found = list(conflicts)
    if found:
        raise PydanticCustomError(
            CONFLICT, "{sentences}", {"sentences": ". ".join(each.sentence for each in found), "conflicts": found}
        )


def mistakes(validate: Callable[[dict[str, Any]], object], values: Mapping[str, Any]) -> list[Mistake]:
    """List everything that is wrong with some values.

    pydantic looks for conflicts only when each field is right by itself. Therefore a second pass leaves out the fields
    that are wrong, and adds the conflicts between the others.

    Args:
        validate: Raises `pydantic.ValidationError`.
        values: What to validate; may hold nested sections.
    """
    found = _mistakes(validate, values)
    rest = copy.deepcopy(dict(values))
    left_out: set[Path] = set()
    for each in found:
        if each.kind != CONFLICT and (path := _remove(rest, each.path)):
            left_out.add(path)
    if left_out:
        found += [
            each
            for each in _mistakes(validate, rest)
            if each.kind == CONFLICT
            and each not in found
            # A wrong value was replaced by its default, about which there is nothing to say.
            and not any((*each.path, name) in left_out for name in each.options)
        ]
    return found


def _mistakes(validate: Callable[[dict[str, Any]], object], values: Mapping[str, Any]) -> list[Mistake]:
    try:
        validate(dict(values))
    except ValidationError as error:
        found: list[Mistake] = []
        for problem in error.errors(include_url=False):
            path, given = problem["loc"], problem["input"]
            if path and path[-1] in _NUMBER_OR_WORD:  # what pydantic adds for each alternative of a union
                if path[-1] != _NUMBER_OR_WORD[0]:
                    continue
                path = path[:-1]
            if problem["type"] == CONFLICT:
                conflicts: list[Conflict] = problem["ctx"]["conflicts"]
                found += [Mistake(path, CONFLICT, each.sentence, given, each.options, each.hint) for each in conflicts]
            else:
                found.append(Mistake(path, problem["type"], explain(problem), given))
        return found
    return []


def _remove(values: dict[str, Any], location: Path) -> Path:
    """Remove the value at a location of nested sections, or the list that holds it; return its path, () if none."""
    section: Any = values
    for depth, part in enumerate(location, start=1):
        if not isinstance(section, dict) or part not in section:
            return ()
        if depth == len(location) or not isinstance(section[part], dict):
            del section[part]
            return tuple(location[:depth])
        section = section[part]
    return ()


def explain(problem: Mapping[str, Any]) -> str:
    """Say what is wrong with one value, to be read after its name: "must be a whole number, not the text 'five'".

    Args:
        problem: One item of `pydantic.ValidationError.errors()`.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":  # our own validators, whose sentences say what was given
        return str(problem["msg"]).removeprefix("Value error, ")
    if kind in ("too_short", "too_long") and problem["loc"]:
        bound = context.get("min_length") if kind == "too_short" else context.get("max_length")
        return f"must be a list of {bound}, not of {context.get('actual_length')}: {shown(problem['input'])}"
    if kind == MISSING:
        place = problem["loc"][-1]
        return f"has no value number {place + 1}: {shown(problem['input'])}" if isinstance(place, int) else "is missing"
    allowed = _ALLOWED.get(kind)
    if allowed is None:
        allowed = str(problem["msg"]).removeprefix("Input should be ")
    return f"must be {allowed}, not {shown(problem['input'])}"


def shown(value: Any) -> str:
    """Spell a value as YAML and the command line do, shortened; text is marked as text, so that '3' is not 3.

    >>> shown(True), shown("3"), shown([0.5, 1])
    ('true', "the text '3'", '[0.5, 1]')
    """
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
    """Name the nearest known name; a full stop if none is near.

    >>> did_you_mean("epoch", ["lr", "epochs"])
    "; did you mean 'epochs'?"
    """
    near = difflib.get_close_matches(name[:60], list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _sentence(mistake: Mistake, known: Iterable[str]) -> str:
    name = ".".join(str(part) for part in mistake.path)
    if mistake.kind == UNKNOWN:
        return f"There is no option {name!r}{did_you_mean(name, known)}"
    return f"{name}: {mistake.text}." if name else f"{mistake.text}."
