"""The recipes that come with fixify, and how a name or a path becomes a file. Light: no torch, no timm."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixify.errors import FixifyError, UsageError
from fixify.recipes.parsing import Place, Problem, RecipeError, parse, read_text

SECTION_NAMES = ("convert", "finetune", "train", "language")  # those of fixify.recipes.schema, which is not light
_SUFFIXES = (".yaml", ".yml")
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class ShippedRecipe:
    """One recipe of those that come with fixify.

    Attributes:
        name: To be given to `--recipe`.
        path: Its file.
        description: What it does.
        expect: What to expect of it: accuracy, hardware, time; or that it was not run.
        measured: What its comparisons of learned and fixed have measured, as it is written there; see
            `fixify.recipes.schema` and `measured_words`.
        sections: Which commands it is for.
    """

    name: str
    path: Path
    description: str
    expect: str
    measured: tuple[dict[str, Any], ...]
    sections: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path), "measured": list(self.measured), "sections": list(self.sections)}


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside an installed fixify, or beside it in a checkout.

    Raises:
        FixifyError: neither; the installation is damaged.
    """
    checkout = _PACKAGE.parent
    candidates = [_PACKAGE / "_recipes"]
    if (checkout / "pyproject.toml").is_file():  # else it is site-packages, where `recipes` would be somebody else's
        candidates.append(checkout / "recipes")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FixifyError(
        f"The recipes that come with fixify are missing in {_PACKAGE}.",
        hint="Install it again: pip install --force-reinstall --no-deps fixify",
    )


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def list_recipes() -> list[ShippedRecipe]:
    """The shipped recipes, sorted by name.

    Raises:
        RecipeError: a file of them is damaged.
        FixifyError: they are missing.
    """
    return list(_read_all())


def _read_all() -> Iterator[ShippedRecipe]:
    folder = recipes_folder()
    for name in recipe_names():
        path = folder / f"{name}.yaml"
        parsed = parse(read_text(path))
        if parsed.problems or not isinstance(parsed.values, dict):  # somebody edited the installed file
            raise RecipeError(str(path), parsed.problems or [Problem(Place(1), "It has no sections.")])
        values = parsed.values
        texts = {key: " ".join(str(values.get(key, "")).split()) for key in ("description", "expect")}
        yield ShippedRecipe(
            name,
            path,
            **texts,
            measured=tuple(values.get("measured", ())),
            sections=tuple(key for key in values if key in SECTION_NAMES),
        )


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe.

    Args:
        name: A shipped recipe's name; or a path: what has a folder, ends in .yaml, or is no shipped recipe's name.

    Raises:
        UsageError: there is none.
    """
    path, shipped = Path(name), recipe_names()
    is_path = len(path.parts) > 1 or path.suffix in _SUFFIXES
    if not is_path and path.name in shipped:
        return recipes_folder() / f"{path.name}.yaml"
    if path.exists():
        return path
    if is_path and path.stem not in shipped:
        raise UsageError(f"There is no recipe file {path}.", hint="Those that come with fixify: fixify recipes ls")
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"There is no recipe {str(name)!r}.{guess}", hint="All of them: fixify recipes ls")
