"""Lay out line charts as data for an SVG template.

matplotlib only chooses the ticks: its own SVG cannot follow a page's fonts and colours, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 92, 12, 42
_LABEL_GAP = 15
_MOST_MARKERS = 40
_LONGEST_LABEL = 13

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: Text at its end; "" for none.
        points: (x, y), with rising x.
        style: Number of its colour and marker: the number of its run.
        dashed: Whether the line is dashed and has no markers.
    """

    label: str
    points: Sequence[Point]
    style: int
    dashed: bool = False


@dataclass(frozen=True)
class Tick:
    """A tick: its place on the axis, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Marker:
    """A marker: its place, and the text that shows on hover."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """A series in the coordinates of the drawing."""

    style: int
    dashed: bool
    path: str
    markers: list[Marker]
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A drawing of `WIDTH` x `HEIGHT` units; the plot is a part of it.

    Attributes:
        name: Its id on the page.
        title: What it shows; it names the y axis too.
        description: The result in words, for screen readers.
        x_label: Label of the x axis.
        caption: Text below the drawing.
        lines: The series.
        x_ticks: Ticks of the x axis.
        y_ticks: Ticks of the y axis.
        reference: A horizontal line: (y, text).
        left, right, top, bottom: Edges of the plot.
        width, height: Size of the drawing.
    """

    name: str
    title: str
    description: str
    x_label: str
    caption: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    reference: tuple[float, str] | None = None
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


@dataclass
class _Axis:
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    spans: tuple[float, float] = (0.0, 1.0)
    decimals: int = field(init=False)

    def __post_init__(self) -> None:
        steps = [b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)]
        self.decimals = max(0, -math.floor(math.log10(min(steps)) + 1e-9)) if steps and not self.log else 0
        # A step such as 2.5 has one digit more than its magnitude shows.
        if steps and not self.log and abs(round(min(steps), self.decimals) - min(steps)) > 1e-9 * abs(min(steps)):
            self.decimals += 1

    def place(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        start, end = self.spans
        return start + (value - low) / (high - low) * (end - start)

    def text(self, value: float) -> str:
        return f"{value:,.{self.decimals}f}"


def line_chart(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    unit: str = "",
    log_x: bool = False,
    reference: tuple[float, str] | None = None,
    limits: tuple[float, float] = (-math.inf, math.inf),
    caption: str = "",
) -> Chart | None:
    """Lay out a chart.

    Args:
        name: See `Chart`, like title, x_label and caption.
        title: See `Chart`.
        series: The lines; those without points are left out.
        x_label: See `Chart`.
        unit: Unit after values in texts.
        log_x: Whether x is logarithmic; points that are not positive are left out.
        reference: A horizontal line: (value, text).
        limits: Smallest and largest y of the axis.
        caption: See `Chart`.

    Returns:
        The chart; None if there is nothing to draw.
    """
    series = [_finite(line, log_x) for line in series]
    series = [line for line in series if line.points]
    if not series:
        return None
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points] + ([reference[0]] if reference else [])
    x_axis, y_axis = _x_axis(min(xs), max(xs), log_x), _y_axis(min(ys), max(ys), limits)
    lines = [_line(line, x_axis, y_axis, x_label, unit) for line in series]
    return Chart(
        name=name,
        title=title,
        description=_described(series, x_label, unit, y_axis),
        x_label=x_label,
        caption=caption,
        lines=_spread(lines),
        x_ticks=[Tick(x_axis.place(tick), x_axis.text(tick)) for tick in x_axis.ticks],
        y_ticks=[Tick(y_axis.place(tick), y_axis.text(tick)) for tick in y_axis.ticks],
        reference=None if reference is None else (y_axis.place(reference[0]), reference[1]),
    )


def _finite(line: Series, log_x: bool) -> Series:
    points = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)]
    return Series(line.label, points, line.style, line.dashed)


def _x_axis(low: float, high: float, log: bool) -> _Axis:
    spans = (_LEFT, WIDTH - _RIGHT)
    if log:
        high = max(high, 10 * low)
        ticks = [tick for tick in LogLocator(numticks=7).tick_values(low, high) if low <= tick <= high * (1 + 1e-9)]
        return _Axis(low, high, ticks, log=True, spans=spans)
    low, high = min(low, 0.0), high if high > min(low, 0.0) else low + 1
    whole = MaxNLocator(nbins=6, integer=high - low >= 2).tick_values(low, high)
    return _Axis(low, high, [tick for tick in whole if low <= tick <= high * (1 + 1e-9)], spans=spans)


def _y_axis(low: float, high: float, limits: tuple[float, float]) -> _Axis:
    pad = 0.06 * (high - low) or max(0.02 * abs(high), 1e-3)
    low, high = max(low - pad, limits[0]), min(high + pad, limits[1])
    if high <= low:
        low, high = low - 1, high + 1
    ticks = [tick for tick in MaxNLocator(nbins=6).tick_values(low, high) if low <= tick <= high]
    return _Axis(low, high, ticks, spans=(HEIGHT - _BOTTOM, _TOP))


def _line(line: Series, x_axis: _Axis, y_axis: _Axis, x_label: str, unit: str) -> Line:
    placed = [(round(x_axis.place(x), 1), round(y_axis.place(y), 1)) for x, y in line.points]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in placed)
    shown = range(len(placed)) if len(placed) <= _MOST_MARKERS else [len(placed) - 1]
    markers = [
        Marker(
            *placed[i],
            f"{line.label}, {x_label.split(' ')[0]} {line.points[i][0]:,.6g}: {line.points[i][1]:,.4f}{unit}",
        )
        for i in ([] if line.dashed else shown)
    ]
    label = line.label if len(line.label) <= _LONGEST_LABEL else line.label[: _LONGEST_LABEL - 1] + "…"
    return Line(line.style, line.dashed, path, markers, label, placed[-1][0] + 9, placed[-1][1])


def _spread(lines: list[Line]) -> list[Line]:
    """Move apart labels that would overlap, within the plot."""
    labelled = sorted((line for line in lines if line.label), key=lambda line: line.label_y)
    heights: list[float] = []
    for line in labelled:
        heights.append(max(line.label_y, heights[-1] + _LABEL_GAP if heights else _TOP))
    lowest: float = HEIGHT - _BOTTOM
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], lowest)
        lowest = heights[i] - _LABEL_GAP
    moved = {id(line): height for line, height in zip(labelled, heights, strict=True)}
    return [
        Line(
            line.style, line.dashed, line.path, line.markers, line.label, line.label_x, round(moved.get(id(line), 0), 1)
        )
        for line in lines
    ]


def _described(series: Sequence[Series], x_label: str, unit: str, y_axis: _Axis) -> str:
    ends = [
        f"{line.label}: from {y_axis.text(line.points[0][1])} to {y_axis.text(line.points[-1][1])}{unit} "
        f"at {x_label.split(' ')[0]} {line.points[-1][0]:,.6g}"
        for line in series
        if line.label
    ]
    return "; ".join(ends) + "."
