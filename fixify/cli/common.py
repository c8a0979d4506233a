"""The command that is running, as it was typed."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.text import Text

from fixify._options import CheckedOptions
from fixify.cli.launch import OUTCOME
from fixify.cli.output import Output
from fixify.errors import AmbiguousArchitectureError, DataError, UsageError
from fixify.recipes.reading import Recipe, read_recipe, section_of
from fixify.recipes.schema import convert_option_names
from fixify.recipes.shipped import recipe_names
from fixify.training import FinetuneOptions

if TYPE_CHECKING:
    from fixify.training import FinetuneOptions, FinetuneResult


def as_typed() -> str:
    """A shell line that starts the same again, in the same folder; under torchrun with its processes and nodes."""
    start = ["fixify"]
    if "TORCHELASTIC_RUN_ID" in os.environ and OUTCOME not in os.environ:
        nodes, processes = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        start = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={processes}", "-m", "fixify"]
    return shlex.join([*start, *sys.argv[1:]])


# Asking the person at the terminal what a checkpoint cannot show: which of several architectures it is.


T = TypeVar("T")


def with_architecture(run: Callable[[str | None], T], arch: str | None, output: Output) -> T:
    """Call `run(arch)`; if several architectures fit and somebody is there to say which, ask, and call it again.

    Raises:
        AmbiguousArchitectureError: several fit, and stdin or stderr is no terminal, or there was no answer.
    """
    try:
        return run(arch)
    except AmbiguousArchitectureError as error:
        if not error.choices or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        chosen = _ask(error, output)
        if chosen is None:
            raise
    return run(chosen)


def _ask(error: AmbiguousArchitectureError, output: Output) -> str | None:
    """The architecture that is chosen, or None if the input ends."""
    names = list(error.choices)
    output.say(error.message.partition("\n")[0])
    for number, (name, facts) in enumerate(error.choices.items(), start=1):
        output.err.print(Text.assemble(f"  {number}  ", (name, "bold"), f": {facts}" if facts else ""))
    while True:
        answer = output.ask(f"Which is it? 1 to {len(names)}, or a name:")
        if answer is None or answer in names:
            return answer
        if answer.isascii() and answer.isdigit() and 1 <= int(answer) <= len(names):
            return names[int(answer) - 1]
        output.say(f"{answer!r} is none of them.")


# Finding the slim checkpoint that a command means when none is named.


_PATTERN = "*.fixed.safetensors"


def slim_files_here(command: str) -> list[str]:
    """Names of the slim checkpoints in the current folder, sorted.

    Raises:
        UsageError: there is none.
    """
    found = sorted(str(path) for path in Path().glob(_PATTERN))
    if not found:
        raise UsageError(
            f"No file was named, and there is no {_PATTERN} in {Path.cwd()}.",
            hint=f"fixify {command} FILE, or make one: fixify convert model.pth",
        )
    return found


def the_slim_file_here(command: str) -> str:
    """The one slim checkpoint in the current folder.

    Raises:
        UsageError: there is none, or there are several; the message lists them.
    """
    found = slim_files_here(command)
    if len(found) > 1:
        raise UsageError(
            f"There are {len(found)} slim checkpoints here: {', '.join(found)}.",
            hint=f"Say which: fixify {command} {found[0]}",
        )
    return found[0]


# Which options a command runs with: the library's defaults, then the recipe's, then those on the command line.


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


# What a command prints when a run is done: `finetune` and `train` alike.


def report_run(output: Output, result: FinetuneResult, options: FinetuneOptions, data: str) -> None:
    """Print what came of a run, and what to type next.

    Raises:
        CheckFailed: `options.max_drop` was not met.
    """
    from fixify.errors import CheckFailed
    from fixify.reporting.tables import finetune_table

    output.result(
        {
            "best": str(result.best_path),
            "last": str(result.last_path),
            "before": result.before.to_dict(),
            "after": result.after.to_dict(),
            "original_top1": result.original_top1,
            "reached": result.reached,
            "history": [record.to_dict() for record in result.history],
        },
        finetune_table(result),
    )
    if options.max_drop is not None:
        goal = f"within {options.max_drop:g} points of the original's {result.original_top1:.2f} %"
        if not result.reached:
            raise CheckFailed(
                f"After {options.epochs} epochs the best top-1 is {result.after.val_top1:.2f} %, not {goal}.",
                hint=f"It is kept in {result.best_path}. Try more --epochs, or a larger --max-drop.",
            )
        steps = f"after {result.after.step:,} steps" if result.after.step else "before training"
        output.say(f"stopped {steps}: validation top-1 {result.after.val_top1:.2f} % is {goal}")
    output.next_step(f"fixify eval {result.best_path} --data {data}", "measure it again, or any other checkpoint")
