"""The callbacks by which long calculations say how far they are and what is unusual, and what ignores them."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


def unheard(text: str) -> None:
    """Ignore a sentence: the default where warnings may be listened to."""


def unwatched(what: str, done: int, total: int) -> None:
    """Ignore the progress: the default where a callback may be given."""
