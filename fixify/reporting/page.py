"""Write the report of runs as one self-contained HTML page: no network, no script."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fixify._version import __version__
from fixify.reporting.charts import Chart, Series, line_chart
from fixify.reporting.layout import human_bytes
from fixify.reporting.run_report import Report, RunReport, Size

PAGE_FILE = "report.html"


def write_page(report: Report, *, now: datetime | None = None) -> str:
    """Return the page as HTML.

    Args:
        report: The content. Names in it come from data and are escaped.
        now: The date on the page; None takes the current time.
    """
    runs = report.runs
    return render("report.html.j2", now, report=report, runs=runs, charts=charts(runs), sizes=sizes(runs))


def render(template: str, now: datetime | None = None, **content: Any) -> str:
    """Fill in the template of a page.

    Args:
        template: Its file in `templates/`.
        now: The date on the page; None takes the current time.
        content: What the template names. Texts are escaped.
    """
    written = (now or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M UTC")
    return _environment().get_template(template).render(version=__version__, written=written, **content)


def charts(runs: Sequence[RunReport]) -> list[Chart]:
    """Draw accuracy, loss, scale, and training loss by step; a chart without data is left out."""
    made = [_accuracy(runs), _loss(runs), _scale(runs), _training_loss(runs)]
    return [chart for chart in made if chart is not None]


def sizes(runs: Sequence[RunReport]) -> list[Size]:
    """List the sizes of the runs; before each converted run its original, but each original once."""
    found: list[Size] = []
    for run in runs:
        if run.savings is not None:
            saved = run.savings
            original = Size(
                "before fixing",
                None,
                saved.parameters_before,
                saved.classifier_parameters,
                saved.bytes_before,
                saved.classifier_bytes_before,
            )
            if original not in found:
                found.append(original)
        if run.size is not None:
            found.append(run.size)
    return found


def _accuracy(runs: Sequence[RunReport]) -> Chart | None:
    series, notes = [], []
    lowest = min((record.val_top1 for run in runs for record in run.history), default=0.0)
    highest = max((record.val_top1 for run in runs for record in run.history), default=0.0)
    for number, run in enumerate(runs):
        points = [(record.epochs, record.val_top1) for record in run.history]
        start = run.start_top1
        if start is not None and points:
            # A start at chance level would flatten the rest of the chart.
            if start >= lowest - 2 * max(highest - lowest, 5.0):
                points.insert(0, (0.0, start))
            else:
                notes.append(f"{run.label} started at {start:.2f} %, below this chart.")
        series.append(Series(run.label, points, number))
    originals = {run.original_top1 for run in runs if run.original_top1 is not None}
    original = next(iter(originals)) if len(originals) == 1 else None
    if original is not None:
        notes.append(f"Level line: the original, {original:.2f} %.")
    what = "Agreement with the teacher" if all(run.agreement for run in runs) else "Validation top-1"
    return line_chart(
        "accuracy",
        f"{what}, %",
        series,
        x_label="epoch",
        unit=" %",
        reference=None if original is None else (original, "original"),
        limits=(0.0, 100.0),
        caption=" ".join(notes),
    )


def _loss(runs: Sequence[RunReport]) -> Chart | None:
    series = []
    for number, run in enumerate(runs):
        series.append(Series(run.label, [(record.epochs, record.val_loss) for record in run.history], number))
        trained = [(record.epochs, record.train_loss) for record in run.history if record.train_loss is not None]
        series.append(Series("", trained, number, dashed=True))
    return line_chart(
        "loss",
        "Loss",
        series,
        x_label="epoch",
        limits=(0.0, float("inf")),
        caption="Solid: validation. Dashed: training, with augmentation, averaged while the weights change.",
    )


def _scale(runs: Sequence[RunReport]) -> Chart | None:
    series = []
    for number, run in enumerate(runs):
        of_steps = [(float(record.step), record.scale) for record in run.steps if record.scale is not None]
        of_history = [(float(record.step), record.scale) for record in run.history if record.scale is not None]
        series.append(Series(run.label, of_steps or of_history, number))
    return line_chart(
        "scale",
        "Scale alpha of the fixed head",
        series,
        x_label="step (logarithmic)",
        log_x=True,
        caption="In figure 1 of the paper the scale, from random weights, grows with the logarithm of the step.",
    )


def _training_loss(runs: Sequence[RunReport]) -> Chart | None:
    return line_chart(
        "training-loss",
        "Training loss by step",
        [
            Series(run.label, [(float(record.step), record.loss) for record in run.steps], number)
            for number, run in enumerate(runs)
        ],
        x_label="step (logarithmic)",
        log_x=True,
        limits=(0.0, float("inf")),
        caption="Mean over the steps since the point before.",
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fixify.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = human_bytes
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["plain"] = _plain
    return environment


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(_plain(item) for item in value)
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
