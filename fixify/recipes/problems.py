"""What is wrong with a recipe: every mistake, each with its place, told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fixify.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where something was written: a line of the file (from 1), or the `--set` that gave it."""

    line: int | None = None
    override: str | None = None

    def __str__(self) -> str:
        return f"--set {self.override}" if self.override is not None else f"line {self.line}"


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        place: Where it was written.
        message: What is wrong, a sentence that names the option.
    """

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        return {"line": self.place.line, "set": self.place.override, "message": self.message}


class RecipeError(UsageError):
    """A recipe that cannot be used.

    Args:
        name: The file, or the name of the recipe.
        problems: All of its mistakes.
        hint: What to type next.
    """

    def __init__(self, name: str, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        self.problems = tuple(sorted(problems, key=_order))
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n".join((f"{name} has {count}.", *(f"  {each}" for each in self.problems))), hint=hint)


def _order(problem: Problem) -> tuple[bool, int]:
    return problem.place.line is None, problem.place.line or 0
