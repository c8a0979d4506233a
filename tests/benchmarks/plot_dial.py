"""Plot accuracy against stored bytes per class from the results of tests/benchmarks/retrofit.py.

python tests/benchmarks/plot_dial.py tests/benchmarks/results/kanji-256.jsonl tests/benchmarks/results/dial.png
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from retrofit import chosen, read

FAMILIES = {
    "binary": ("signs (fixify --bits-per-class)", "#1769aa", "o"),
    "fixed, matched + centered": ("matched Hadamard codes (fixify)", "#2a8f4b", "D"),
    "SVD": ("truncated SVD, float16", "#b3541e", "s"),
    "int": ("integers, 2 to 8 bits", "#7a4fa3", "^"),
}


def points(path: Path, column: int) -> dict[str, list[tuple[float, float]]]:
    """Return (bytes per class, mean top-1) by family, of the rows that have the column (0: no training, -1: all)."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row, entries in chosen(read(path)).items():
        family = next((name for name in FAMILIES if row.startswith(name) and not row.endswith("distilled")), None)
        if family and (column == 0 or len(entries[0]["top1"]) > 1):
            mean = statistics.mean(entry["top1"][column] for entry in entries)
            found[family].append((entries[0]["bytes"], mean))
    return {family: sorted(values) for family, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, constrained_layout=True)
    control = [entry["top1"] for entry in chosen(read(arguments.results))["learned, continued (control)"]]
    for axis, column, title in ((axes[0], 0, "no training"), (axes[1], -1, "after the whole budget")):
        for family, values in points(arguments.results, column).items():
            label, colour, marker = FAMILIES[family]
            axis.plot(*zip(*values, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.3, label=label)
        level = statistics.mean(values[column] for values in control)
        axis.axhline(level, color="#555555", linewidth=0.8, linestyle="--", label="learned classifier (float32)")
        axis.set_xscale("log", base=2)
        ticks = [2, 4, 8, 16, 32, 64, 128, 256]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("stored bytes per class")
        axis.set_title(title, fontsize=10)
        axis.grid(color="#dddddd", linewidth=0.6)
    axes[0].set_ylabel("top-1 on held-out typefaces, %")
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="lower right", frameon=False, fontsize=8)
    figure.savefig(arguments.out, dpi=150)


if __name__ == "__main__":
    main()
