"""Run `fixify convert SOURCE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixify.cli.options import Force, Json, Out, Recipe, Set, takes
from fixify.cli.output import Output
from fixify.errors import UsageError

if TYPE_CHECKING:
    from fixify.agreement import Choice
    from fixify.conversion import Conversion


@takes("fixify.conversion_options:ConvertOptions")
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint (.pth, .pt, .safetensors) or a model name.")],
    options: dict[str, Any],
    out: Out = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Draw the heads that --agree tried: a .png, .pdf or .svg file.", show_default=False
        ),
    ] = None,
    recipe: Recipe = None,
    set_: Set = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Replace the classifier of a checkpoint by a fixed one, and write the slim checkpoint.

    The backbone is kept bit for bit. No data is needed; `fixify finetune` recovers the accuracy.

    A few hundred images without labels (--calibrate) recover a part of it at once, and show how much.

    SOURCE may also be a classifier without a network: a matrix of text embeddings, or another framework's last layer
    (.npy, .npz, .safetensors). It becomes a slim head alone; --classifier puts it onto a network.

    A checkpoint that was trained with the paper's published code keeps its own fixed classifier, unless --head names
    another.
    """
    import fixify
    from fixify.cli.common import chosen_recipe, with_architecture
    from fixify.cli.libraries import import_libraries
    from fixify.recipes.reading import section_of

    output = Output(as_json=as_json)
    chosen = chosen_recipe(recipe, set_)
    section = None if chosen is None else section_of(chosen, "convert")
    wanted = {} if section is None else section.model_dump(exclude_unset=True)
    wanted |= options
    if plot is not None:
        _check_plot(plot, wanted, force)
    # Mistakes in a recipe are reported before this import, which takes seconds.
    import_libraries()
    from fixify.agreement import AgreementNotReached
    from fixify.reporting.about import calibration_line, removed_line
    from fixify.reporting.tables import savings_table

    def with_arch(known: str | None) -> Conversion:
        shown = 0
        with output.progress("converting") as advance:

            def on_images(count: int) -> None:
                nonlocal shown
                shown += count
                advance(count, note="calibrating")

            def on_progress(what: str, done: int, total: int) -> None:
                nonlocal shown
                advance(done - shown, note=what, total=total)
                shown = done

            return fixify.convert(
                source, out, force=force, on_images=on_images, on_progress=on_progress, **{**wanted, "arch": known}
            )

    try:
        done = with_architecture(with_arch, wanted.get("arch"), output)
    except AgreementNotReached as error:
        _show(error.choice, plot, force, output)
        output.result({"choice": error.choice.to_dict()})
        raise
    _show(done.choice, plot, force, output)
    for note in done.notes:
        output.say(note)
    output.result(
        {
            "path": str(done.path),
            "notes": done.notes,
            "savings": done.savings.to_dict(),
            "calibration": done.info.calibration,
            **({} if done.choice is None else {"choice": done.choice.to_dict()}),
            "info": done.info.model_dump(),
        },
        removed_line(done.savings, done.info.heads),
        savings_table(done.savings),
    )
    if done.info.calibration is not None:
        output.say(f"Calibrated {calibration_line(done.info.calibration)}.")
    output.say(f"Wrote {done.path}.")
    if done.info.is_bare:
        output.next_step(f"fixify export {done.path} --head-only", "for ONNX Runtime and NumPy; in Python: fixify.load")
    elif any(record.spec.is_reference for record in done.info.heads):
        output.next_step(f"fixify eval {done.path} --data DATA", "it is trained already")
    elif chosen is not None and recipe is not None and chosen.finetune is not None:
        data = "" if chosen.data is not None else " --data DATA"
        output.next_step(f"fixify finetune {done.path} --recipe {recipe}{data}", "recover the accuracy")
    else:
        output.next_step(f"fixify finetune {done.path} --data DATA", "recover the accuracy (DATA: train/ and val/)")


def _check_plot(plot: Path, wanted: dict[str, Any], force: bool) -> None:
    from fixify.reporting.benchmark_plots import check_plot

    if wanted.get("agree") is None:
        raise UsageError("--plot draws the heads that --agree tries.", hint="Add --agree 99, or drop --plot.")
    check_plot(plot, force=force)


def _show(choice: Choice | None, plot: Path | None, force: bool, output: Output) -> None:
    """Print the heads that were tried, and draw them if asked."""
    from fixify.reporting.tables import agreement_table

    if choice is None:
        return
    if not output.as_json:
        output.result({}, agreement_table(choice))
    if plot is not None:
        from fixify.reporting.benchmark_plots import plot_agreement

        plot_agreement(choice, plot, force=force)
        output.say(f"plot: {plot}")
