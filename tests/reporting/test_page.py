"""The page and its charts as text."""

from __future__ import annotations

import html
import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest

from fixify.reporting.charts import HEIGHT, WIDTH, Series, line_chart
from fixify.reporting.page import charts, write_page
from fixify.reporting.run_report import report_runs
from fixify.reporting.runs import read_runs, runs_in

Write = Callable[..., Path]


def page_of(*folders: Path) -> str:
    return write_page(report_runs(read_runs(folders)), now=datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc))


def test_it_loads_nothing_and_escapes_names(two_runs: Path) -> None:
    page = page_of(*runs_in(two_runs))
    assert "<script" not in page and "&lt;script&gt;hacked = 1&lt;/script&gt;&#34;&#39;&amp;amp;" in page
    assert not re.search(r"""(src|href)=["'](?!data:,)""", page)
    assert "url(" not in page and "@import" not in page and "http:" not in page and "https:" not in page
    assert "Written 2026-01-02 03:04 UTC by fixify" in page
    command = re.search(r"<pre.*?><code>(.*?)</code>", page)
    assert command is not None
    plain = html.unescape(re.sub(r"<[^>]*>", "", command[1]))
    assert plain == "fixify finetune net.fixed.safetensors --data 'my data' --epochs 3"
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)  # noqa: S314, ours


def test_a_run_without_a_validation_and_one_without_facts_have_a_page(write_run_folder: Write, tmp_path: Path) -> None:
    page = page_of(write_run_folder(tmp_path / "new", fixed=True, done=0))
    assert "no validation yet" in page and "<figure>" not in page
    page = page_of(write_run_folder(tmp_path / "old", fixed=True, model={}, command=None, before=None))
    assert "No command was recorded" in page and "Parameters and bytes" not in page


def test_ten_thousand_classes_make_no_larger_page_than_twenty(write_run_folder: Write, tmp_path: Path) -> None:
    small = page_of(write_run_folder(tmp_path / "20", fixed=True, num_classes=20))
    large = page_of(write_run_folder(tmp_path / "10000", fixed=True, num_classes=10_000))
    assert len(large) < len(small) + 5_000 and "10,000 classes" in large


def test_the_charts_show_what_was_recorded(two_runs: Path) -> None:
    accuracy, loss, scale, steps = charts(report_runs(read_runs(runs_in(two_runs))).runs)
    assert [line.label for line in accuracy.lines] == ["fixed", "learned"]
    assert [len(line.markers) for line in accuracy.lines] == [4, 4]  # as it came, and three validations
    assert "epoch 3: 85.0000 %" in accuracy.lines[0].markers[-1].title
    assert [line.dashed for line in loss.lines] == [False, True, False, True]
    assert [line.label for line in scale.lines] == ["fixed"]
    assert [tick.text for tick in scale.x_ticks] == ["1", "10", "100"]
    # alpha = 10 + log10(step) is a straight line on this axis
    points = [tuple(map(float, point.split())) for point in scale.lines[0].path[1:].split("L")]
    (x0, y0), (x1, y1) = points[0], points[-1]
    assert all(abs(y - (y0 + (x - x0) / (x1 - x0) * (y1 - y0))) < 0.2 for x, y in points)
    assert len(steps.lines) == 2
    for chart in (accuracy, loss, scale, steps):
        for line in chart.lines:
            numbers = [float(number) for number in re.findall(r"[\d.]+", line.path)]
            assert all(chart.left - 0.1 <= x <= chart.right + 0.1 for x in numbers[::2])
            assert all(chart.top - 0.1 <= y <= chart.bottom + 0.1 for y in numbers[1::2])


def test_labels_do_not_lie_on_each_other() -> None:
    chart = line_chart("a", "a", [Series(f"run {i}", [(0, 1), (1, 2)], i) for i in range(6)], x_label="epoch")
    assert chart is not None
    heights = sorted(line.label_y for line in chart.lines)
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(heights))
    assert heights[0] >= chart.top - 0.1 and heights[-1] <= chart.bottom


@pytest.mark.parametrize("points", [[(1.0, 5.0)], [(1.0, 5.0), (2.0, 5.0)], [(0.0, 0.0)], [(1.0, -3.0), (2.0, 1e9)]])
@pytest.mark.parametrize("log_x", [False, True])
def test_any_points_can_be_drawn(points: list[tuple[float, float]], log_x: bool) -> None:
    chart = line_chart("a", "a", [Series("a", points, 0)], x_label="step", log_x=log_x)
    if chart is None:
        assert log_x and points == [(0.0, 0.0)]
        return
    numbers = [float(number) for number in re.findall(r"[\d.]+", chart.lines[0].path)]
    assert all(0 <= x <= WIDTH for x in numbers[::2]) and all(0 <= y <= HEIGHT for y in numbers[1::2])
    assert len({tick.text for tick in chart.y_ticks}) == len(chart.y_ticks) >= 2


def test_what_is_not_finite_is_left_out() -> None:
    chart = line_chart("a", "a", [Series("a", [(1, float("nan")), (2, float("inf"))], 0)], x_label="step")
    assert chart is None


@pytest.mark.parametrize(("start", "drawn"), [(50.0, True), (0.1, False)])
def test_a_start_at_chance_level_does_not_flatten_the_chart(
    write_run_folder: Write, tmp_path: Path, start: float, drawn: bool
) -> None:
    before = {"top1": start, "top5": 1.0, "loss": 7.0, "ece": 2.0, "num_images": 600, "seconds": 1.0}
    write_run_folder(tmp_path / "a", fixed=True, before=before)
    accuracy = charts(report_runs(read_runs([tmp_path / "a"])).runs)[0]
    assert len(accuracy.lines[0].markers) == (4 if drawn else 3)
    assert ("a started at 0.10 %, below this chart." in accuracy.caption) is not drawn
