"""What the training of a language model shows on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fixify.cli.output import Output
from fixify.cli.run_display import RunDisplay

if TYPE_CHECKING:
    from fixify.language.events import LanguageEpochEnded, LanguageEvent, LanguageRunStarted, LanguageStep


class LanguageDisplay(RunDisplay):
    """A listener for `fixify.language`."""

    def __init__(self, output: Output, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(output, clock=clock)
        self._best: float | None = None

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
        self.begin(event.epochs, event.steps)
        self.output.say(f"text: {event.text}")
        self.output.say(f"{event.learned:,} parameters learn, on {event.device}")
        if event.first_epoch:
            self.output.say(f"resuming in epoch {event.first_epoch + 1} of {event.epochs}")

    def _step(self, event: LanguageStep) -> None:
        numbers = [("loss", f"{event.loss:.4f}"), ("lr", f"{event.lr:.3g}")]
        if event.scale is not None:
            numbers.append(("alpha", f"{event.scale:.2f}"))
        numbers.append(("", f"{event.words_per_second:,.0f} words/s"))
        best = None if self._best is None else ("best perplexity", f"{self._best:.2f}")
        self.show_progress(event.epoch, event.step, event.steps, "update", numbers, best)

    def _epoch(self, event: LanguageEpochEnded) -> None:
        self.pace.epoch_ended()
        record = event.record
        if event.is_best:
            self._best = record.val_perplexity
        self.say(
            f"{self.where(record.epoch)}: loss {record.train_loss:.4f}, validation perplexity "
            f"{record.val_perplexity:.2f}, {record.words_per_second:,.0f} words/s"
            + (" (mean of the weights)" if record.averaged else "")
            + (" (best)" if event.is_best else "")
        )
