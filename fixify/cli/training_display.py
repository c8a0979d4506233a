"""What a training run shows on stderr: a line an epoch; in a terminal a live view below them, elsewhere a line every
half minute, as a log file wants it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from fixify.cli.live_view import LiveView
from fixify.cli.output import Output
from fixify.cli.pace import Pace, as_time

if TYPE_CHECKING:
    from fixify.training import EpochEnded, EpochRecord, Evaluating, Event, RunStarted, Step, Validated

_SECONDS_A_LINE = 30


class TrainingDisplay:
    """A listener for `fixify.training`; use it as a context manager around the run, or several in turns.

    Args:
        output: Of the command.
        clock: Seconds.
    """

    def __init__(self, output: Output, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.output = output
        self.view = LiveView(output.err)
        self._clock = clock
        self._pace = Pace(clock)
        self._epochs = self._batches = 0
        self._last_line = clock()
        self._best: EpochRecord | None = None

    def __enter__(self) -> TrainingDisplay:
        self.view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.stop()

    def __call__(self, event: Event) -> None:
        """Show an event of the run."""
        from fixify import training

        if isinstance(event, training.Warned):
            self.output.warn(event.text)
        elif isinstance(event, training.RunStarted):
            self._start(event)
        elif isinstance(event, training.Evaluating):
            self._evaluating(event)
        elif isinstance(event, training.OriginalEvaluated):
            self.output.say(f"original: {event.name}, top-1 {event.metrics.top1:.2f} %, loss {event.metrics.loss:.4f}")
        elif isinstance(event, training.Evaluated):
            metrics = event.metrics
            self.output.say(f"before training: top-1 {metrics.top1:.2f} %, loss {metrics.loss:.4f}")
        elif isinstance(event, training.Calibrated):
            self.output.say(f"feature statistics taken from {event.images} training images")
        elif isinstance(event, training.LastBlockEpoch):
            where = f"last blocks, epoch {event.epoch + 1}/{event.epochs}"
            self.output.say(f"{where}: loss {event.loss:.4f} on the features of {event.images:,} images")
        elif isinstance(event, training.Step):
            self._step(event)
        elif isinstance(event, training.Validated):
            self._validation(event)
        elif isinstance(event, training.EpochEnded):
            self._epoch(event)

    def _start(self, event: RunStarted) -> None:
        self._epochs, self._batches = event.epochs, event.batches
        self._pace.start(event.epochs, event.batches)
        self._best = None
        self.output.say(f"training data: {event.train}")
        self.output.say(f"validation data: {event.val}")
        if event.frozen:
            self.output.say(
                f"training {event.trainable:,} of {event.parameters:,} parameters; frozen: {'; '.join(event.frozen)}"
            )
        if event.first_epoch:
            self.output.say(f"resuming in epoch {event.first_epoch + 1} of {event.epochs}")

    def _evaluating(self, event: Evaluating) -> None:
        if event.images >= event.total:
            self.view.hide(self.view.evaluating)
        else:
            what = {"features": "features", "teacher": "asking the teacher"}.get(event.phase, "validating")
            self.view.show_bar(self.view.evaluating, event.images, event.total, description=what, note="images")
        if event.phase in ("before", "validation"):
            self._pace.evaluating(event.images, event.total)

    def _step(self, event: Step) -> None:
        self._pace.step(event.epoch, event.batch)
        left = self._pace.left(event.epoch, event.batch)
        numbers = [("loss", f"{event.loss:.4f}"), ("top-1", f"{event.top1:.1f} %")]
        if event.scale is not None:
            numbers.append(("alpha", f"{event.scale:.2f}"))
        numbers += [("lr", f"{event.lr:.3g}"), ("", f"{event.images_per_second:,.0f} images/s")]
        where = f"epoch {event.epoch + 1}/{self._epochs}"
        if self.view.is_live:
            if self._best is not None:
                numbers.append(("best validation", f"{self._best.val_top1:.2f} %"))
            done = event.epoch * self._batches + event.batch
            self.view.show_training(where, (event.batch, self._batches), (done, self._epochs * self._batches))
            self.view.show_left(left)
            self.view.show_numbers(numbers)
        elif self._clock() - self._last_line >= _SECONDS_A_LINE:
            said = ", ".join(f"{name} {value}".strip() for name, value in numbers)
            rest = "" if left is None else f", {as_time(left[1])} left"
            self._say(f"{where}, batch {event.batch:,}/{self._batches:,}: {said}{rest}")

    def _say(self, line: str) -> None:
        self._last_line = self._clock()
        self.output.say(line)

    def _validation(self, event: Validated) -> None:
        record = self._validated(event)
        where = f"step {record.step:,}" if record.step else "before training the whole network"
        loss = "" if record.train_loss is None else f"loss {record.train_loss:.4f}, "
        self._say(
            f"{where}: {loss}validation top-1 {record.val_top1:.2f} %, loss {record.val_loss:.4f}"
            + _left_out(record)
            + (" (best)" if event.is_best else "")
        )

    def _epoch(self, event: EpochEnded) -> None:
        self._pace.epoch_ended()
        record = self._validated(event)
        loss = "" if record.train_loss is None else f"loss {record.train_loss:.4f}, "
        self._say(
            f"epoch {record.epoch + 1}/{self._epochs}: {loss}validation top-1 {record.val_top1:.2f} %, "
            f"loss {record.val_loss:.4f}, {record.images_per_second:.0f} images/s"
            + _left_out(record)
            + (" (best)" if event.is_best else "")
        )

    def _validated(self, event: Validated | EpochEnded) -> EpochRecord:
        if event.is_best:
            self._best = event.record
        return event.record


def _left_out(record: EpochRecord) -> str:
    return f" ({record.val_unreadable:,} unreadable left out)" if record.val_unreadable else ""
