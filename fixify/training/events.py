"""What a run tells its listener. The engine draws nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fixify.metrics import Metrics

Phase = Literal["teacher", "original", "before", "features", "validation"]


@dataclass(frozen=True)
class Warned:
    """Something that a person should know and that did not stop the run; a sentence."""

    text: str


@dataclass(frozen=True)
class RunStarted:
    """Before anything else.

    Attributes:
        epochs, batches: Of the whole run, and of one epoch.
        first_epoch, first_step: Where it begins: above 0 when a run is resumed. The step counts updates.
        resumed: Whether it goes on from a state.
        train, val: What the data is, for a person.
        device, workers: Where it runs, and its loader processes.
        parameters, trainable: Of the model, and those that learn.
        frozen: Names of its stages that do not (`freeze`).
        folder: Of the run.
        config: What decides the result: data, model and options, JSON-safe.
    """

    epochs: int
    first_epoch: int
    batches: int
    train: str
    val: str
    device: str
    processes: int
    workers: int
    parameters: int
    trainable: int
    frozen: tuple[str, ...]
    folder: Path
    first_step: int
    resumed: bool
    config: dict[str, Any]


@dataclass(frozen=True)
class Evaluating:
    """During an evaluation: of the "original", of the model "before" training, or a "validation" afterwards; or while
    the "teacher" is asked what the validation images show, which have no labels, or the "features" of the training
    images are computed.
    """

    phase: Phase
    images: int
    total: int


@dataclass(frozen=True)
class OriginalEvaluated:
    """The model whose accuracy is the goal."""

    name: str
    metrics: Metrics


@dataclass(frozen=True)
class Evaluated:
    """The model as it came, before any training."""

    metrics: Metrics


@dataclass(frozen=True)
class Calibrated:
    """The statistics of a standardising head were taken from so many training images."""

    images: int


@dataclass(frozen=True)
class LastBlockEpoch:
    """The last blocks were trained on the features of so many images, before the whole network; `loss` is the mean."""

    epoch: int
    epochs: int
    images: int
    loss: float


@dataclass(frozen=True)
class EpochStarted:
    epoch: int
    epochs: int


@dataclass(frozen=True)
class Step:
    """During an epoch; every step on a CPU, every 20th elsewhere.

    Loss and accuracy are of the epoch so far, `recent_loss` is of the `recent_images` since the last such event;
    `scale` is the head's learned alpha, None for other heads; `step` counts updates of the weights since the start of
    the run.
    """

    epoch: int
    batch: int
    batches: int
    loss: float
    top1: float
    lr: float
    images_per_second: float
    scale: float | None
    step: int
    recent_loss: float
    recent_images: int


@dataclass(frozen=True)
class EpochRecord:
    """One validation, after an epoch or within it, as it goes into metrics.jsonl. Epochs count from 0, as in timm's
    summary.csv.

    Attributes:
        epoch: Which epoch.
        step: Updates of the weights since the start of the run.
        lr: Learning rate of the last update.
        train_loss: Mean loss over the epoch so far, with augmentation, while the weights moved; None at its start.
        train_top1: Percent; with mixup the label that weighs more counts, without labels the teacher's answer.
        val_loss, val_top1, val_top5, val_ece: See `fixify.metrics.Metrics`; of the moving average if there is one.
        scale: The head's learned scale alpha; None for other heads.
        images_per_second: Training throughput, loading included.
        seconds: Training since the epoch began, and this validation.
        fraction: Part of the epoch that was done, 1 at its end.
        unreadable: Training images that could not be read and were replaced, since the start of the run.
        val_unreadable: Validation images that could not be read, and that the metrics leave out.
        gradient_bytes: Gradients that each process gave into sums over all of them, bytes an update; counted where they
            are sent (paper, section 4.1). None in one process, before training, and with shards.
        statistics_bytes: The same of running statistics: of batch norms, and 2N + 1 numbers of a fixed head.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float | None
    train_top1: float | None
    val_loss: float
    val_top1: float
    val_top5: float
    val_ece: float
    scale: float | None
    images_per_second: float
    seconds: float
    fraction: float = 1.0
    unreadable: int = 0
    val_unreadable: int = 0
    gradient_bytes: float | None = None
    statistics_bytes: float | None = None

    @property
    def epochs(self) -> float:
        """Epochs since the start of the run."""
        return self.epoch + self.fraction

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Validated:
    """Before the end of an epoch (`val_every`), or before any (`max_drop`, `last_block_epochs`)."""

    record: EpochRecord
    is_best: bool


@dataclass(frozen=True)
class EpochEnded:
    record: EpochRecord
    is_best: bool


Event = (
    Warned
    | RunStarted
    | Evaluating
    | OriginalEvaluated
    | Evaluated
    | Calibrated
    | LastBlockEpoch
    | EpochStarted
    | Step
    | Validated
    | EpochEnded
)
Listener = Callable[[Event], object]
