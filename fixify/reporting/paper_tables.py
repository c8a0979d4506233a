"""Tables for `fixify report --paper`. They fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from fixify.reporting.measured import run_here_tables, words_here_tables
from fixify.reporting.paper import Paper, PaperRow
from fixify.reporting.tables import human_bytes, new_table

NOT_RUN = "not run here"


def paper_tables(found: Paper) -> list[Table | str]:
    """Counts, results and gradients of the paper's networks, with what is to be said of them."""
    printed = (*found.table1, *found.table2)
    everything = (*printed, *found.section4)
    return [
        _counts("Tables 1 and 2: parameters, and the share that becomes fixed", printed, section4=False),
        "",
        _results("Table 1: validation accuracy, %", found.table1),
        "",
        _results("Table 2: validation perplexity", found.table2),
        "",
        _counts("Section 4.1 (JFT-300M) and 4.2 (more classes than features)", found.section4, section4=True),
        "",
        _gradients(everything),
        "",
        *run_here_tables(found.run_here),
        "",
        *words_here_tables(found.words_here),
        *_notes(everything),
    ]


def _counts(title: str, rows: Sequence[PaperRow], *, section4: bool) -> Table:
    paper = () if section4 else (">paper",)
    made = new_table("network", "data", ">N", ">C", *paper, ">counted", *paper, ">share", title=title)
    for row in rows:
        counted, printed = row.counted, row.printed
        sizes = [f"{counted.parameters:,}" + ("" if not row.notes else " *")]
        shares = [f"{counted.share:.2f} %"]
        if printed is not None:
            sizes.insert(0, f"{printed.parameters:,}")
            shares.insert(0, f"{printed.share} %")
        made.add_row(counted.name, counted.data, str(counted.num_features), str(counted.num_classes), *sizes, *shares)
    return made


def _results(title: str, rows: Iterable[PaperRow]) -> Table:
    made = new_table(
        "network", "data", ">learned\n(paper)", ">fixed\n(paper)", ">learned\n(here)", ">fixed\n(here)", title=title
    )
    for row in rows:
        if row.printed is not None:
            ours = (NOT_RUN, "") if row.ours is None else (row.ours.learned.lines(), row.ours.fixed.lines())
            made.add_row(row.counted.name, row.counted.data, row.printed.learned, row.printed.fixed, *ours)
    return made


def _gradients(rows: Iterable[PaperRow]) -> Table:
    title = "Gradients that each update sends (float32), by arithmetic"
    made = new_table("network", "data", ">learned", ">fixed", ">saved", title=title)
    for row in rows:
        counted = row.counted
        saved = counted.gradient_bytes_saved
        made.add_row(
            counted.name,
            counted.data,
            human_bytes(counted.gradient_bytes),
            human_bytes(counted.gradient_bytes - saved),
            f"{human_bytes(saved)} ({100 * saved / counted.gradient_bytes:.1f} %)",
        )
    return made


def _notes(rows: Iterable[PaperRow]) -> list[str]:
    return [f"* {row.counted.name}: {note}." for row in rows for note in row.notes]
