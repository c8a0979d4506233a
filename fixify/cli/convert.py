"""`fixify convert SOURCE`"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from fixify.cli.options import Arch, Device, Ema, Force, Json, Out, Recipe, Seed, Set
from fixify.cli.output import Output

if TYPE_CHECKING:
    from fixify.conversion import Conversion


def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A checkpoint (.pth, .pt, .safetensors) or a model name.")],
    out: Out = None,
    recipe: Recipe = None,
    set_: Set = None,
    head: Annotated[
        str, typer.Option(help="hadamard, orthogonal, simplex, binary, or auto: hadamard where one is known.")
    ] = "auto",
    seed: Seed = 0,
    arch: Arch = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="A new label set of this size. Default: the classes of SOURCE.")
    ] = None,
    bits_per_class: Annotated[
        int | None, typer.Option(min=1, help="Signs that a binary head stores for a class. Default: one a feature.")
    ] = None,
    match: Annotated[
        bool, typer.Option("--match/--no-match", help="Give each class the code nearest to its old class vector.")
    ] = True,
    alpha: Annotated[
        float | None, typer.Option(min=0, help="Initial alpha. Default: softmax reaches 0.95 at cosine 1.")
    ] = None,
    fixed_scale: Annotated[
        bool, typer.Option("--fixed-scale", help="Alpha stays at --scale and is not learned (paper, figure 3).")
    ] = False,
    bias: Annotated[bool, typer.Option("--bias/--no-bias", help="Keep one learned bias a class.")] = True,
    standardize: Annotated[
        bool, typer.Option("--standardize/--no-standardize", help="Standardise each feature before normalising.")
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help="Store the backbone as float32, float16 or bfloat16. Default: as it is.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="A file of class names, or imagenet. Default: those that came with SOURCE.")
    ] = None,
    ema: Ema = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A folder of images like those the model is for (no labels needed), or a data name, as for finetune: "
            "set center and spread of the features, and fit codes, scale and bias to the original's answers.",
            show_default=False,
        ),
    ] = None,
    calibrate_images: Annotated[int, typer.Option(min=8, help="Images drawn from it; a quarter is held out.")] = 512,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replace the classifier of a checkpoint by a fixed one, and write the slim checkpoint.

    The backbone is kept bit for bit. No data is needed; accuracy comes back with `fixify finetune`.
    A checkpoint that was trained with the paper's published code keeps its own, unless --head names another.
    A few hundred images without labels (--calibrate) bring part of it back at once, and tell how much.
    """
    from fixify.cli.common import chosen_recipe, convert_options, with_architecture
    from fixify.conversion import convert as run
    from fixify.reporting.tables import calibration_line, removed_line, savings_table

    output = Output(as_json=as_json)
    chosen = chosen_recipe(recipe, set_ or [])
    options = convert_options(context, chosen)

    def with_arch(known: str | None) -> Conversion:
        bar = output.progress("calibrating") if options.get("calibrate") is not None else nullcontext()
        with bar as on_images:
            return run(source, out, force=force, on_images=on_images, **options | {"arch": known})

    done = with_architecture(with_arch, options.get("arch"), output)
    for note in done.notes:
        output.say(note)
    savings = done.savings.to_dict()
    output.result(
        {
            "path": str(done.path),
            "notes": done.notes,
            "savings": savings,
            "calibration": done.info.calibration,
            "info": done.info.model_dump(),
        },
        removed_line(done.savings, done.info.heads),
        savings_table(done.savings),
    )
    if done.info.calibration is not None:
        output.say(f"Calibrated {calibration_line(done.info.calibration)}.")
    output.say(f"Wrote {done.path}.")
    if any(record.spec.is_reference for record in done.info.heads):
        output.next_step(f"fixify eval {done.path} --data DATA", "it is trained already")
        return
    same = f" --recipe {recipe}" if chosen is not None and chosen.finetune is not None else ""
    if same and chosen is not None and chosen.data is not None:
        output.next_step(f"fixify finetune {done.path}{same}", "recover the accuracy")
        return
    output.next_step(
        f"fixify finetune {done.path}{same} --data DATA", "recover the accuracy (DATA has train/ and val/)"
    )
