"""How long a run still takes."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Estimates the time left from what was measured since the epoch began (or the run was resumed).

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epochs = self._batches = 0
        self._mark: tuple[int, int, float] | None = None  # epoch, batch, seconds
        self._per_batch: float | None = None
        self._validating_since: float | None = None
        self._validation = 0.0  # of one epoch
        self._this_epoch = 0.0

    def start(self, epochs: int, batches: int) -> None:
        """A run of so many epochs of so many batches begins."""
        self._epochs, self._batches = epochs, batches
        self._mark = self._per_batch = self._validating_since = None
        self._validation = self._this_epoch = 0.0

    def step(self, epoch: int, batch: int) -> None:
        """So many batches of the epoch (from 0) are done."""
        now = self._clock()
        if self._mark is None:
            self._this_epoch = 0.0  # what was measured before training belongs to no epoch
        if self._mark is None or self._mark[0] != epoch:
            # The first batch waits for the loader's processes to start, and may compile the model.
            self._mark = (epoch, batch, now)
        elif batch > self._mark[1]:
            self._per_batch = (now - self._mark[2]) / (batch - self._mark[1])

    def evaluating(self, images: int, total: int) -> None:
        """So many of the validation images are done."""
        now = self._clock()
        if self._validating_since is None:
            self._validating_since = now
        if images >= total:
            took, self._validating_since = now - self._validating_since, None
            self._this_epoch += took
            self._validation = max(self._validation, self._this_epoch)
            if self._mark is not None:  # training stood still
                self._mark = (*self._mark[:2], self._mark[2] + took)

    def epoch_ended(self) -> None:
        """An epoch and its validation are done."""
        self._validation, self._this_epoch = self._this_epoch, 0.0

    def left(self, epoch: int, batch: int) -> tuple[float, float] | None:
        """Seconds of training left in this epoch, and in the whole run with its validations; None at the start."""
        if self._per_batch is None:
            return None
        epochs_after = self._epochs - epoch - 1
        here = (self._batches - batch) * self._per_batch
        each = self._batches * self._per_batch + self._validation
        return here, here + self._validation + epochs_after * each


def as_time(seconds: float | None) -> str:
    """`1:02:03` or `02:03`; `--:--` if it is not known yet."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
