"""Stop a run on Ctrl-C or SIGTERM at a step where everything can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from fixify.errors import TrainingError
from fixify.training import distributed

_RESUME = "Resume with the same command and --resume."


class TrainingInterrupted(TrainingError):
    """The run was stopped by a signal, with its state saved.

    Args:
        message: Where it stopped.
        number: The signal; the exit code is what a shell reports for it (130 for SIGINT, 143 for SIGTERM).
        hint: How to resume.
    """

    def __init__(self, message: str, *, number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + number


class Stopped(Exception):
    """Raised at a safe step after a signal; the run turns it into `TrainingInterrupted`."""


class StopRequest:
    """Whether a signal asked the run to stop.

    Attributes:
        number: The signal; None until one arrives.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def requested(self) -> bool:
        """Check whether any process got a signal; every process must call this and gets the same answer."""
        (number,) = distributed.all_max(self.number or 0)
        self.number = number or None
        return number > 0

    def check(self) -> None:
        """Raise `Stopped` if any process got a signal; every process must call this."""
        if self.requested():
            raise Stopped

    def interruption(self, where: str, folder: Path) -> TrainingInterrupted:
        """Make the error for a run that stopped and saved its state.

        Args:
            where: "in epoch 1 of 5 after 3 of 40 batches".
            folder: Folder of the run.
        """
        message = f"Stopped {where}. Everything up to there is saved in {folder}."
        return TrainingInterrupted(message, number=self.number or signal.SIGINT, hint=_RESUME)

    def interruption_before_training(self) -> TrainingInterrupted:
        """Make the error for a run that stopped before it had a state."""
        return TrainingInterrupted(
            "Stopped before training began.",
            number=self.number or signal.SIGINT,
            hint="Start again with the same command and --resume, or with --force.",
        )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM within the block into a request; a second one acts as usual.

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
