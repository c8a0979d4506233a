"""Run `fixify finetune [SLIM] --data DATA`, or with a recipe that names both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fixify.cli.options import (
    PANELS,
    ClassMap,
    Download,
    Force,
    Json,
    MaxRestarts,
    NprocPerNode,
    Recipe,
    RecipeData,
    Resume,
    Set,
    TensorBoard,
    Track,
    takes,
)
from fixify.cli.output import Output


@takes("fixify.training.options:FinetuneOptions")
def finetune(
    options: dict[str, Any],
    slim: Annotated[
        Path | None, typer.Argument(help="A slim checkpoint. Default: the one in this folder.", show_default=False)
    ] = None,
    data: RecipeData = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder of the run. Default: SLIM's name + -finetuned.", show_default=False),
    ] = None,
    recipe: Recipe = None,
    set_: Set = None,
    against: Annotated[
        str | None, typer.Option(help="The original, whose top-1 is measured for --max-drop.", show_default=False)
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            help="The teacher, usually the original: a checkpoint or a name.",
            rich_help_panel=PANELS["distillation"],
            show_default=False,
        ),
    ] = None,
    no_distill: Annotated[
        bool,
        typer.Option(
            "--no-distill",
            help="No teacher. Default: the original, if it is known (--against, or beside SLIM under its recorded name "
            "and hash) and the codes are matched to it or have one bit per weight or more. With one bit or more and no "
            "original: the checkpoint itself.",
            rich_help_panel=PANELS["distillation"],
        ),
    ] = False,
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
    """Train a slim checkpoint, so that the network fits its fixed classifier.

    The folder of the run gets best.fixed.safetensors and last.fixed.safetensors, metrics.jsonl, timm's summary.csv, and
    the state from which --resume continues.

    The data must have the checkpoint's classes. Labels are matched by class name if the checkpoint has names.

    If no validation is better than the start, best.fixed.safetensors is the start. For heads with one bit per weight or
    more, gained minus lost images must be more than chance: 2 sqrt(gained + lost). With --max-drop the highest top-1
    wins.

    A recipe may name data, checkpoint, against, distill and class_map; options of the command line take precedence.

    With --max-drop 0.5 --against ORIGINAL --val-every 100 training stops as soon as the goal is reached.
    """
    import fixify
    from fixify.cli.common import as_typed, chosen_recipe, report_run, the_slim_file_here
    from fixify.cli.launch import hand_over
    from fixify.cli.progress import watching
    from fixify.errors import UsageError
    from fixify.recipes.running import starting_options
    from fixify.training import FinetuneOptions, finetune_folder, stored_options

    output = Output(as_json=as_json)
    chosen = chosen_recipe(recipe, set_)
    said = {"data": data, "checkpoint": slim, "against": against, "distill": distill, "class_map": class_map}
    about: dict[str, Any] = {
        name: getattr(chosen, name, None) if value is None else value for name, value in said.items()
    }
    if about["data"] is None:
        where = "there is no recipe" if recipe is None else f"the recipe {recipe} names none"
        raise UsageError(
            f"No training data given: --data is missing, and {where}.",
            hint="Add --data DATA: a folder with train/ and val/, or a name; or a line `data: DATA` to a recipe.",
        )
    if no_distill and distill is not None:
        raise UsageError(f"--no-distill and --distill {distill} exclude each other.", hint="Drop one of them.")
    # A recipe names all that a run learns from.
    alone = no_distill or (recipe is not None and about["distill"] is None)
    teacher: str | Literal[False] | None = False if alone else about["distill"]
    source = Path(about["checkpoint"] or the_slim_file_here("finetune"))
    folder = finetune_folder(source) if out is None else out
    for name in ("distill_weight", "distill_temperature"):
        if name in options and about["distill"] is None:
            raise UsageError(f"--{name.replace('_', '-')} needs a teacher.", hint="Add --distill ORIGINAL.")
    stored = stored_options(folder, FinetuneOptions) if resume else None
    start, note = stored or FinetuneOptions(), None
    if chosen is not None:
        start, note = starting_options(chosen, "finetune", stored)
    if note is not None:
        output.warn(note)
    run = start.replace(**options)
    hand_over(nproc_per_node, max_restarts)
    with watching(output, [*(track or []), *(["tensorboard"] if tensorboard else [])]) as listener:
        result = fixify.finetune(
            source,
            about["data"],
            folder,
            run,
            against=about["against"],
            distill=teacher,
            resume=resume,
            force=force,
            download=download,
            class_map=about["class_map"],
            command=as_typed(),
            on_event=listener,
        )
    report_run(output, result, run, about["data"])
