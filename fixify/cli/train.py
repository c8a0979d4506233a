"""`fixify train RECIPE`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fixify.cli.options import MACHINE_PANEL, ClassMap, Force, Json, MaxRestarts, NprocPerNode, RecipeName, Set
from fixify.cli.output import Output
from fixify.cli.watching import TensorBoard, Track, watching
from fixify.cli.workers import is_worker


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
    from fixify.cli.command_line import as_typed
    from fixify.cli.comparing import compare as compare_heads
    from fixify.cli.comparing import scales_of
    from fixify.cli.language import refuse_image_options, train_language
    from fixify.cli.launching import hand_over
    from fixify.cli.recipe_defaults import run_defaults, telling_where_data_comes_from
    from fixify.cli.training_result import report_run
    from fixify.errors import UsageError
    from fixify.recipes.reading import read_recipe
    from fixify.recipes.running import run_recipe, run_section
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
        result = run_recipe(chosen, folder, options, on_event=tell, **given)
    report_run(output, result, options, data if data is not None else str(chosen.data))


def _folder(recipe: str) -> Path:
    """`resnet56` for the recipe of that name, or for resnet56.yaml; `run-again` for run/recipe.yaml."""
    path = Path(recipe)
    if path.name == "recipe.yaml":
        return Path(f"{path.resolve().parent.name}-again")
    return Path(path.stem if path.suffix in (".yaml", ".yml") else path.name)
