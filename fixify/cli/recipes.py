"""Run `fixify recipes ls|show|cp|validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fixify.cli.options import Force, Json, RecipeName
from fixify.cli.output import Output

app = typer.Typer(
    no_args_is_help=True, help="List, show, copy and check recipes: YAML files for --recipe and for fixify train."
)


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List the recipes that come with fixify."""
    from fixify.recipes import list_recipes
    from fixify.reporting.layout import new_table

    output = Output(as_json=as_json)
    recipes = list_recipes()
    table = new_table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("for", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for recipe in recipes:
        table.add_row(recipe.name, ", ".join(recipe.sections), recipe.description)
    output.result({"recipes": [recipe.to_dict() for recipe in recipes]}, table)
    output.next_step("fixify recipes show NAME", "its options, and what to expect")


@app.command("show")
def show(recipe: RecipeName) -> None:
    """Print a recipe's file."""
    from fixify.recipes import find_recipe
    from fixify.recipes.parsing import read_text

    Output().text(read_text(find_recipe(recipe)))


@app.command("cp")
def cp(
    recipe: RecipeName,
    to: Annotated[
        Path | None, typer.Argument(help="A file or a folder. Default: this folder.", show_default=False)
    ] = None,
    force: Force = False,
) -> None:
    """Copy a recipe to edit it."""
    from fixify._files import refuse_existing, write_atomic
    from fixify.errors import OutputExistsError
    from fixify.recipes import find_recipe
    from fixify.recipes.parsing import read_text

    source = find_recipe(recipe)
    target = Path(source.name) if to is None else to / source.name if to.is_dir() else to
    if target.suffix not in (".yaml", ".yml"):
        target = target.with_name(target.name + ".yaml")
    if target.exists() and not force:
        raise OutputExistsError(
            f"{target} exists already.",
            hint=f"Name another file: fixify recipes cp {recipe} FILE. Or add --force to replace it.",
        )
    refuse_existing(target, force=force)
    write_atomic(target, read_text(source))
    output = Output()
    output.say(f"Wrote {target}.")
    output.next_step(f"fixify recipes validate {target}", "after editing: every mistake with its line")


@app.command("validate")
def validate(
    recipes: Annotated[list[str], typer.Argument(help="Files, or names.")],
    as_json: Json = False,
) -> None:
    """Check recipes, and print every mistake with its line. The exit code is 2 if there is one."""
    from fixify.errors import UsageError
    from fixify.recipes import RecipeError, read_recipe
    from fixify.recipes.parsing import Place, Problem

    found: list[dict[str, Any]] = []
    lines: list[str] = []
    for name in recipes:
        problems: tuple[Problem, ...] = ()
        try:
            sections = read_recipe(name).sections
            lines.append(f"{name}: valid, for {' and '.join(sections)}")
        except RecipeError as error:
            problems = error.problems
            lines.append(error.message)
        except UsageError as error:  # it cannot be read at all
            problems = (Problem(Place(), error.message),)
            lines.append(error.message)
        found.append({"recipe": name, "valid": not problems, "problems": [each.to_dict() for each in problems]})
    if as_json:
        Output(as_json=True).result({"recipes": found})
    else:  # not wrapped: one line per mistake, for grep and editors
        Output().text("".join(f"{line}\n" for line in lines))
    if any(not each["valid"] for each in found):
        raise typer.Exit(UsageError.exit_code)
