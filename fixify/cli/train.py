"""Run `fixify train RECIPE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixify.cli.launch import hand_over, is_rank_zero, is_worker
from fixify.cli.options import (
    ClassMap,
    Download,
    Force,
    Json,
    MaxRestarts,
    NprocPerNode,
    RecipeName,
    Resume,
    Set,
    TensorBoard,
    Track,
    takes,
)
from fixify.cli.output import Output

if TYPE_CHECKING:
    from fixify.recipes.running import PlannedComparison


@takes("fixify.training.options:TrainOptions", "max_unreadable", "workers", "device", "save_minutes")
def train(
    recipe: RecipeName,
    options: dict[str, Any],
    data: Annotated[
        str | None,
        typer.Option(help="A folder with train/ and val/, or a name. Default: the recipe's.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder of the run. Default: named after the recipe.", show_default=False),
    ] = None,
    set_: Set = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Train with the fixed head and with a learned one: OUT/fixed, OUT/learned."),
    ] = False,
    compare_scales: Annotated[
        str | None,
        typer.Option(
            help="With --compare: one more run per value at which alpha is held. The paper's are 0.1,1,10.",
            show_default=False,
        ),
    ] = None,
    resume: Resume = False,
    download: Download = False,
    nproc_per_node: NprocPerNode = None,
    max_restarts: MaxRestarts = None,
    class_map: ClassMap = None,
    track: Track = None,
    tensorboard: TensorBoard = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train as a recipe says: a network from scratch, with its own classifier or a fixed one, or a language model.

    The options are those of the recipe. --set train.lr=0.2 changes one of them, --set train.head=learned the head.
    Every run writes a recipe.yaml into its folder that repeats the run; so does `fixify finetune`.

    With --compare the runs have the same seed and budget and differ only in the head. Beside their folders are then
    report.html and the paper's figures: alpha by step, and the errors with learned, fixed and held scales.
    """
    import fixify
    from fixify.cli.common import as_typed, report_run, telling_where_data_comes_from
    from fixify.errors import UsageError
    from fixify.recipes.reading import read_recipe
    from fixify.recipes.running import default_folder, plan_comparison, refuse_image_options, run_options, run_section

    output = Output(as_json=as_json)
    chosen = read_recipe(recipe, set_ or [])
    words = run_section(chosen) == "language"
    trackers = [*(track or []), *(["tensorboard"] if tensorboard else [])]
    if words:
        refuse_image_options(
            {
                "--compare-scales": compare_scales,
                "--class-map": class_map,
                "--download": download,
                "--workers": "workers" in options,
                "--max-unreadable": "max_unreadable" in options,
                "--track": trackers,
                "--nproc-per-node": nproc_per_node,
                "torchrun": is_worker(),
                "--max-restarts": max_restarts is not None,
            }
        )
    if compare_scales is not None and not compare:
        raise UsageError("--compare-scales needs --compare.", hint="Add --compare.")
    given: dict[str, Any] = {"data": data, "class_map": class_map, "resume": resume, "force": force}
    given |= {"download": download, "command": as_typed()}
    if compare:
        planned = plan_comparison(chosen, out, _numbers(compare_scales), resume=resume, **options)
        note = planned.note
    else:
        folder = default_folder(recipe) if out is None else out
        run, note = run_options(chosen, folder, resume=resume)
        run = run.replace(**options)
    if note is not None:
        output.warn(note)
    hand_over(nproc_per_node, max_restarts)
    with _listener(output, trackers, words=words) as listener, telling_where_data_comes_from(recipe, data):
        if compare:
            names = list(planned.runs)

            def announce(name: str) -> None:
                output.say(f"{name}, {names.index(name) + 1} of {len(names)} runs", style="bold")

            planned.train(on_run=announce, on_event=listener, **given)
        else:
            result = fixify.train(chosen, folder, run, on_event=listener, **given)
    if compare:
        _report_comparison(output, planned, words=words)
    elif words:
        _report_language(output, [folder])
    else:
        report_run(output, result, run, data if data is not None else str(chosen.data))  # type: ignore[arg-type]


def _numbers(text: str | None) -> list[float]:
    """Read the numbers of `0.1,1,10`; raises UsageError if one is not a number."""
    from fixify.errors import UsageError

    try:
        return [float(part) for part in (text or "").replace(",", " ").split()]
    except ValueError:
        raise UsageError(
            f"--compare-scales takes numbers separated by commas, not {text!r}.",
            hint="For the paper's figure 3: --compare-scales 0.1,1,10",
        ) from None


def _listener(output: Output, trackers: list[str], *, words: bool) -> Any:
    from fixify.cli.progress import LanguageDisplay, watching

    return LanguageDisplay(output) if words else watching(output, trackers)


def _report_comparison(output: Output, planned: PlannedComparison, *, words: bool) -> None:
    from fixify.reporting.comparison import comparison_table, write_comparison

    if words:
        _report_language(output, planned.folders)
    elif is_rank_zero():
        written = write_comparison(planned.folder, planned.folders)
        output.result(written.to_dict(), comparison_table(written.rows))
        output.say(f"page: {written.page}")
        output.say(f"figures: {', '.join(str(path) for path in written.figures)}")


def _report_language(output: Output, folders: list[Path]) -> None:
    from fixify.language.run import BEST_FILE, read_language_runs
    from fixify.reporting.tables import language_table

    found = read_language_runs(folders)
    output.result({"runs": [run.to_dict() for run in found]}, language_table(found))
    output.say(f"checkpoint: {folders[-1] / BEST_FILE}")
