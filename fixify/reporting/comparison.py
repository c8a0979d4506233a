"""Compare runs that differ only in the head: a table, a page, and the paper's figures 1 to 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from rich.table import Table

from fixify._files import atomic_path, write_atomic
from fixify.reporting.layout import new_table
from fixify.reporting.page import PAGE_FILE, write_page
from fixify.reporting.run_report import RunReport, report_runs
from fixify.reporting.runs import read_runs
from fixify.training.events import EpochRecord

FIGURES = ("figure1-scale.png", "figure2-learned-fixed.png", "figure3-fixed-scales.png")

_COLOURS = ("#0b6e99", "#c2571a", "#4d7c0f", "#7c3aed", "#6b7280")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2)))


@dataclass(frozen=True)
class Compared:
    """One run of a comparison.

    Attributes:
        name: Name of its folder.
        head: The kind of its fixed head, or "learned".
        scale: Alpha at the end, learned or held; None for a learned head.
        top1: The best validation top-1, percent.
        last_top1: The last validation top-1, percent.
        difference: Points of `top1` above the learned head's.
        parameters: Parameters of the trained model.
        classifier_parameters: Those of its classifier.
    """

    name: str
    head: str
    scale: float | None
    top1: float
    last_top1: float
    difference: float
    parameters: int | None
    classifier_parameters: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class WrittenComparison:
    """What `write_comparison` wrote.

    Attributes:
        rows: One per run that was validated, the learned head first.
        page: The HTML page.
        figures: The paper's figures.
    """

    rows: tuple[Compared, ...]
    page: Path
    figures: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify train --compare --json` prints."""
        return {
            "runs": [row.to_dict() for row in self.rows],
            "page": str(self.page),
            "figures": [str(path) for path in self.figures],
        }


def write_comparison(folder: Path, runs: Sequence[Path]) -> WrittenComparison:
    """Write the page and the figures of a comparison.

    Args:
        folder: Where they are written.
        runs: Folders of the runs: the learned head, the fixed one, then those whose alpha was held.

    Raises:
        FormatError: a run cannot be read.
        OutputError: a file cannot be written.
    """
    report = report_runs(read_runs(runs))
    learned, fixed, *held = report.runs
    write_atomic(folder / PAGE_FILE, write_page(report))
    figures = write_figures(folder, learned, fixed, held)
    return WrittenComparison(tuple(compare_runs(learned, [fixed, *held])), folder / PAGE_FILE, tuple(figures))


def compare_runs(learned: RunReport, others: Sequence[RunReport]) -> list[Compared]:
    """Compare runs with the learned one, which comes first; runs without a validation are left out."""
    rows: list[Compared] = []
    for run in (learned, *others):
        if run.best is None:
            continue
        last = run.history[-1]
        rows.append(
            Compared(
                name=run.label,
                head=run.head,
                scale=last.scale,
                top1=run.best.val_top1,
                last_top1=last.val_top1,
                difference=run.best.val_top1 - (rows[0].top1 if rows else run.best.val_top1),
                parameters=None if run.size is None else run.size.parameters,
                classifier_parameters=None if run.size is None else run.size.classifier_parameters,
            )
        )
    return rows


def comparison_table(rows: Sequence[Compared]) -> Table:
    """Show one row per run."""
    made = new_table("run", "head", ">alpha", ">top-1 %", ">last %", ">difference", ">parameters", ">of head")
    for number, row in enumerate(rows):
        made.add_row(
            row.name,
            row.head,
            "" if row.scale is None else f"{row.scale:.3g}",
            f"{row.top1:.2f}",
            f"{row.last_top1:.2f}",
            f"{row.difference:+.2f}" if number else "",
            *("" if count is None else f"{count:,}" for count in (row.parameters, row.classifier_parameters)),
        )
    made.caption = "top-1: the best validation; difference: points above the learned head's"
    made.caption_justify = "left"
    return made


def write_figures(folder: Path, learned: RunReport, fixed: RunReport, scales: Sequence[RunReport] = ()) -> list[Path]:
    """Draw the paper's figures 1 and 2, and figure 3 if there are runs whose alpha was held.

    Args:
        folder: Where the PNG files are written.
        learned: The run with the learned head.
        fixed: The run with the fixed head whose alpha is learned.
        scales: The runs whose alpha was held.

    Raises:
        OutputError: one cannot be written.
    """
    drawn = [(folder / FIGURES[0], _scale_figure(fixed)), (folder / FIGURES[1], _error_figure([learned, fixed]))]
    if scales:
        drawn.append((folder / FIGURES[2], _error_figure([fixed, *scales])))
    for path, figure in drawn:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")
    return [path for path, _ in drawn]


def _scale_figure(fixed: RunReport) -> Figure:
    figure, (axes,) = _figure(1)
    points = [(record.step, record.scale) for record in fixed.steps if record.scale is not None]
    axes.plot([step for step, _ in points], [scale for _, scale in points], color=_COLOURS[0], linewidth=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    axes.set_title("scale α of the fixed head", loc="left", fontsize=10)
    return figure


def _error_figure(runs: Sequence[RunReport]) -> Figure:
    figure, panels = _figure(2)
    for axes, title, top1 in zip(panels, ("training error, %", "validation error, %"), _MEASURES, strict=True):
        for number, run in enumerate(runs):
            points = [(record.epochs, top1(record)) for record in run.history]
            measured = [(epoch, 100 - value) for epoch, value in points if value is not None]
            axes.plot(
                [epoch for epoch, _ in measured],
                [error for _, error in measured],
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_DASHES[number % len(_DASHES)],
                linewidth=1.6,
                label=_name(run),
                marker="o" if len(measured) <= 20 else "",
                markersize=3,
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epoch")
        axes.set_title(title, loc="left", fontsize=10)
        _logarithmic(axes)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(runs), frameon=False, labelcolor="linecolor")
    return figure


def _logarithmic(axes: Axes) -> None:
    """Make the error axis logarithmic: with one error of 90 %, small errors would be indistinguishable on a linear one.

    An error of 0 has no place on it: its line leaves the figure at the bottom.
    """
    drawn = [error for line in axes.get_lines() for error in np.asarray(line.get_ydata()) if error > 0] or [1.0]
    ticks = [step * 10.0**power for power in range(-6, 3) for step in (1, 2, 5)]
    low = max(tick for tick in ticks if tick <= min(drawn))
    high = min(tick for tick in ticks if tick >= max(drawn) and tick > low)
    axes.set_ylim(low, high)  # before the scale, or matplotlib computes limits itself and warns of zeros
    axes.set_yscale("log", nonpositive="clip")
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


_MEASURES: tuple[Callable[[EpochRecord], float | None], ...] = (
    lambda record: record.train_top1,
    lambda record: record.val_top1,
)


def _name(run: RunReport) -> str:
    if run.is_learned:
        return "learned classifier"
    if run.options.get("head_fixed_scale"):
        return f"fixed, α = {run.options['head_scale']:g}"
    return f"fixed ({run.head}), α trained"


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.8 * panels, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    made: list[Axes] = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in made:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, made
