"""Which options a command runs with: the library's defaults, then the recipe's, then those on the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import typer

from fixify.cli.output import Output
from fixify.errors import DataError
from fixify.recipes.reading import Recipe, read_recipe, section_of
from fixify.recipes.schema import convert_option_names
from fixify.recipes.shipped import recipe_names
from fixify.training import FinetuneOptions
from fixify.validation import CheckedOptions

_Options = TypeVar("_Options", bound=CheckedOptions)


def chosen_recipe(name: str | None, overrides: Sequence[str]) -> Recipe | None:
    """What `--recipe` and `--set` say; None if neither is there.

    Raises:
        RecipeError, UsageError: see `fixify.recipes.read_recipe`.
    """
    return None if name is None and not overrides else read_recipe(name, overrides)


@contextlib.contextmanager
def telling_where_data_comes_from(recipe: str, data: str | None) -> Iterator[None]:
    """Within the block, a `DataError` about data that a shipped recipe names says that the recipe tells how to get it.

    Args:
        recipe: As it was typed.
        data: `--data`.
    """
    try:
        yield
    except DataError as error:
        if data is not None or recipe not in recipe_names():
            raise
        how = f"How to get what this recipe trains on: fixify recipes show {recipe}"
        raise DataError(error.message, hint=how if error.hint is None else f"{error.hint}\n{how}") from error


def convert_options(context: typer.Context, recipe: Recipe | None) -> dict[str, Any]:
    """Keyword arguments for `fixify.convert`; what is not among them has its default.

    Raises:
        UsageError: the recipe is not for converting.
    """
    options: dict[str, Any] = {} if recipe is None else dict(section_of(recipe, "convert"))
    for name in convert_option_names():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            options[name] = context.params[name]
    return options


def finetune_defaults(output: Output, recipe: Recipe | None, stored: FinetuneOptions | None) -> FinetuneOptions:
    """What `fixify finetune` starts from, before the options on its command line.

    Args and errors: see `run_defaults`; without a recipe it is what is stored, or the library's defaults.
    """
    if recipe is None:
        return stored if stored is not None else FinetuneOptions()
    return run_defaults(output, recipe, "finetune", stored)


def run_defaults(output: Output, recipe: Recipe, section: str, stored: _Options | None) -> _Options:
    """What a run starts from, before the options on the command line.

    Args:
        output: Told if a run that is resumed does not follow its recipe any more.
        recipe: The recipe.
        section: "finetune", "train" or "language".
        stored: The options of the run that is resumed. They win over the recipe, which may have been edited since, but
            not over `--set`: there resuming refuses, and names the difference.

    Raises:
        UsageError: the recipe has no such section.
    """
    wanted: _Options = section_of(recipe, section)
    if stored is None:
        return wanted
    explicit = {option: getattr(wanted, option) for _, option in recipe.overridden}
    start = stored.replace(**explicit)
    if different := _different(start, wanted):
        output.warn(f"the run goes on as it was started; {recipe.name} says {', '.join(different)}.")
    return start


def _different(stored: CheckedOptions, wanted: CheckedOptions) -> list[str]:
    was, now = stored.recipe(), wanted.recipe()
    return [f"{name} {now[name]} (not {was[name]})" for name in now if now[name] != was[name]]
