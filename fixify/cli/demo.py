"""Run `fixify demo [FOLDER]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fixify.cli.options import Force, Json
from fixify.cli.output import Output

if TYPE_CHECKING:
    from fixify.cli.progress import TrainingDisplay
    from fixify.demo.run import DemoEvent


def demo(
    folder: Annotated[Path, typer.Argument(help="Where everything is written.")] = Path("fixify-demo"),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of fine-tuning. Default: 2.", show_default=False)
    ] = None,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Train the learned classifier in the same way, to compare.")
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert, fine-tune and evaluate on real images: offline, on the CPU, in about two minutes.

    A small network that reads 500 characters comes with fixify. Its letters and digits are the common case, fewer
    classes than features; all of them show what more classes than features cost. The images are drawn with the
    typefaces of matplotlib, and every accuracy is measured on typefaces that are not used in training.
    """
    from fixify.cli.progress import TrainingDisplay
    from fixify.demo.run import EPOCHS, run_demo
    from fixify.reporting.tables import demo_table, savings_table

    output = Output(as_json=as_json)
    with TrainingDisplay(output) as training:
        result = run_demo(
            folder,
            epochs=EPOCHS if epochs is None else epochs,
            control=control,
            force=force,
            on_event=_DemoDisplay(output, training),
        )
    output.result(
        result.to_dict(),
        savings_table(result.savings),
        "",
        demo_table(result),
    )
    output.say(f"measured in {result.seconds:.0f} s; plot: {result.plot}")
    output.say(f"slim checkpoint: {result.finetuned}")
    output.next_step("fixify convert model.pth", "your own checkpoint, or a model's name")
    output.next_step("fixify finetune --data DATA", "then recover its accuracy (DATA has train/ and val/)")


class _DemoDisplay:
    """Print a line per part of the demo, and show a bar while images are drawn or evaluated."""

    def __init__(self, output: Output, training: TrainingDisplay) -> None:
        self.output = output
        self.training = training
        self.images = training.view.add_hidden("images")

    def __call__(self, event: DemoEvent) -> None:
        """Show an event of the demo."""
        from fixify.demo.run import Counted, StageStarted

        view = self.training.view
        if isinstance(event, StageStarted):
            view.hide(view.epoch, view.whole)
            self.output.say(f"{event.text} ...", style="bold")
        elif isinstance(event, Counted):
            if event.done < event.total:
                view.show_bar(self.images, event.done, event.total, note="images")
            else:
                view.hide(self.images)
        else:
            self.training(event)
