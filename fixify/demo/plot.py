"""The demo's picture: accuracy against the bytes that a classifier stores for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fixify._files import atomic_path

_FIXED, _LEARNED, _QUIET = "#0b6e99", "#c2571a", "#6b7280"


@dataclass(frozen=True)
class Classifier:
    """One point of the plot.

    Attributes:
        name: What kind of classifier it is.
        bytes_per_class: What it stores for each class, without the bias.
        top1: Its top-1 on the held-out typefaces, percent.
        trained: Whether it was fine-tuned.
    """

    name: str
    bytes_per_class: float
    top1: float
    trained: bool = False


def write_plot(classifiers: Sequence[Classifier], num_images: int, path: Path) -> None:
    """Draw the accuracy of classifiers against the bytes that they store for each class, and write it as PNG.

    Args:
        classifiers: The original first.
        num_images: Number of held-out images behind each accuracy.
        path: Where to write.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    original, *heads = classifiers
    axes.axhline(original.top1, color=_QUIET, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    untrained = sorted((each.bytes_per_class, each.top1) for each in heads if not each.trained)
    axes.plot(*zip(*untrained, strict=True), color=_FIXED, linewidth=1.5, zorder=2)
    for each in classifiers:
        colour = _LEARNED if each is original else _FIXED
        axes.plot(
            [each.bytes_per_class], [each.top1], marker="s" if each.trained else "o", markersize=7, color=colour,
            linestyle="none", zorder=3,
        )  # fmt: skip
        state = "" if each is original else ", fine-tuned" if each.trained else ", untrained"
        label = f"{each.name}{state}\n{each.top1:.2f} %, {each.bytes_per_class:g} bytes"
        place = (each.bytes_per_class, each.top1)
        side, offset = ("right", (8, -24)) if each is original else ("left", (6, -22))
        if place == untrained[-1] or each.top1 > original.top1:
            offset = (6, 8)  # below it, it would meet the label of the size before, or the original's line
        axes.annotate(label, place, offset, textcoords="offset points", ha=side, fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, 1024)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    lowest, highest = (choose(each.top1 for each in classifiers) for choose in (min, max))
    margin = max(0.1, highest - lowest)
    axes.set_ylim(lowest - 0.35 * margin, highest + 0.25 * margin)
    axes.set_xlabel("bytes per class")
    axes.set_title(f"top-1 on typefaces held out ({num_images:,} images), %", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
