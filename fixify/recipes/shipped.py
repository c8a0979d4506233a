"""Find recipes by name or path, and list those that come with fixify.

Importing this module is quick, because shell completion asks it for names.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixify.errors import FixifyError, UsageError
from fixify.recipes.parsing import Place, Problem, RecipeError, parse, read_text

_SUFFIXES = (".yaml", ".yml")
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with fixify.

    Attributes:
        name: What `--recipe` takes.
        path: The file.
        description: What it does.
        expect: What to expect of it: accuracy, hardware, time; or that it was not run.
        measured: What runs of it have measured, as the file has it; see `fixify.recipes.measured`.
        sections: The sections that it has.
    """

    name: str
    path: Path
    description: str
    expect: str
    measured: tuple[dict[str, Any], ...]
    sections: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify recipes ls --json` prints."""
        return {**vars(self), "path": str(self.path), "measured": list(self.measured), "sections": list(self.sections)}


def recipes_folder() -> Path:
    """Find the folder of the shipped recipes: inside an installed fixify, or beside it in a checkout.

    Raises:
        FixifyError: there is none; the installation is damaged.
    """
    checkout = _PACKAGE.parent
    candidates = [_PACKAGE / "_recipes"]
    if (checkout / "pyproject.toml").is_file():  # in site-packages, `recipes` would be another package
        candidates.append(checkout / "recipes")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FixifyError(
        f"The recipes that come with fixify are missing in {_PACKAGE}.",
        hint="Reinstall it: pip install --force-reinstall --no-deps fixify",
    )


def recipe_names() -> list[str]:
    """List the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def list_recipes() -> list[ShippedRecipe]:
    """List the shipped recipes, sorted by name.

    Raises:
        RecipeError: one of the files is damaged.
        FixifyError: they are missing.
    """
    return list(_read_all())


def _read_all() -> Iterator[ShippedRecipe]:
    from fixify.recipes.schema import SECTIONS  # pydantic, which completion does not need

    folder = recipes_folder()
    for name in recipe_names():
        path = folder / f"{name}.yaml"
        parsed = parse(read_text(path))
        if parsed.problems or not isinstance(parsed.values, dict):  # the installed file was edited
            raise RecipeError(str(path), parsed.problems or [Problem(Place(1), "It has no sections.")])
        values = parsed.values
        texts = {key: " ".join(str(values.get(key, "")).split()) for key in ("description", "expect")}
        yield ShippedRecipe(
            name,
            path,
            **texts,
            measured=tuple(values.get("measured", ())),
            sections=tuple(key for key in values if key in SECTIONS),
        )


def find_recipe(name: str | Path) -> Path:
    """Find the file of a recipe.

    Args:
        name: A shipped recipe's name; or a path: it has a folder, ends in .yaml, or is no shipped recipe's name.

    Raises:
        UsageError: there is no such recipe.
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
