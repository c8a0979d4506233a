"""Send the metrics of a training run to TensorBoard, trackio or Weights & Biases.

`open_trackers` opens trackers by name; `Tracking` is a listener that passes the events of a run on to them. A tracker
imports its package only when a run starts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fixify._files import write_atomic
from fixify._options import did_you_mean
from fixify.errors import OutputError, TrainingError, UsageError
from fixify.metrics import Metrics
from fixify.training import EpochEnded, EpochRecord, Evaluated, Event, RunStarted, Step, Validated
from fixify.training.run_folder import is_logged

PROJECT = "fixify"
"""The project that trackio and W&B log into."""
FOLDER = "tensorboard"
"""The folder of TensorBoard's event files, inside the run's folder."""
INTERVAL = 50
"""Steps between two log entries at most, as timm's --log-interval."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that is tracked.

    Attributes:
        folder: The run's folder. A tracker may keep its own files there.
        config: What decides the result: data, model and options, JSON-safe.
        resumed: Whether the run is resumed. If it crashed, its log may reach beyond `first_step`.
        first_step: Number of updates that are already done.
    """

    folder: Path
    config: Mapping[str, Any]
    resumed: bool
    first_step: int

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """Where metrics go. A step that a resumed run logs again must not appear twice."""

    def start(self, run: TrackedRun) -> None:
        """Begin or resume this run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers. Steps never decrease; one step may be logged in several parts."""

    def finish(self) -> None:
        """Send what has not been sent yet."""


def open_trackers(names: Iterable[str]) -> list[Tracker]:
    """Open the trackers of these names, each once.

    Raises:
        UsageError: there is no tracker of a name, or its package is not installed.
    """
    opened: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name not in _TRACKERS:
            raise UsageError(
                f"There is no tracker {name!r}{did_you_mean(name, TRACKERS)}",
                hint=f"--track takes {', '.join(TRACKERS)}.",
            )
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: only a folder of that name, which W&B leaves behind
            raise UsageError(
                f"--track {name} needs the package {name}, which is not installed.", hint=f"pip install {name}"
            )
        opened.append(_TRACKERS[name]())
    return opened


class Tracking:
    """Logs the events of `fixify.training`. Use it as a context manager around one run, or several in sequence.

    Training metrics are logged at the steps of steps.jsonl and at least every 50 steps, with the mean loss since the
    previous entry (or since the run was resumed). Validation metrics are logged at every validation.

    Args:
        trackers: They are started when a run starts.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._started = False
        self._interval = self._images = 0
        self._loss = 0.0

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def __call__(self, event: Event) -> None:
        """Log an event."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, Evaluated) and not event.calibrated:  # a step has one value
            self._log(0, _values_of_metrics(event.metrics))
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, (Validated, EpochEnded)):
            if event.record.classifier == "converted" and event.record.fraction == 0:
                return  # the epoch that ended before it has the step's value
            self._log(event.record.step, _values_of_record(event.record))

    def _start(self, event: RunStarted) -> None:
        self._finish()
        # 10,000 class names would fill a tracker's page, and run.json has them.
        config = {key: value for key, value in event.config.items() if key != "class_names"}
        run = TrackedRun(event.folder, config, event.resumed, event.first_step)
        self._started = True
        for tracker in self._trackers:
            tracker.start(run)
        self._interval, self._images, self._loss = event.first_step // INTERVAL, 0, 0.0

    def _step(self, event: Step) -> None:
        self._loss += event.recent_loss * event.recent_images
        self._images += event.recent_images
        if not (is_logged(event.step) or event.step // INTERVAL > self._interval) or not self._images:
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
        self._interval, self._images, self._loss = event.step // INTERVAL, 0, 0.0

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def _finish(self) -> None:
        if self._started:
            self._started = False
            for tracker in self._trackers:
                tracker.finish()


def _values_of_record(record: EpochRecord) -> dict[str, float]:
    values = {
        "val/loss": record.val_loss,
        "val/top1": record.val_top1,
        "val/top5": record.val_top5,
        "val/ece": record.val_ece,
    }
    return values if record.train_top1 is None else {**values, "train/top1": record.train_top1}


def _values_of_metrics(metrics: Metrics) -> dict[str, float]:
    return {
        "val/loss": metrics.loss,
        "val/top1": metrics.top1,
        "val/top5": metrics.top5,
        "val/ece": metrics.ece,
    }


class TensorBoard:
    """Writes event files. Those of a resumed run tell TensorBoard from which step to discard the earlier ones."""

    def start(self, run: TrackedRun) -> None:
        """See `Tracker`.

        Raises:
            OutputError: the files cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / FOLDER
        try:
            if not run.resumed:
                for old in folder.glob("events.out.tfevents.*"):
                    old.unlink()
            self._writer = SummaryWriter(str(folder), purge_step=run.first_step + 1 if run.resumed else None)
        except OSError as error:
            raise OutputError(f"Cannot write {folder}: {error.strerror or error}.") from error
        if not run.resumed:
            self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=2)}\n```")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # keep what was logged if the run is killed

    def finish(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Trackio:
    """Logs into the trackio project `fixify`."""

    def start(self, run: TrackedRun) -> None:
        """See `Tracker`."""
        import trackio

        self._mark = Mark(run.folder / "trackio.json", resumed=run.resumed)
        with _stdout_to_stderr():
            self._run = trackio.init(
                PROJECT,
                name=f"{run.name}-{self._mark.identity}",
                config=dict(run.config),
                resume="allow" if self._mark.is_known else "never",
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        if self._mark.is_new(step):
            self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """See `Tracker`."""
        import trackio

        with _stdout_to_stderr():
            trackio.finish()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect what trackio prints, because stdout is for the result of the command."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class WeightsAndBiases:
    """Logs into the W&B project `fixify`, or into the one that WANDB_PROJECT names."""

    def start(self, run: TrackedRun) -> None:
        """See `Tracker`.

        Raises:
            TrainingError: W&B cannot be reached or does not know the user.
        """
        import wandb

        self._mark = Mark(run.folder / "wandb.json", resumed=run.resumed)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.name,
                id=self._mark.identity,
                resume="allow" if self._mark.is_known else None,
                config=dict(run.config),
                dir=str(run.folder),
            )
        except wandb.Error as error:
            raise TrainingError(
                f"W&B cannot be used: {error}", hint="Type wandb login, or set WANDB_MODE=offline."
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        if self._mark.is_new(step):
            self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Mark:
    """A small file in the run's folder that stores the tracker's id of the run and the last step that was logged.

    A run that crashed repeats the steps since its last saved state exactly. Their log entries stay right, so they are
    not logged again.

    Args:
        path: The file.
        resumed: Whether to continue the run that the file names.

    Attributes:
        identity: The tracker's id of the run.
        is_known: Whether the file named the run already.
    """

    def __init__(self, path: Path, *, resumed: bool) -> None:
        self.path = path
        stored = _read_mark(path) if resumed else None
        self.is_known = stored is not None
        self.identity, self._last = stored or (secrets.token_hex(4), -1)
        self._logged_before = self._last

    def is_new(self, step: int) -> bool:
        """Check that this step is not logged yet, and note that it is from now on."""
        if step <= self._logged_before:
            return False
        if step > self._last:
            self._last = step
            write_atomic(self.path, json.dumps({"id": self.identity, "step": step}) + "\n")
        return True


def _read_mark(path: Path) -> tuple[str, int] | None:
    try:
        stored = json.loads(path.read_text())
        return str(stored["id"]), int(stored["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the run has not been tracked yet


_TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}
TRACKERS = tuple(_TRACKERS)
