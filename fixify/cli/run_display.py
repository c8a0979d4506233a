"""What every training run shows on stderr, of images or of words: a line an epoch; in a terminal a live view below
them, elsewhere a line every half minute, as a log file wants it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from fixify.cli.live_view import LiveView
from fixify.cli.output import Output
from fixify.cli.pace import Pace, as_time

if TYPE_CHECKING:
    from typing_extensions import Self

_SECONDS_A_LINE = 30


class RunDisplay:
    """What listeners for runs have in common; a context manager around the run, or several in turns.

    Args:
        output: Of the command.
        clock: Seconds.
    """

    def __init__(self, output: Output, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.output = output
        self.view = LiveView(output.err)
        self.pace = Pace(clock)
        self._clock = clock
        self._epochs = 0
        self._last_line = clock()

    def __enter__(self) -> Self:
        self.view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.stop()

    def begin(self, epochs: int, steps: int) -> None:
        """A run of so many epochs of so many steps begins."""
        self._epochs = epochs
        self.pace.start(epochs, steps)

    def say(self, line: str) -> None:
        """A line that stays; the next one of progress comes half a minute later."""
        self._last_line = self._clock()
        self.output.say(line)

    def where(self, epoch: int) -> str:
        """`epoch 3/30`, of an epoch counted from 0."""
        return f"epoch {epoch + 1}/{self._epochs}"

    def show_progress(
        self, epoch: int, step: int, steps: int, unit: str, numbers: list[tuple[str, str]], best: tuple[str, str] | None
    ) -> None:
        """So many steps of the epoch are done.

        Args:
            epoch: From 0.
            step, steps: Of it.
            unit: What a step is called.
            numbers: Names and values.
            best: Another, for the live view alone: above it the lines of the epochs say so.
        """
        self.pace.step(epoch, step)
        left = self.pace.left(epoch, step)
        if self.view.is_live:
            whole = (epoch * steps + step, self._epochs * steps)
            self.view.show_training(self.where(epoch), (step, steps), whole)
            self.view.show_left(left)
            self.view.show_numbers([*numbers, best] if best else numbers)
        elif self._clock() - self._last_line >= _SECONDS_A_LINE:
            said = ", ".join(f"{name} {value}".strip() for name, value in numbers)
            rest = "" if left is None else f", {as_time(left[1])} left"
            self.say(f"{self.where(epoch)}, {unit} {step:,}/{steps:,}: {said}{rest}")
