"""Show a comparison of a fixed head with other small classifiers: tables for the terminal, and a page."""

from __future__ import annotations

from datetime import datetime

from rich.table import Table

from fixify.comparing.paired import Paired
from fixify.comparing.result import Compared
from fixify.reporting.benchmark_tables import human_seconds
from fixify.reporting.layout import human_bytes, new_table
from fixify.reporting.page import render

_NO_WINNER = "Nothing beats the fixed head: no alternative in as few bytes is better, and no larger one beyond chance."


def compare_tables(found: Compared) -> list[Table | str]:
    """Show accuracy and bytes, then memory and time, what beats the fixed head, and the classes that lose most."""
    return [_accuracy(found), "", _running(found), "", *verdict(found), *([""] if found.worst else []), *_worst(found)]


def compare_page(found: Compared, *, now: datetime | None = None) -> str:
    """Return the comparison as one self-contained HTML page.

    Args:
        found: The comparison. Names in it come from files and are escaped.
        now: The date on the page; None takes the current time.
    """
    return render(
        "compare.html.j2",
        now,
        found=found,
        verdict=verdict(found),
        interval=_interval,
        seconds=human_seconds,
        p=_p,
    )


def verdict(found: Compared) -> list[str]:
    """Say what beats the fixed head, in sentences."""
    return list(found.winners) or [_NO_WINNER]


def _accuracy(found: Compared) -> Table:
    right = "top-1 %" if found.labelled else "agreement %"
    images = f"{found.num_images:,} images of {found.data}"
    more = [">top-5 %", ">agreement %"] if found.labelled else []
    made = new_table("classifier", ">bytes", f">{right}", *more, ">to the original", title=images)
    for row in found.rows:
        more = [f"{row.metrics.top5:.2f}", f"{row.agreement:.2f}"] if found.labelled else []
        difference = "" if row.against_original is None else _interval(row.against_original)
        made.add_row(row.label, human_bytes(row.head_bytes), f"{row.metrics.top1:.2f}", *more, difference)
    what = "top-1" if found.labelled else "agreement"
    made.caption = f"to the original: points of {what}, and the 95 % interval"
    made.caption_justify = "left"
    return made


def _running(found: Compared) -> Table:
    made = new_table("classifier, running", ">memory", ">batch 1", ">batch 64")
    seen = set()
    for row in found.rows:
        if row.seconds is not None and row.name not in seen:
            seen.add(row.name)
            made.add_row(row.name, human_bytes(row.memory_bytes), *map(human_seconds, row.seconds.values()))
    made.caption = "int4, int3, int2: as four bits, features in bfloat16\nSVD: as float32; pruned: like the original"
    made.caption_justify = "left"
    return made


def _worst(found: Compared) -> list[Table]:
    if not found.worst:
        return []
    made = new_table("classes that lose most", ">images", ">original right", ">fixed right")
    for row in found.worst:
        made.add_row(row.name, str(row.images), str(row.original_right), str(row.fixed_right))
    return [made]


def _interval(found: Paired) -> str:
    return f"{found.difference:+.2f} ({found.low:+.1f} to {found.high:+.1f})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
