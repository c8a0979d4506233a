"""Learned against fixed, as in the paper: the runs of one recipe that differ in nothing but the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fixify.errors import OutputExistsError, UsageError
from fixify.recipes.reading import Recipe
from fixify.recipes.running import run_recipe
from fixify.training import FinetuneResult, TrainOptions
from fixify.training.logging import RUN_FILE
from fixify.training.restarting import goes_on

FIXED, LEARNED = "fixed", "learned"


def compared(options: TrainOptions, scales: Sequence[float] = ()) -> dict[str, TrainOptions]:
    """The options of each run, by the name of its folder, in the order in which they are trained.

    Args:
        options: Of the run with the fixed head; the others have its seed and budget.
        scales: Values at which alpha is held, one more run each (the paper's figure 3).

    Raises:
        UsageError: the options are those of a learned head, or a scale is not positive or given twice.
    """
    if options.head == "learned":
        raise UsageError(
            "The recipe trains a learned head; what it is compared with has to be a fixed one.",
            hint="Add --set train.head=auto, or hadamard, orthogonal, simplex.",
        )
    found = {FIXED: options, LEARNED: options.replace(head="learned")}
    for scale in scales:
        name = f"scale-{scale:g}"
        if name in found:
            raise UsageError(f"The scale {scale:g} is given twice.")
        found[name] = options.replace(head_scale=scale, head_fixed_scale=True)
    return found


def compare_recipe(
    recipe: Recipe,
    out: Path | str,
    runs: dict[str, TrainOptions],
    *,
    resume: bool = False,
    force: bool = False,
    on_run: Callable[[str], object] | None = None,
    **given: Any,
) -> dict[str, FinetuneResult]:
    """Train one run after the other, each in a folder of its own.

    Args:
        recipe: See `run_recipe`.
        out: The folder of these folders.
        runs: See `compared`.
        resume: Continue: what is done stays, what was stopped goes on exactly, and what had not begun begins.
        force: Replace runs in these folders.
        on_run: Told the name of each run before it begins.
        given: What else `run_recipe` takes.

    Raises:
        OutputExistsError: one of them exists; told before any is trained.
        FixifyError: see `run_recipe`.
    """
    folders = {name: Path(out) / name for name in runs}
    begun = {name for name, folder in folders.items() if (folder / RUN_FILE).exists()}
    others = {name for name in begun if not goes_on(folders[name])}
    if others and not (resume or force):
        raise OutputExistsError(
            f"There is a run in {folders[min(others)]} already.",
            hint="Go on with --resume, choose another folder with -o, or replace it with --force.",
        )
    results = {}
    for name, options in runs.items():
        if on_run is not None:
            on_run(name)
        results[name] = run_recipe(
            recipe, folders[name], options, resume=resume and name in begun, force=force, **given
        )
    return results
