"""Which options a command runs with: the library's defaults, then the recipe's, then those on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from fixify.cli.output import Output
from fixify.recipes.reading import read_recipe, section_of
from fixify.recipes.schema import convert_option_names
from fixify.training import FinetuneOptions


def convert_options(context: typer.Context, recipe: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for `fixify.convert`; what is not among them has its default.

    Raises:
        RecipeError, UsageError: see `fixify.recipes.read_recipe`; or the recipe is not for converting.
    """
    options: dict[str, Any] = {}
    if recipe is not None or overrides:
        options |= section_of(read_recipe(recipe, overrides), "convert")
    for name in convert_option_names():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            options[name] = context.params[name]
    return options


def finetune_defaults(
    output: Output, recipe: str | None, overrides: Sequence[str], stored: FinetuneOptions | None
) -> FinetuneOptions:
    """What `fixify finetune` starts from, before the options on its command line.

    Args:
        output: Told if a run that is resumed does not follow its recipe any more.
        recipe: The recipe, if there is one.
        overrides: The `--set`s.
        stored: The options of the run that is resumed. They win over the recipe, which may have been edited since, but
            not over what the command line says: then resuming refuses, and names the difference.

    Raises:
        RecipeError, UsageError: see `fixify.recipes.read_recipe`; or the recipe is not for finetuning.
    """
    if recipe is None and not overrides:
        return stored if stored is not None else FinetuneOptions()
    read = read_recipe(recipe, overrides)
    wanted: FinetuneOptions = section_of(read, "finetune")
    if stored is None:
        return wanted
    if recipe is not None and (different := _different(stored, wanted)):
        output.warn(f"the run goes on with the options it was started with; {recipe} says {', '.join(different)}.")
    return stored.replace(**{option: getattr(wanted, option) for _, option in read.overridden})


def _different(stored: FinetuneOptions, wanted: FinetuneOptions) -> list[str]:
    was, now = stored.recipe(), wanted.recipe()
    return [f"{name} {now[name]}, not {was[name]}" for name in now if now[name] != was[name]]
