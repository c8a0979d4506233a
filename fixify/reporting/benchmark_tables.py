"""Tables of benchmarks for the terminal: ratios first. They fit 80 columns."""

from __future__ import annotations

from rich.table import Table

from fixify.benchmarks.convert import ConvertBenchmark
from fixify.benchmarks.head import Comparison, HeadBenchmark
from fixify.benchmarks.loss import Cost, LossBenchmark
from fixify.benchmarks.machine import Machine
from fixify.benchmarks.step import Phases, StepBenchmark
from fixify.reporting.layout import human_bytes, new_table

_PHASES = {
    "head and loss, forward": "head_forward",
    "head and loss, backward": "head_backward",
    "optimiser": "optimiser",
    "all-reduce": "all_reduce",
    "rest (the backbone)": "rest",
    "the whole step": "total",
}
_MOST_REGRESSIONS = 20


def head_table(found: HeadBenchmark) -> Table:
    """Show one row per size, threads and batch: the ratio of each kind, and the time of `nn.Linear`."""
    what = "forward and backward" if found.backward else "forward, eval mode"
    made = new_table(
        ">N x C", ">threads", ">batch", *(f">{kind}" for kind in found.kinds), ">nn.Linear",
        title=f"time of nn.Linear / time of the head ({what}); above 1 the head is faster",
    )  # fmt: skip
    before = None
    for row in found.rows:
        ratios = [_ratio(row.ratios.get(kind)) for kind in found.kinds]
        group = (row.size, row.threads)
        shown = ["", ""] if group == before else [str(row.size), str(row.threads)]
        made.add_row(*shown, str(row.batch), *ratios, human_seconds(row.linear))
        before = group
    return _with_machine(made, found.machine)


def comparison_table(found: Comparison) -> Table:
    """Show the ratios that fell by more than the tolerance, the worst first."""
    made = new_table(
        ">N x C", ">threads", ">batch", "kind", ">reference", ">here", ">lost",
        title=f"ratios that lost more than {100 * found.tolerance:.0f} %",
    )  # fmt: skip
    for change in found.regressions[:_MOST_REGRESSIONS]:
        made.add_row(
            str(change.size),
            str(change.threads),
            str(change.batch),
            change.kind,
            _ratio(change.reference),
            _ratio(change.ratio),
            f"{100 * change.share:.0f} %",
        )
    return made


def loss_table(found: LossBenchmark) -> Table:
    """Show one row per number of classes: time and memory against the loss in blocks, then all costs."""
    made = new_table(
        ">C", ">learned", ">plain", ">learned", ">plain", ">learned", ">plain", ">blocked",
        title=f"cross-entropy, forward and backward: N = {found.num_features}, batch {found.batch}, {found.kind}",
    )  # fmt: skip
    made.add_row("", "time /", "time /", "memory /", "memory /", "time", "time", "time", style="bold")
    made.add_row("", "blocked", "blocked", "blocked", "blocked", "memory", "memory", "memory", style="bold")
    for row in found.rows:
        made.add_row(
            f"{row.num_classes:,}",
            *(_ratio(row.time_ratio(way)) for way in ("learned", "plain")),
            *(_ratio(row.memory_ratio(way)) for way in ("learned", "plain")),
            *(_time(row.costs[way]) for way in ("learned", "plain", "blocked")),
        )
        made.add_row("", "", "", "", "", *(_memory(row.costs[way]) for way in ("learned", "plain", "blocked")))
    note = (
        "learned: nn.Linear; plain: the fixed head and F.cross_entropy; blocked: FixedClassifier.loss\n"
        f"budget: {human_bytes(found.budget)}; memory: peak above the interpreter; threads: {found.threads}"
    )
    return _with_machine(made, found.machine, note)


def convert_table(found: ConvertBenchmark) -> Table:
    """Show one row per size and kind: the memory against the classifier's, and the time."""
    images = f"{found.num_images:,} feature vectors" if found.num_images else "no images"
    made = new_table(
        ">N x C", "kind", ">memory / weights", ">time", ">peak memory", "",
        title=f"choosing codes for correlated class vectors, {images}",
    )  # fmt: skip
    before = None
    for row in found.rows:
        size = "" if row.size == before else str(row.size)
        seconds = "" if row.seconds is None else human_seconds(row.seconds)
        memory = "" if row.peak_bytes is None else human_bytes(row.peak_bytes)
        ratio = "" if row.memory_ratio is None else f"{row.memory_ratio:.1f}"
        made.add_row(size, row.kind, ratio, seconds, memory, row.failure or "")
        before = row.size
    note = f"memory: peak above the interpreter, the weights included; threads: {found.threads}"
    return _with_machine(made, found.machine, note)


def step_table(found: StepBenchmark) -> Table:
    """Show one row per part of a step, learned beside fixed, for each number of processes."""
    made = new_table("milliseconds", title=f"one fine-tuning step of {found.model}, {found.num_classes:,} classes")
    for row in found.rows:
        made.add_column("1 process" if row.processes == 1 else f"{row.processes} processes", justify="right")
        made.add_column("", justify="right")
        made.add_column("", justify="right")
    made.add_row("", *("learned", "fixed", "ratio") * len(found.rows), style="bold")
    for name, field in _PHASES.items():
        cells = []
        for row in found.rows:
            if field == "all_reduce" and row.processes == 1:
                cells += ["", "", ""]
            else:
                learned, fixed = _seconds(row.learned, field), _seconds(row.fixed, field)
                cells += [f"{1e3 * learned:.1f}", f"{1e3 * fixed:.1f}", _ratio(learned / fixed if fixed else None)]
        made.add_row(name, *cells, style="bold" if field == "total" else "")
    note = (
        f"head: {found.head}; batch {found.batch} per process; images {found.image_size} x {found.image_size}; "
        f"threads in all: {found.threads}\nall-reduce: what it adds to the step, beyond what the backward pass hides"
    )
    return _with_machine(made, found.machine, note)


def human_seconds(seconds: float) -> str:
    """Write a time with three digits at most.

    >>> [human_seconds(value) for value in (1.74e-4, 0.0123, 3.21, 250)]
    ['174 us', '12.3 ms', '3.21 s', '250 s']
    """
    for factor, unit in ((1e6, "us"), (1e3, "ms"), (1.0, "s")):
        value = seconds * factor
        if round(value, 1) < 1000 or unit == "s":
            digits = 0 if unit == "us" or value >= 100 else 1 if value >= 10 else 2
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("the last unit always fits")  # unreachable


def _seconds(phases: Phases, field: str) -> float:
    seconds: float = getattr(phases, field)
    return seconds


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def _time(cost: Cost) -> str:
    return "-" if cost.seconds is None else human_seconds(cost.seconds)


def _memory(cost: Cost) -> str:
    if cost.failure is not None or cost.peak_bytes is None:
        return cost.failure or ""
    return f"{1e-6 * cost.peak_bytes:.0f} MB" if cost.peak_bytes < 1e9 else human_bytes(cost.peak_bytes)


def _with_machine(made: Table, machine: Machine, note: str = "") -> Table:
    made.caption = f"{note}\n{machine.line}" if note else machine.line
    made.caption_justify = "left"
    return made
