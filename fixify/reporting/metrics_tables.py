"""Tables of metrics: an evaluation, a comparison, a finetuning run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from fixify.evaluation import Agreement, Metrics
from fixify.reporting.tables import human_bytes, new_table
from fixify.training import FinetuneResult


def metrics_table(found: Sequence[tuple[str, Metrics]], agreement: Agreement | None = None) -> Table:
    """One row a model; below it, how often two models agree."""
    made = new_table("model", ">top-1 %", ">top-5 %", ">loss", ">ECE %", ">images", ">seconds")
    for name, metrics in found:
        made.add_row(name, *_numbers(metrics), f"{metrics.num_images:,}", f"{metrics.seconds:.1f}")
    if agreement is not None:
        lines = [f"same class on {agreement.same:.2f} % of the images"]
        if agreement.confident_same is not None:
            lines.append(
                f"and on {agreement.confident_same:.2f} % of the {agreement.confident_images:,} "
                f"on which {found[1][0]} is more than 50 % sure"
            )
        lines.append(
            f"only {found[0][0]} right: {agreement.only_second_right:,}; "
            f"only {found[1][0]} right: {agreement.only_first_right:,}"
        )
        made.caption = "\n".join(lines)
        made.caption_justify = "left"
    return made


def finetune_table(result: FinetuneResult) -> Table:
    """The model as it came beside the best validation."""
    made = new_table("", ">top-1 %", ">top-5 %", ">loss", ">ECE %", title=str(result.best_path))
    if result.original_top1 is not None:
        made.add_row("original", f"{result.original_top1:.2f}")
    made.add_row("before training", *_numbers(result.before))
    after = result.after
    best = (after.val_top1, after.val_top5, after.val_loss, after.val_ece)
    made.add_row(f"after {round(after.epochs, 2):g} epochs", *_formatted(*best))
    sent = next((record for record in reversed(result.history) if record.gradient_bytes is not None), None)
    if sent is not None:
        made.caption = (
            f"summed over the processes each update: {human_bytes(sent.gradient_bytes or 0)} of gradients (counted), "
            f"{human_bytes(sent.statistics_bytes or 0)} of statistics"
        )
        made.caption_justify = "left"
    return made


def _numbers(metrics: Metrics) -> tuple[str, ...]:
    return _formatted(metrics.top1, metrics.top5, metrics.loss, metrics.ece)


def _formatted(top1: float, top5: float, loss: float, ece: float) -> tuple[str, ...]:
    return f"{top1:.2f}", f"{top5:.2f}", f"{loss:.4f}", f"{ece:.2f}"
