"""Stopping on Ctrl-C or SIGTERM at a step where everything can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from fixify.errors import TrainingError
from fixify.training import distributed


class TrainingInterrupted(TrainingError):
    """The run was asked to stop, and did, with its state saved.

    Args:
        number: The signal that asked; the exit code is the shell's for it (130, 143).
    """

    def __init__(self, message: str, *, number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + number


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None

    def requested(self) -> bool:
        """Whether any process was asked; all have to call this together, and get the same answer."""
        (number,) = distributed.largest(self.number or 0)
        self.number = number or None
        return number > 0


class Stopped(Exception):
    """Raised at a safe step after a stop request; `run` turns it into `TrainingInterrupted`."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the first SIGINT or SIGTERM only sets the request; a second one acts as usual.

    Outside the main thread signals cannot be caught, and the request stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in caught}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: FrameType | None) -> None:
        request.number = number
        restore()

    for number in caught:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
