"""The demo's picture: accuracy over the epochs, and the scale alpha over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fixify._io import atomic_path

_FIXED, _LEARNED, _QUIET = "#0b6e99", "#c2571a", "#6b7280"


@dataclass(frozen=True)
class Curves:
    """What is drawn.

    Attributes:
        original: Top-1 of the original, percent.
        fixed: Top-1 of the fixed head before training and after each epoch.
        control: The same of the learned classifier trained likewise; empty if it was not.
        scales: (step, alpha).
        num_images: Held-out images behind each accuracy.
    """

    original: float
    fixed: Sequence[float]
    control: Sequence[float]
    scales: Sequence[tuple[int, float]]
    num_images: int


def write_plot(curves: Curves, path: Path) -> None:
    """Draw the curves and write them as PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(9.6, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))

    epochs = range(len(curves.fixed))
    original = f"original {curves.original:.1f}"
    left.axhline(curves.original, color=_QUIET, linewidth=1, linestyle=(0, (5, 3)), zorder=1, label=original)
    if curves.control:
        control = f"learned, trained likewise {curves.control[-1]:.1f}"
        left.plot(
            epochs, curves.control, color=_LEARNED, marker="s", linewidth=1.5, markersize=4, zorder=2, label=control
        )
    fixed = f"fixed {curves.fixed[-1]:.1f}"
    left.plot(epochs, curves.fixed, color=_FIXED, marker="o", linewidth=2, markersize=5, zorder=3, label=fixed)
    left.legend(loc="lower right", frameon=False, fontsize=9, labelcolor="linecolor")
    left.set_xticks(list(epochs))
    left.set_ylim(-3, 109)
    left.set_xlim(-0.15, len(curves.fixed) - 0.85)
    left.set_xlabel("epochs of fine-tuning")
    left.set_title(f"top-1 on typefaces held out ({curves.num_images:,} images), %", loc="left", fontsize=10)

    steps, scales = zip(*curves.scales, strict=True) if curves.scales else ((), ())
    right.plot(steps, scales, color=_FIXED, linewidth=2)
    right.set_xscale("log")
    right.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel("steps of fine-tuning")
    right.set_title("scale α, the head's one learned multiplier", loc="left", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
