"""Parse the YAML of a recipe into plain values with their lines, and report every mistake at its line.

The schema is the core schema of YAML 1.2, not PyYAML's 1.1: `1e-4` is a number, `no` and `1:30` are text, there are no
dates. A recipe may come from anywhere. So tags, aliases (with which a few lines make gigabytes), deep nesting and large
files are refused, and a key that is given twice is a mistake: the last one does not win.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from fixify.errors import UsageError

Path = tuple[str | int, ...]  # as in fixify._options, whose pydantic completion does not need
"""The path of a value: ("finetune", "scale", 0)."""

MAX_BYTES = 1 << 16
_MAX_DEPTH = 8

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT = (_TAG + name for name in ("null", "bool", "int", "float"))


@dataclass(frozen=True)
class Place:
    """The place of a value: a line of the file (from 1), or the `--set` that gave it."""

    line: int | None = None
    override: str | None = None

    def __str__(self) -> str:
        return f"--set {self.override}" if self.override is not None else f"line {self.line}"


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        place: The place of the value.
        message: What is wrong: a sentence that names the option.
    """

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"

    def to_dict(self) -> dict[str, str | int | None]:
        """Return what `fixify recipes validate --json` prints."""
        return {"line": self.place.line, "set": self.place.override, "message": self.message}


class RecipeError(UsageError):
    """Raised for a recipe with mistakes.

    Args:
        name: The file, or the name of the recipe.
        problems: All of its mistakes; sorted by line.
        hint: What to type next.
    """

    def __init__(self, name: str, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        self.problems = tuple(sorted(problems, key=_order))
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n".join((f"{name} has {count}.", *(f"  {each}" for each in self.problems))), hint=hint)


def _order(problem: Problem) -> tuple[bool, int]:
    return problem.place.line is None, problem.place.line or 0


@dataclass
class Parsed:
    """The result of parsing a text.

    Attributes:
        values: Dictionaries, lists, text, numbers, booleans and None.
        places: The place of each value. For an entry of a dictionary it is the place of its key.
        problems: Mistakes; their values are left out of `values`, not of `places`.
    """

    values: Any = None
    places: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, path: Path, message: str, place: Place | None = None) -> None:
        """Add a mistake; `message` is read after the name of the value."""
        self.problems.append(Problem(place or self.places[path], f"{dotted(path) or 'the recipe'} {message}"))


def dotted(path: Path) -> str:
    """Spell a path.

    >>> dotted(("finetune", "scale", 0))
    'finetune.scale[0]'
    """
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:  # a quoted name can hold anything, control characters too
            plain = part if part.isprintable() and len(part) <= 60 else f"{part[:60]!r}"
            name += f".{plain}" if name else plain
    return name


def read_text(path: FilePath) -> str:
    """Read a recipe file.

    Raises:
        UsageError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        inside = path / "recipe.yaml"
        hint = f"Did you mean {inside}?" if inside.is_file() else None
        raise UsageError(f"{path} is a folder, not a recipe.", hint=hint) from error
    except OSError as error:
        raise UsageError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path} is too large for a recipe: it has more than {MAX_BYTES:,} bytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(str(path), [Problem(Place(line), "This is not UTF-8 text.")]) from error


def parse(text: str, place: Place | None = None, path: Path = ()) -> Parsed:
    """Parse YAML.

    Args:
        text: One YAML document.
        place: The place of every value, if the text is not a file.
        path: The path of the whole, if it is a value inside another.

    >>> parse("finetune: {lr: 1e-4}").values
    {'finetune': {'lr': 0.0001}}
    """
    parsed = Parsed()
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = Place(mark.line + 1 if mark else 1)
        what = " ".join(filter(None, (error.context, error.problem)))
        if error.problem == "mapping values are not allowed here":
            what = "a colon inside a value; put the value in quotes"
        parsed.problems.append(Problem(place or line, f"This is not YAML: {what}."))
    except yaml.reader.ReaderError as error:
        line = Place(text[: error.position].count("\n") + 1)
        parsed.problems.append(Problem(place or line, f"The character {chr(error.character)!r} is not allowed."))
    else:
        _Walk(parsed, place).visit(node, path)
    return parsed


class _Loader(yaml.SafeLoader):
    """Compose nodes, and set `refused` on those that must not be read."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, not PyYAML's 1.1

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.get_event()
            alias = yaml.ScalarNode(_NULL, "", event.start_mark, event.end_mark)  # type: ignore[arg-type]
            alias.refused = f"is an alias (*{str(event.anchor)[:40]}), which a recipe cannot have: write the value"  # type: ignore[attr-defined]
            return alias
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, "it is nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        tag = getattr(event, "tag", None)
        if tag is not None and node is not None:
            short = tag.replace(_TAG, "!!")
            node.refused = f"has a tag ({short[:40]}), which a recipe cannot have: write the plain value"  # type: ignore[attr-defined]
        return node


for _tag, _pattern, _first in (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]{1,20}|0o[0-7]{1,20}|0x[0-9a-fA-F]{1,16}", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


class _Walk:
    """Turn nodes into values, with their places and mistakes."""

    def __init__(self, parsed: Parsed, place: Place | None) -> None:
        self.parsed = parsed
        self.place = place

    def visit(self, node: yaml.Node | None, path: Path) -> None:
        """Read a node into `parsed.values`."""
        self.parsed.places[path] = self._place(node)
        found, value = self._value(node, path)
        if found:
            self.parsed.values = value

    def _place(self, node: yaml.Node | None) -> Place:
        return self.place or Place(1 if node is None else node.start_mark.line + 1)

    def _value(self, node: yaml.Node | None, path: Path) -> tuple[bool, Any]:
        """Return whether the node can be used, and its value."""
        if node is None:  # an empty document
            return True, None
        refused = getattr(node, "refused", None)
        if refused is not None:
            self.parsed.refuse(path, f"{refused}.")
            return False, None
        if isinstance(node, yaml.MappingNode):
            return True, self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return True, self._sequence(node, path)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        seen: dict[str, Place] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or getattr(key_node, "refused", None):
                self.parsed.refuse(path, "has a name that is not plain text.", place)
                continue
            key = key_node.value
            inner = (*path, key)
            if key in seen:
                self.parsed.refuse(inner, f"is given twice; it was given on {seen[key]} already.", place)
                continue
            seen[key] = place
            self.parsed.places[inner] = place
            found, value = self._value(value_node, inner)
            if found:
                values[key] = value
        return values

    def _sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            inner = (*path, index)
            self.parsed.places[inner] = self._place(item)
            values.append(self._value(item, inner)[1])
        return values

    def _scalar(self, node: yaml.Node, path: Path) -> tuple[bool, Any]:
        text = node.value
        if node.tag == _NULL:
            return True, None
        if node.tag == _BOOL:
            return True, text.lower() == "true"
        if node.tag == _INT:
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            return True, int(text, base)
        if node.tag == _FLOAT:
            return True, float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        try:
            text.encode()
        except UnicodeEncodeError:
            self.parsed.refuse(path, "has half of a surrogate pair, which is no character.")
            return False, None
        return True, text
