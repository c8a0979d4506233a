"""From the events of a run to numbers for its trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from fixify.evaluation import Metrics
from fixify.tracking.protocol import TrackedRun, Tracker
from fixify.training import EpochEnded, EpochRecord, Evaluated, Event, RunStarted, Step, Validated
from fixify.training.steps import is_logged

INTERVAL = 50  # timm's --log-interval


class Tracking:
    """A listener for `fixify.training`; use it as a context manager around one run, or several in turns.

    Training is logged at the steps of steps.jsonl and once in every 50, with the mean loss since it was logged
    before (or the run was resumed); validation whenever there is one.

    Args:
        trackers: They are started when a run starts.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._started = False
        self._block = self._images = 0
        self._loss = 0.0

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def __call__(self, event: Event) -> None:
        """Log what an event says."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, Evaluated):
            self._log(0, _of_metrics(event.metrics))
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, (Validated, EpochEnded)):
            self._log(event.record.step, _of_record(event.record))

    def _start(self, event: RunStarted) -> None:
        self._finish()
        # 10,000 class names would fill a tracker's page, and run.json has them.
        config = {key: value for key, value in event.config.items() if key != "class_names"}
        run = TrackedRun(event.folder, config, event.resumed, event.first_step)
        self._started = True
        for tracker in self._trackers:
            tracker.start(run)
        self._block, self._images, self._loss = event.first_step // INTERVAL, 0, 0.0

    def _step(self, event: Step) -> None:
        self._loss += event.recent_loss * event.recent_images
        self._images += event.recent_images
        if not (is_logged(event.step) or event.step // INTERVAL > self._block) or not self._images:
            return
        values = {
            "train/loss": self._loss / self._images,
            "train/lr": event.lr,
            "train/images_per_second": event.images_per_second,
            "train/epoch": event.epoch + event.batch / event.batches,
        }
        if event.scale is not None:
            values["train/scale"] = event.scale
        self._log(event.step, values)
        self._block, self._images, self._loss = event.step // INTERVAL, 0, 0.0

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def _finish(self) -> None:
        if self._started:
            self._started = False
            for tracker in self._trackers:
                tracker.finish()


def _of_record(record: EpochRecord) -> dict[str, float]:
    values = {
        "val/loss": record.val_loss,
        "val/top1": record.val_top1,
        "val/top5": record.val_top5,
        "val/ece": record.val_ece,
    }
    return values if record.train_top1 is None else {**values, "train/top1": record.train_top1}


def _of_metrics(metrics: Metrics) -> dict[str, float]:
    return {
        "val/loss": metrics.loss,
        "val/top1": metrics.top1,
        "val/top5": metrics.top5,
        "val/ece": metrics.ece,
    }
