"""Stop a run on Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 at a step where everything can be saved."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from fixify.errors import TrainingError
from fixify.training import distributed

HANGUP = 1
"""The number of SIGHUP, which Windows does not have."""
RESUME_HINT = "Resume with the same command and --resume."


_IMPATIENT = (signal.SIGINT, signal.SIGTERM)
_PATIENT = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None


T = TypeVar("T")


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

    def on_hangup(self, listener: Callable[[T], object]) -> Callable[[T], None]:
        """Wrap a listener that prints: if its terminal is gone, the run stops as on SIGHUP, which may come later."""

        def tell(event: T) -> None:
            try:
                listener(event)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self.number = self.number or HANGUP

        return tell

    def interruption(self, where: str, folder: Path) -> TrainingInterrupted:
        """Make the error for a run that stopped and saved its state.

        Args:
            where: "in epoch 1 of 5 after 3 of 40 batches".
            folder: Folder of the run.
        """
        message = f"Stopped {where}. Everything up to there is saved in {folder}."
        return TrainingInterrupted(message, number=self.number or signal.SIGINT, hint=RESUME_HINT)

    def interruption_before_training(self) -> TrainingInterrupted:
        """Make the error for a run that stopped before it had a state."""
        return TrainingInterrupted(
            "Stopped before training began.",
            number=self.number or signal.SIGINT,
            hint="Start again with the same command and --resume, or with --force.",
        )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn signals within the block into a request to stop.

    SIGINT and SIGTERM act as usual when they arrive a second time. SIGHUP, which a closed terminal sends, and SIGUSR1,
    which Slurm sends before it takes the machine away, are always requests, but stay ignored if they were (nohup).
    Outside the main thread signals cannot be caught, and the request stays unset.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in _IMPATIENT}
    for number in _PATIENT:
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.getsignal(number)
    came = set[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        if number in came and number in _IMPATIENT:
            _act_as_usual(number, previous[signal.Signals(number)], frame)
        came.add(number)
        request.number = request.number or number

    for number in previous:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _act_as_usual(number: int, handler: Handler, frame: FrameType | None) -> None:
    """Do what a signal did before it was caught.

    The handler is not put back for the next signal: Python prints a traceback if that one has arrived already.
    """
    if callable(handler):
        handler(number, frame)
    elif handler is signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
