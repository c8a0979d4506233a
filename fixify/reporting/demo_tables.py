"""The demo's result for the terminal."""

from __future__ import annotations

from rich.table import Table

from fixify.demo.run import DemoResult
from fixify.reporting.tables import new_table


def demo_table(result: DemoResult) -> Table:
    """One row a model: what it gets right on the typefaces that were held out."""
    images = result.original_metrics.num_images
    made = new_table(
        "accuracy", ">epochs", ">top-1", ">top-5", title=f"{images:,} images of {result.data.num_classes:,} characters"
    )
    tuned, first, last = result.finetuned_metrics, result.original_metrics, result.converted_metrics
    epochs = str(len(result.history))
    made.add_row("original, learned classifier", "0", _percent(first.top1), _percent(first.top5))
    signs = result.one_shot_metrics
    made.add_row("one sign a weight (--head binary)", "0", _percent(signs.top1), _percent(signs.top5))
    made.add_row("Hadamard codes, just converted", "0", _percent(last.top1), _percent(last.top5))
    made.add_row("Hadamard codes, fine-tuned", epochs, _percent(tuned.top1), _percent(tuned.top5))
    if result.control is not None:
        control = result.control
        made.add_row(
            "control: original, trained likewise", epochs, _percent(control.val_top1), _percent(control.val_top5)
        )
    made.caption = "held-out typefaces; best epoch of each" + ("" if result.control else "; no control was run")
    made.caption_justify = "left"
    return made


def _percent(value: float) -> str:
    return f"{value:.2f} %"
