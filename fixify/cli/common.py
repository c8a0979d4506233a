"""Helpers of the commands: the typed command, questions at the terminal, default files, options, results of runs."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.text import Text

from fixify.cli.launch import OUTCOME
from fixify.cli.output import Output
from fixify.errors import AmbiguousArchitectureError, CheckFailed, DataError, UsageError
from fixify.recipes.reading import Recipe, read_recipe
from fixify.recipes.shipped import recipe_names

if TYPE_CHECKING:
    from fixify.checkpoints.open import OpenModel
    from fixify.data import OpenedData
    from fixify.training import FinetuneOptions, FinetuneResult

_PATTERN = "*.fixed.safetensors"

T = TypeVar("T")


def as_typed() -> str:
    """Return the shell line that starts this command again in this folder, with torchrun's processes and nodes."""
    start = ["fixify"]
    if "TORCHELASTIC_RUN_ID" in os.environ and OUTCOME not in os.environ:
        nodes, processes = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        start = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={processes}", "-m", "fixify"]
    return shlex.join([*start, *sys.argv[1:]])


def with_architecture(run: Callable[[str | None], T], arch: str | None, output: Output) -> T:
    """Call `run(arch)`; if several architectures fit and a person is at the terminal, ask which, and call it again.

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
    """Ask for one of the architectures; return None if the input ends."""
    names = list(error.choices)
    output.say(error.message.partition("\n")[0])
    for number, (name, facts) in enumerate(error.choices.items(), start=1):
        output.err.print(Text.assemble(f"  {number}  ", (name, "bold"), f": {facts}" if facts else ""))
    while True:
        answer = output.ask(f"Which one? 1 to {len(names)}, or a name:")
        if answer is None or answer in names:
            return answer
        if answer.isascii() and answer.isdigit() and 1 <= int(answer) <= len(names):
            return names[int(answer) - 1]
        output.say(f"{answer!r} is none of them.")


def opened(ref: str, arch: str | None, output: Output, *, ema: bool = False) -> OpenModel:
    """Open a checkpoint; ask for its architecture if needed, and say what was read of it and what was left out."""
    from fixify.checkpoints.open import open_model

    found = with_architecture(lambda known: open_model(ref, arch=known, ema=ema), arch, output)
    for note in found.notes:
        output.say(note)
    return found


@contextlib.contextmanager
def counting_images(output: Output, what: str) -> Iterator[tuple[Callable[[OpenedData], None], Callable[[int], None]]]:
    """Show a progress bar of images.

    Yields:
        What is called with the data before the first image, and with the number of images so far.
    """
    with output.progress(what) as advance:
        done = 0

        def begin(data: OpenedData) -> None:
            output.say(f"data: {data.description}")
            advance(0, total=len(data))

        def count(images: int) -> None:
            nonlocal done
            advance(images - done)
            done = images

        yield begin, count


def slim_files_here(command: str) -> list[str]:
    """List the slim checkpoints in the current folder, sorted.

    Raises:
        UsageError: there is none.
    """
    found = sorted(str(path) for path in Path().glob(_PATTERN))
    if not found:
        raise UsageError(
            f"No file was given, and there is no {_PATTERN} in {Path.cwd()}.",
            hint=f"fixify {command} FILE, or make one: fixify convert model.pth",
        )
    return found


def the_slim_file_here(command: str) -> str:
    """Return the only slim checkpoint in the current folder.

    Raises:
        UsageError: there is none, or there are several; the message lists them.
    """
    found = slim_files_here(command)
    if len(found) > 1:
        raise UsageError(
            f"There are {len(found)} slim checkpoints here: {', '.join(found)}.",
            hint=f"Name one: fixify {command} {found[0]}",
        )
    return found[0]


def chosen_recipe(name: str | None, overrides: Sequence[str] | None) -> Recipe | None:
    """Read the recipe of `--recipe` and `--set`; return None if neither was given.

    Raises:
        RecipeError, UsageError: see `fixify.recipes.read_recipe`.
    """
    return None if name is None and not overrides else read_recipe(name, overrides or [])


@contextlib.contextmanager
def telling_where_data_comes_from(recipe: str, data: str | None) -> Iterator[None]:
    """Add to a `DataError` raised in the block how to get the data, if a shipped recipe names the data.

    Args:
        recipe: The recipe as it was typed.
        data: `--data`.
    """
    try:
        yield
    except DataError as error:
        if data is not None or recipe not in recipe_names():
            raise
        how = f"How to get the data of this recipe: fixify recipes show {recipe}"
        raise DataError(error.message, hint=how if error.hint is None else f"{error.hint}\n{how}") from error


def report_run(output: Output, result: FinetuneResult, options: FinetuneOptions, data: str) -> None:
    """Print the result of a run, and what to type next.

    Raises:
        CheckFailed: `options.max_drop` was not met.
    """
    from fixify.reporting.layout import human_bytes
    from fixify.reporting.tables import finetune_table

    output.result(
        {
            "best": str(result.best_path),
            "last": str(result.last_path),
            "before": result.before.to_dict(),
            "after": result.after.to_dict(),
            "original_top1": result.original_top1,
            "reached": result.reached,
            "peak_memory_bytes": result.peak_memory or None,
            "start": None if result.start is None else result.start.to_dict(),
            "best_is_start": result.best_is_start,
            "advice": result.advice,
            "history": [record.to_dict() for record in result.history],
        },
        finetune_table(result),
    )
    if result.peak_memory:
        output.say(f"peak memory of this process: {human_bytes(result.peak_memory)}")
    if result.advice is not None:
        output.warn(result.advice)
    if options.max_drop is not None:
        goal = f"within {options.max_drop:g} points of the original's {result.original_top1:.2f} %"
        if not result.reached:
            epochs = "1 epoch" if options.epochs == 1 else f"{options.epochs} epochs"
            raise CheckFailed(
                f"After {epochs} the best top-1 is {result.after.val_top1:.2f} %, not {goal}.",
                hint=f"It is kept in {result.best_path}. Try more --epochs, or a larger --max-drop.",
            )
        steps = f"after step {result.after.step:,}" if result.after.step else "before training"
        output.say(f"stopped {steps}: validation top-1 {result.after.val_top1:.2f} % is {goal}")
    output.next_step(f"fixify eval {result.best_path} --data {data}", "measure it again, or any other checkpoint")
