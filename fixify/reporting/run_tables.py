"""Runs side by side, for the terminal."""

from __future__ import annotations

from rich.table import Table

from fixify.reporting.run_report import Report
from fixify.reporting.tables import new_table


def runs_table(report: Report) -> Table:
    """One row a run, with its best validation; below it, what came of it."""
    made = new_table("run", "classifier", ">top-1 %", ">top-5 %", ">loss", ">as it came", ">epochs")
    for run in report.runs:
        best = run.best
        numbers = (
            ("", "", "") if best is None else (f"{best.val_top1:.2f}", f"{best.val_top5:.2f}", f"{best.val_loss:.4f}")
        )
        before = "" if run.before is None else f"{run.before.top1:.2f}"
        made.add_row(run.label, run.head, *numbers, before, f"{run.epochs_done:g}/{run.epochs}")
    made.caption = "\n".join(report.verdict)
    made.caption_justify = "left"
    return made
