"""Plots of benchmarks and of the heads that `convert --agree` tries, in the format that the file's name says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fixify._files import atomic_path, refuse_existing
from fixify.agreement import Choice
from fixify.benchmarks.convert import ConvertBenchmark
from fixify.benchmarks.head import HeadBenchmark
from fixify.benchmarks.loss import WAYS, LossBenchmark
from fixify.benchmarks.machine import Machine
from fixify.benchmarks.samples import Size
from fixify.errors import UsageError

FORMATS = ("png", "pdf", "svg")

_COLOURS = ("#0b6e99", "#c2571a", "#4d7c0f", "#7c3aed", "#6b7280", "#b91c1c", "#0f766e")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WAY_NAMES = {"learned": "learned (nn.Linear)", "plain": "fixed, all logits", "blocked": "fixed, in blocks"}


def check_plot(path: Path, *, force: bool = False) -> None:
    """Check, before anything is measured, that a plot can be written.

    Raises:
        UsageError: the ending is not one of `FORMATS`.
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise UsageError(
            f"{path} does not end in {', '.join('.' + name for name in FORMATS)}.", hint="For example: --plot bench.png"
        )
    refuse_existing(path, force=force)


def draw(found: HeadBenchmark | LossBenchmark | ConvertBenchmark, path: Path, *, force: bool = False) -> None:
    """Draw a benchmark as its kind is drawn.

    Raises:
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    if isinstance(found, HeadBenchmark):
        plot_head(found, path, force=force)
    elif isinstance(found, LossBenchmark):
        plot_loss(found, path, force=force)
    else:
        plot_convert(found, path, force=force)


def plot_head(found: HeadBenchmark, path: Path, *, force: bool = False) -> None:
    """Draw the ratios: one panel per number of threads and batch, one line per kind, over the sizes.

    Raises:
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    threads = sorted({row.threads for row in found.rows})
    batches = sorted({row.batch for row in found.rows})
    sizes = list(dict.fromkeys(row.size for row in found.rows))
    figure, panels = _figure(len(threads), len(batches), height=max(1.6, 0.28 * len(sizes) + 0.6), same_x=True)
    for i, count in enumerate(threads):
        for j, batch in enumerate(batches):
            axes = panels[i][j]
            rows = {row.size: row for row in found.rows if (row.threads, row.batch) == (count, batch)}
            for number, kind in enumerate(found.kinds):
                points = [
                    (rows[size].ratios[kind], place)
                    for place, size in enumerate(sizes)
                    if size in rows and kind in rows[size].ratios
                ]
                _dots(axes, points, number, kind)
            axes.axvline(1.0, color="#111827", linewidth=1)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_yticks(range(len(sizes)), [str(size) for size in sizes] if j == 0 else [""] * len(sizes))
            axes.set_ylim(len(sizes) - 0.5, -0.5)
            axes.set_title(f"batch {batch}, {count} thread{'s' if count > 1 else ''}", loc="left", fontsize=9)
    label = "time of nn.Linear / time of the head (right of 1: the head is faster)"
    _finish(figure, panels[0][0], found.machine, path, columns=len(found.kinds), label=label, force=force)


def plot_loss(found: LossBenchmark, path: Path, *, force: bool = False) -> None:
    """Draw time and peak memory over the number of classes, one line per way to compute the loss.

    Raises:
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    figure, panels = _figure(1, 2, height=3.4)
    for axes, title, field, factor in (
        (panels[0][0], "time, seconds", "seconds", 1.0),
        (panels[0][1], "peak memory, GB", "peak_bytes", 1e-9),
    ):
        for number, way in enumerate(WAYS):
            points = [
                (row.num_classes, factor * value)
                for row in found.rows
                if (value := getattr(row.costs[way], field)) is not None
            ]
            axes.plot(
                [classes for classes, _ in points],
                [value for _, value in points],
                color=_COLOURS[number],
                marker=_MARKERS[number],
                markersize=4,
                linewidth=1.6,
                label=_WAY_NAMES[way],
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("classes")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda classes, _: _shortened(classes)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"{title} (N = {found.num_features}, batch {found.batch})", loc="left", fontsize=9)
    budget = found.budget * 1e-9
    panels[0][1].axhline(budget, color="#111827", linewidth=1, linestyle=(0, (4, 3)))
    panels[0][1].annotate("budget", (0.01, budget), xycoords=("axes fraction", "data"), fontsize=8, va="top")
    _finish(figure, panels[0][0], found.machine, path, columns=len(WAYS), force=force)


def plot_convert(found: ConvertBenchmark, path: Path, *, force: bool = False) -> None:
    """Draw time and memory of the conversions, one line of points per size and kind.

    Raises:
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    sizes: list[Size] = list(dict.fromkeys(row.size for row in found.rows))
    kinds = list(dict.fromkeys(row.kind for row in found.rows))
    figure, panels = _figure(1, 2, height=max(2.2, 0.5 * len(sizes) + 1.4))
    for axes, title, field in (
        (panels[0][0], "time, seconds", "seconds"),
        (panels[0][1], "peak memory / weights", "memory_ratio"),
    ):
        for number, kind in enumerate(kinds):
            points = [
                (value, sizes.index(row.size))
                for row in found.rows
                if row.kind == kind and (value := getattr(row, field)) is not None
            ]
            _dots(axes, points, number, kind)
        if field == "seconds":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)
        axes.set_yticks(range(len(sizes)), [str(size) for size in sizes] if field == "seconds" else [""] * len(sizes))
        axes.set_ylim(len(sizes) - 0.5, -0.5)
        axes.set_title(title, loc="left", fontsize=9)
    _finish(figure, panels[0][0], found.machine, path, columns=len(kinds), force=force)


def plot_agreement(choice: Choice, path: Path, *, force: bool = False) -> None:
    """Draw the agreement of the heads that `convert --agree` tried over their bytes per class.

    Raises:
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    figure, panels = _figure(1, 1, height=3.4)
    axes, walked = panels[0][0], choice.walked
    sizes = [tried.bytes_per_class for tried in walked]
    axes.plot(sizes, [tried.agreement for tried in walked], "-o", color=_COLOURS[0], markersize=5, label="agreement")
    axes.vlines(
        sizes,
        [tried.bound for tried in walked],
        [tried.agreement for tried in walked],
        color=_COLOURS[0],
        linewidth=1,
        label="at least, with 95 % confidence",
    )
    axes.axhline(choice.target, color="#111827", linewidth=1, linestyle=(0, (4, 3)), label=f"{choice.target:g} %")
    if choice.chosen is not None:
        point = (choice.chosen.bytes_per_class, choice.chosen.agreement)
        axes.plot(*point, "o", markersize=11, markerfacecolor="none", color=_COLOURS[1], label="chosen")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes per class")
    axes.set_ylabel("the original's answer, % of held-out images", fontsize=9)
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=8)
    with atomic_path(path, force=force) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().removeprefix("."))


def _shortened(count: float) -> str:
    """Write a power of ten.

    >>> _shortened(100_000), _shortened(10_000_000)
    ('100k', '10M')
    """
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}k" if count >= 1e3 else f"{count:g}"


def _figure(rows: int, columns: int, *, height: float, same_x: bool = False) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(max(3.0 * columns, 6.0), height * rows + 0.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    made: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False, sharex=same_x).tolist()
    for axes in (each for row in made for each in row):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    return figure, made


def _finish(
    figure: Figure, first: Axes, machine: Machine, path: Path, *, columns: int, force: bool, label: str = ""
) -> None:
    lines, names = first.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
    cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
    below = f"{machine.processor}, {cores}; torch {machine.versions['torch']}, fixify {machine.versions['fixify']}"
    figure.supxlabel(f"{label}\n{below}" if label else below, fontsize=8)
    with atomic_path(path, force=force) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().removeprefix("."))


def _dots(axes: Axes, points: Sequence[tuple[float, int]], number: int, label: str) -> None:
    """Draw the values of the kind with this number, one dot per size."""
    axes.plot(
        [value for value, _ in points],
        [place for _, place in points],
        _MARKERS[number % len(_MARKERS)],
        color=_COLOURS[number % len(_COLOURS)],
        markersize=5,
        alpha=0.85,
        label=label,
    )
