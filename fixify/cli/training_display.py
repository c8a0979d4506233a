"""What a training run of an image network shows on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fixify.cli.output import Output
from fixify.cli.run_display import RunDisplay

if TYPE_CHECKING:
    from fixify.training import EpochEnded, EpochRecord, Evaluating, Event, RunStarted, Step, Validated


class TrainingDisplay(RunDisplay):
    """A listener for `fixify.training`."""

    def __init__(self, output: Output, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(output, clock=clock)
        self._best: EpochRecord | None = None

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
        self.begin(event.epochs, event.batches)
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
            self.pace.evaluating(event.images, event.total)

    def _step(self, event: Step) -> None:
        numbers = [("loss", f"{event.loss:.4f}"), ("top-1", f"{event.top1:.1f} %")]
        if event.scale is not None:
            numbers.append(("alpha", f"{event.scale:.2f}"))
        numbers += [("lr", f"{event.lr:.3g}"), ("", f"{event.images_per_second:,.0f} images/s")]
        best = None if self._best is None else ("best validation", f"{self._best.val_top1:.2f} %")
        self.show_progress(event.epoch, event.batch, event.batches, "batch", numbers, best)

    def _validation(self, event: Validated) -> None:
        record = self._validated(event)
        where = f"step {record.step:,}" if record.step else "before training the whole network"
        loss = "" if record.train_loss is None else f"loss {record.train_loss:.4f}, "
        self.say(
            f"{where}: {loss}validation top-1 {record.val_top1:.2f} %, loss {record.val_loss:.4f}"
            + _left_out(record)
            + (" (best)" if event.is_best else "")
        )

    def _epoch(self, event: EpochEnded) -> None:
        self.pace.epoch_ended()
        record = self._validated(event)
        loss = "" if record.train_loss is None else f"loss {record.train_loss:.4f}, "
        self.say(
            f"{self.where(record.epoch)}: {loss}validation top-1 {record.val_top1:.2f} %, "
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
