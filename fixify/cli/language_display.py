"""What the training of a language model shows on stderr: a line an epoch; in a terminal bars and numbers below them,
elsewhere a line every half minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from fixify.cli.live_view import LiveView
from fixify.cli.output import Output
from fixify.cli.pace import Pace, as_time

if TYPE_CHECKING:
    from fixify.language.events import LanguageEpochEnded, LanguageEvent, LanguageRunStarted, LanguageStep

_SECONDS_A_LINE = 30


class LanguageDisplay:
    """A listener for `fixify.language`; use it as a context manager around a run.

    Args:
        output: Of the command.
        clock: Seconds.
    """

    def __init__(self, output: Output, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.output = output
        self.view = LiveView(output.err)
        self._clock = clock
        self._pace = Pace(clock)
        self._epochs = 0
        self._last_line = clock()
        self._best: float | None = None

    def __enter__(self) -> LanguageDisplay:
        self.view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.stop()

    def __call__(self, event: LanguageEvent) -> None:
        """Show an event of the run."""
        from fixify.language import events

        if isinstance(event, events.LanguageRunStarted):
            self._start(event)
        elif isinstance(event, events.LanguageStep):
            self._step(event)
        else:
            self._epoch(event)

    def _start(self, event: LanguageRunStarted) -> None:
        self._epochs = event.epochs
        self._pace.start(event.epochs, event.steps)
        self.output.say(f"text: {event.text}")
        self.output.say(f"{event.learned:,} parameters learn, on {event.device}")
        if event.first_epoch:
            self.output.say(f"resuming in epoch {event.first_epoch + 1} of {event.epochs}")

    def _step(self, event: LanguageStep) -> None:
        self._pace.step(event.epoch, event.step)
        left = self._pace.left(event.epoch, event.step)
        numbers = [("loss", f"{event.loss:.4f}"), ("lr", f"{event.lr:.3g}")]
        if event.scale is not None:
            numbers.append(("alpha", f"{event.scale:.2f}"))
        numbers.append(("", f"{event.words_per_second:,.0f} words/s"))
        where = f"epoch {event.epoch + 1}/{self._epochs}"
        if self.view.is_live:
            if self._best is not None:
                numbers.append(("best perplexity", f"{self._best:.2f}"))
            done = event.epoch * event.steps + event.step
            self.view.show_training(where, (event.step, event.steps), (done, self._epochs * event.steps))
            self.view.show_left(left)
            self.view.show_numbers(numbers)
        elif self._clock() - self._last_line >= _SECONDS_A_LINE:
            said = ", ".join(f"{name} {value}".strip() for name, value in numbers)
            rest = "" if left is None else f", {as_time(left[1])} left"
            self._say(f"{where}, update {event.step:,}/{event.steps:,}: {said}{rest}")

    def _epoch(self, event: LanguageEpochEnded) -> None:
        self._pace.epoch_ended()
        record = event.record
        if event.is_best:
            self._best = record.val_perplexity
        self._say(
            f"epoch {record.epoch + 1}/{self._epochs}: loss {record.train_loss:.4f}, validation perplexity "
            f"{record.val_perplexity:.2f}, {record.words_per_second:,.0f} words/s"
            + (" (mean of the weights)" if record.averaged else "")
            + (" (best)" if event.is_best else "")
        )

    def _say(self, line: str) -> None:
        self._last_line = self._clock()
        self.output.say(line)
