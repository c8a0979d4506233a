"""`fixify train RECIPE --compare`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixify.cli.output import Output
from fixify.cli.workers import is_first

if TYPE_CHECKING:
    from fixify.recipes.reading import Recipe
    from fixify.training import Listener


def scales_of(text: str | None) -> list[float]:
    """The numbers in `0.1,1,10`.

    Raises:
        UsageError: one is not a number.
    """
    from fixify.errors import UsageError

    try:
        return [float(part) for part in (text or "").replace(",", " ").split()]
    except ValueError:
        raise UsageError(
            f"--compare-scales takes numbers with commas between them, not {text!r}.",
            hint="For the paper's figure 3: --compare-scales 0.1,1,10",
        ) from None


def compare(
    output: Output,
    recipe: Recipe,
    folder: Path,
    scales: list[float],
    machine: dict[str, Any],
    *,
    resume: bool,
    tell: Listener,
    **given: Any,
) -> None:
    """Train the runs of a comparison, then write and print what came of them.

    Args:
        output: Of the command.
        recipe: With a `train` section.
        folder: For the folders of the runs, the page and the figures.
        scales: See `fixify.recipes.comparing.compared`.
        machine: Options that suit the machine.
        resume: Continue what is in the folder, with the options that it was begun with.
        tell: Watches the runs.
        given: See `fixify.recipes.comparing.compare_recipe`.
    """
    from fixify._io import write_atomic
    from fixify.cli.recipe_defaults import run_defaults
    from fixify.recipes.comparing import FIXED, LEARNED, compare_recipe, compared
    from fixify.reporting.comparison import compare_runs, comparison_table, write_figures
    from fixify.reporting.page import PAGE_FILE, write_page
    from fixify.reporting.run_report import report_runs
    from fixify.reporting.runs import read_runs
    from fixify.training import TrainOptions, stored_options

    # The fixed run is the first that is begun, and the others' options are its own but for the head.
    stored = stored_options(folder / FIXED, TrainOptions) if resume else None
    options = run_defaults(output, recipe, "train", stored)
    runs = compared(options.replace(**machine), scales)

    def announce(name: str) -> None:
        output.say(f"{name}, {list(runs).index(name) + 1} of {len(runs)} runs", style="bold")

    compare_recipe(recipe, folder, runs, resume=resume, on_run=announce, on_event=tell, **given)
    if not is_first():
        return
    report = report_runs(read_runs([folder / name for name in (LEARNED, FIXED, *list(runs)[2:])]))
    learned, fixed, *held = report.runs
    page = folder / PAGE_FILE
    write_atomic(page, write_page(report))
    figures = write_figures(folder, learned, fixed, held)
    rows = compare_runs(learned, [fixed, *held])
    output.result(
        {"runs": [row.to_dict() for row in rows], "page": str(page), "figures": [str(path) for path in figures]},
        comparison_table(rows),
    )
    output.say(f"page: {page}")
    output.say(f"figures: {', '.join(str(path) for path in figures)}")
