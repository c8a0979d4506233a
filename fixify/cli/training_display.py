"""What a training run shows on stderr: a line an epoch, and a bar while it runs if stderr is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fixify.cli.output import Output

if TYPE_CHECKING:
    from fixify.training import EpochEnded, EpochRecord, Event, RunStarted, Step, Validated


class TrainingDisplay:
    """A listener for `fixify.training`; use it as a context manager around the run."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=output.err,
            transient=True,
            disable=not output.err.is_terminal,
        )
        self.epochs = self.batches = 0
        self.training = self.bar.add_task("training", total=None, visible=False, note="")
        self.evaluating = self.bar.add_task("validating", total=None, visible=False, note="images")

    def __enter__(self) -> TrainingDisplay:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event of the run."""
        from fixify import training

        if isinstance(event, training.Warned):
            self.output.warn(event.text)
        elif isinstance(event, training.RunStarted):
            self._start(event)
        elif isinstance(event, training.Evaluating):
            done = event.images >= event.total
            self.bar.update(self.evaluating, total=event.total, completed=event.images, visible=not done)
        elif isinstance(event, training.OriginalEvaluated):
            self.output.say(f"original: {event.name}, top-1 {event.metrics.top1:.2f} %, loss {event.metrics.loss:.4f}")
        elif isinstance(event, training.Evaluated):
            metrics = event.metrics
            self.output.say(f"as converted: top-1 {metrics.top1:.2f} %, loss {metrics.loss:.4f}")
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
        self.epochs, self.batches = event.epochs, event.batches
        self.output.say(f"training data: {event.train}")
        self.output.say(f"validation data: {event.val}")
        if event.frozen:
            self.output.say(
                f"training {event.trainable:,} of {event.parameters:,} parameters; frozen: {'; '.join(event.frozen)}"
            )
        if event.first_epoch:
            self.output.say(f"resuming in epoch {event.first_epoch + 1} of {event.epochs}")
        total, done = event.epochs * event.batches, event.first_epoch * event.batches
        self.bar.update(self.training, total=total, completed=done)

    def _step(self, event: Step) -> None:
        alpha = "" if event.scale is None else f"  alpha {event.scale:.2f}"
        self.bar.update(
            self.training,
            description=f"epoch {event.epoch + 1}/{self.epochs}",
            completed=event.epoch * self.batches + event.batch,
            visible=True,
            note=f"loss {event.loss:.3f}  top-1 {event.top1:.1f} %{alpha}  {event.images_per_second:.0f} images/s",
        )

    def _validation(self, event: Validated) -> None:
        record = event.record
        where = f"step {record.step:,}" if record.step else "before training the whole network"
        loss = "" if record.train_loss is None else f"loss {record.train_loss:.4f}, "
        self.output.say(
            f"{where}: {loss}validation top-1 {record.val_top1:.2f} %, loss {record.val_loss:.4f}"
            + _left_out(record)
            + (" (best)" if event.is_best else "")
        )

    def _epoch(self, event: EpochEnded) -> None:
        record = event.record
        loss = "" if record.train_loss is None else f"loss {record.train_loss:.4f}, "
        self.output.say(
            f"epoch {record.epoch + 1}/{self.epochs}: {loss}validation top-1 {record.val_top1:.2f} %, "
            f"loss {record.val_loss:.4f}, {record.images_per_second:.0f} images/s"
            + _left_out(record)
            + (" (best)" if event.is_best else "")
        )


def _left_out(record: EpochRecord) -> str:
    return f" ({record.val_unreadable:,} unreadable images left out)" if record.val_unreadable else ""
