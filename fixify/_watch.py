"""The callback by which long calculations say how far they are."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


def unwatched(what: str, done: int, total: int) -> None:
    """Ignore the progress: the default where a callback may be given."""
