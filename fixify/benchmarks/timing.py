"""Time calls in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

_SAMPLE = 2e-3
"""Seconds per sample at least: quicker calls are repeated within it."""
_FEWEST = 3
"""Turns that are always taken."""


def seconds_in_turns(
    calls: Sequence[Callable[[], object]],
    *,
    repeats: int = 15,
    limit: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Measure the time of each call: the least of several samples.

    Each call is warmed up twice. Then all are timed in turns: the first, the second, ..., the first again.

    Args:
        calls: What to time.
        repeats: Number of turns, 3 at least.
        limit: Seconds after which no further turn begins, once there were three.
        clock: Returns the time in seconds.

    Returns:
        Seconds per call, in the order of `calls`.
    """
    counts = []
    for call in calls:
        call()
        start = clock()
        call()
        counts.append(max(1, round(_SAMPLE / max(clock() - start, 1e-7))))
    least = [float("inf")] * len(calls)
    began = clock()
    for turn in range(max(repeats, _FEWEST)):
        if turn >= _FEWEST and clock() - began > limit:
            break
        for i, (call, count) in enumerate(zip(calls, counts, strict=True)):
            start = clock()
            for _ in range(count):
                call()
            least[i] = min(least[i], (clock() - start) / count)
    return least
