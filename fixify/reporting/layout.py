"""What all tables for the terminal share. They fit 80 columns.

Importing this module needs no torch.
"""

from __future__ import annotations

from rich.table import Table


def new_table(*columns: str, title: str | None = None) -> Table:
    """Create an empty table; a column whose name starts with `>` is aligned right and never wrapped."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        if column.startswith(">"):
            made.add_column(column[1:], justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="fold")
    return made


def human_bytes(count: float) -> str:
    """Write a number of bytes in powers of 1000, as disks and download pages count.

    >>> human_bytes(1536)
    '1.5 KB'
    """
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def short_digest(digest: str | None) -> str:
    """Shorten a digest; `--json` has all of it."""
    return "" if digest is None else digest if len(digest) <= 24 else f"{digest[:24]}..."


def plain(value: object) -> str:
    """Write a value of a JSON object for people.

    >>> plain({"input_size": [3, 224, 224], "crop_pct": 0.875})
    'input_size 3x224x224, crop_pct 0.875'
    """
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ("x" if len(value) == 3 else ", ").join(plain(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
