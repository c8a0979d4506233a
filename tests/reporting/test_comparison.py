"""Learned against fixed: the table and the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fixify.reporting import comparison
from fixify.reporting.comparison import FIGURES, compare_runs, comparison_table, write_figures
from fixify.reporting.run_report import RunReport, report_runs
from fixify.reporting.runs import read_runs


@pytest.fixture
def runs(two_runs: Path) -> list[RunReport]:
    return list(report_runs(read_runs([two_runs / "learned", two_runs / "fixed"])).runs)


def test_the_rows(runs: list[RunReport]) -> None:
    learned, fixed = compare_runs(runs[0], runs[1:])
    assert (learned.top1, fixed.top1) == (86.0, 85.0)  # after 3 epochs of `write_folder`
    assert (learned.difference, fixed.difference) == (0.0, -1.0)
    assert (learned.scale, fixed.scale) == (None, 12.0)
    assert (learned.parameters, fixed.parameters) == (1_000_000, 488_013)
    assert (learned.classifier_parameters, fixed.classifier_parameters) == (512_012, 25)
    assert json.dumps(fixed.to_dict())
    cells = [list(column.cells) for column in comparison_table([learned, fixed]).columns]
    assert cells[5] == ["", "-1.00"] and cells[6] == ["1,000,000", "488,013"]


def test_a_run_without_a_validation_has_no_row(write_run_folder: Callable[..., Path], tmp_path: Path) -> None:
    folders = [
        write_run_folder(tmp_path / name, fixed=name != "learned", done=done)
        for name, done in (("learned", 3), ("fixed", 0))
    ]
    learned, fixed = report_runs(read_runs(folders)).runs
    assert [row.name for row in compare_runs(learned, [fixed])] == ["learned"]


def test_the_figures(runs: list[RunReport], tmp_path: Path) -> None:
    learned, fixed = runs
    assert [path.name for path in write_figures(tmp_path, learned, fixed)] == list(FIGURES[:2])
    held = replace(fixed, options={**fixed.options, "head_fixed_scale": True, "head_scale": 0.1})
    written = write_figures(tmp_path, learned, fixed, [held])
    assert [path.name for path in written] == list(FIGURES)
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 400


def test_what_the_figures_show(runs: list[RunReport]) -> None:
    learned, fixed = runs
    held = replace(fixed, options={**fixed.options, "head_fixed_scale": True, "head_scale": 0.1})
    scale = comparison._scale_figure(fixed).axes[0]
    assert scale.get_xscale() == "log"
    assert scale.lines[0].get_xdata()[0] == 1 and scale.lines[0].get_ydata()[0] == pytest.approx(10)
    training, validation = comparison._error_figure([learned, fixed, held]).axes
    assert [line.get_label() for line in validation.lines] == [
        "learned classifier",
        "fixed (hadamard), α trained",
        "fixed, α = 0.1",
    ]
    assert list(training.lines[0].get_ydata()) == [40.0] * 3
    assert list(validation.lines[0].get_ydata()) == pytest.approx([29, 19, 14])
    assert list(validation.lines[0].get_xdata()) == [1, 2, 3]


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        ([[90.0, 14.0], [50.0, 0.14]], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50", "100"]),
        ([[40.0, 21.0]], ["20", "50"]),  # no tick between them: the axis goes on to the next
        ([[20.0, 20.0]], ["20", "50"]),
        ([[3.0, 0.0]], ["2", "5"]),  # nothing is left out but the 0
        ([[100.0, 90.0]], ["50", "100"]),
        ([[0.0, 0.0]], ["1", "2"]),
    ],
)
def test_errors_far_apart_stay_apart(errors: list[list[float]], shown: list[str]) -> None:
    _, (axes,) = comparison._figure(1)
    for run in errors:
        axes.plot(range(len(run)), run)
    comparison._logarithmic(axes)
    assert [axes.yaxis.get_major_formatter()(tick) for tick in axes.get_yticks()] == shown
    assert axes.get_ylim() == (float(shown[0]), float(shown[-1]))
