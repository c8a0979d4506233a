"""`fixify train RECIPE --compare`"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixify.cli.launch import is_rank_zero, is_worker
from fixify.cli.options import MACHINE_PANEL, ClassMap, Force, Json, MaxRestarts, NprocPerNode, RecipeName, Set
from fixify.cli.output import Output
from fixify.cli.progress import TensorBoard, Track, watching

if TYPE_CHECKING:
    from fixify.language.options import LanguageOptions
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


def compare_heads(
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
        scales: See `fixify.recipes.running.compared`.
        machine: Options that suit the machine.
        resume: Continue what is in the folder, with the options that it was begun with.
        tell: Watches the runs.
        given: See `fixify.recipes.running.compare_recipe`.
    """
    from fixify._files import write_atomic
    from fixify.cli.common import run_defaults
    from fixify.recipes.running import FIXED, LEARNED, compare_recipe, compared
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
    if not is_rank_zero():
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


# `fixify train RECIPE` where the recipe is of a language model.


def refuse_image_options(given: Mapping[str, object]) -> None:
    """Refuse options that are about images.

    Args:
        given: By their name on the command line; None, False or empty where they were not given.

    Raises:
        UsageError: one was given.
    """
    from fixify.errors import UsageError

    wrong = [name for name, value in given.items() if value]
    if wrong:
        raise UsageError(f"{wrong[0]} is for images, and the recipe is of a language model.", hint="Leave it out.")


def train_language(
    output: Output,
    recipe: Recipe,
    folder: Path,
    *,
    machine: Mapping[str, Any],
    compare: bool,
    resume: bool,
    **given: Any,
) -> None:
    """Train as the recipe's `language` section says, with --compare learned words too, and print what came of it.

    Args:
        output: Of the command.
        recipe: With a `language` section.
        folder: Of the run, or of the folders of both.
        machine: Options that suit the machine.
        compare: Whether to train learned words as well.
        resume: Continue what is in the folder.
        given: See `fixify.recipes.running.run_language_recipe`.
    """
    from fixify.cli.common import run_defaults
    from fixify.cli.progress import LanguageDisplay
    from fixify.errors import UsageError
    from fixify.language.options import LanguageOptions
    from fixify.language.run import read_language_runs
    from fixify.recipes.running import FIXED, LEARNED, run_language_recipe
    from fixify.reporting.tables import language_table
    from fixify.training import stored_options
    from fixify.training.run_folder import RUN_FILE

    own = folder / FIXED if compare else folder
    stored = stored_options(own, LanguageOptions) if resume else None
    options: LanguageOptions = run_defaults(output, recipe, "language", stored).replace(**machine)
    runs = {own: options}
    if compare:
        if options.is_learned:
            raise UsageError(
                f"The recipe's words are {options.words}; what they are compared with has to be fixed.",
                hint="Add --set language.words=pmi, or word2vec, orthogonal, hadamard.",
            )
        runs = {folder / LEARNED: options.with_learned_words(), own: options}
    for path, chosen in runs.items():
        if compare:
            output.say(f"{path.name}, {list(runs).index(path) + 1} of {len(runs)} runs", style="bold")
        goes_on = resume and (path / RUN_FILE).exists()
        with LanguageDisplay(output) as tell:
            run_language_recipe(recipe, path, chosen, resume=goes_on, on_event=tell, **given)
    found = read_language_runs(list(runs))
    output.result({"runs": [run.to_dict() for run in found]}, language_table(found))
    output.say(f"checkpoint: {own / 'best.safetensors'}")


# `fixify train RECIPE`


def train(
    recipe: RecipeName,
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
        typer.Option(
            "--compare", help="Train with the fixed head and with a learned one: OUT/fixed, OUT/learned, and figures."
        ),
    ] = False,
    compare_scales: Annotated[
        str | None,
        typer.Option(
            help="With --compare: a run more for each value, at which alpha is held; the paper's are 0.1,1,10.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder, exactly.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Download torch/... data that is not here.")] = False,
    nproc_per_node: NprocPerNode = None,
    max_restarts: MaxRestarts = None,
    save_minutes: Annotated[
        float | None,
        typer.Option(
            help="Write the state so often, not only after validations. Default: 10.0.",
            rich_help_panel=MACHINE_PANEL,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--workers",
            help="Loader processes. Default: fits the machine.",
            rich_help_panel=MACHINE_PANEL,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, mps ... Default: auto.", rich_help_panel=MACHINE_PANEL, show_default=False),
    ] = None,
    class_map: ClassMap = None,
    track: Track = None,
    tensorboard: TensorBoard = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train as a recipe says: a network from scratch, with its own classifier or a fixed one; or a language model.

    Every option is the recipe's; --set train.lr=0.2 changes one, --set train.head=learned the head. The recipe.yaml
    that every run leaves in its folder repeats it, also one of `fixify finetune`.

    With --compare the runs have one seed and one budget and differ in the head alone. Beside their folders it leaves
    report.html and the paper's figures: alpha by step, and the errors of learned, fixed and held scales.
    """
    from fixify.cli.common import as_typed, report_run, run_defaults, telling_where_data_comes_from
    from fixify.cli.launch import hand_over
    from fixify.errors import UsageError
    from fixify.recipes.reading import read_recipe
    from fixify.recipes.running import run_section, train_recipe
    from fixify.recipes.schema import SECTIONS
    from fixify.training import stored_options

    output = Output(as_json=as_json)
    chosen = read_recipe(recipe, set_ or [])
    section = run_section(chosen)
    folder = _folder(recipe) if out is None else out
    machine = {
        name: value
        for name, value in (("save_minutes", save_minutes), ("workers", workers), ("device", device))
        if value is not None
    }
    given: dict[str, Any] = {
        "data": data,
        "resume": resume,
        "force": force,
        "download": download,
        "class_map": class_map,
        "command": as_typed(),
    }
    trackers = [*(track or []), *(["tensorboard"] if tensorboard else [])]
    if section == "language":
        refuse_image_options(
            {
                "--compare-scales": compare_scales,
                "--class-map": class_map,
                "--download": download,
                "--workers": workers is not None,
                "--track": trackers,
                "--nproc-per-node": nproc_per_node,
                "torchrun": is_worker(),
                "--max-restarts": max_restarts is not None,
            }
        )
        for name in ("download", "class_map"):
            del given[name]
        with telling_where_data_comes_from(recipe, data):
            train_language(output, chosen, folder, machine=machine, compare=compare, **given)
        return
    if compare and section != "train":
        raise UsageError(
            f"--compare trains from scratch, and {recipe} has no train: section.", hint="Leave out --compare."
        )
    if compare_scales is not None and not compare:
        raise UsageError("--compare-scales is for a comparison.", hint="Add --compare.")
    hand_over(nproc_per_node, max_restarts)
    if compare:
        with watching(output, trackers) as tell, telling_where_data_comes_from(recipe, data):
            compare_heads(output, chosen, folder, scales_of(compare_scales), machine, tell=tell, **given)
        return
    stored: Any = stored_options(folder, SECTIONS[section]) if resume else None  # type: ignore[type-var]
    options = run_defaults(output, chosen, section, stored).replace(**machine)
    with watching(output, trackers) as tell, telling_where_data_comes_from(recipe, data):
        result = train_recipe(chosen, folder, options, on_event=tell, **given)
    report_run(output, result, options, data if data is not None else str(chosen.data))


def _folder(recipe: str) -> Path:
    """`resnet56` for the recipe of that name, or for resnet56.yaml; `run-again` for run/recipe.yaml."""
    path = Path(recipe)
    if path.name == "recipe.yaml":
        return Path(f"{path.resolve().parent.name}-again")
    return Path(path.stem if path.suffix in (".yaml", ".yml") else path.name)
