"""The events that a run sends to its listener; training itself prints nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fixify._values import Count, Measured, Number, Percent, Share, finite_or_none
from fixify.metrics import Metrics

Phase = Literal["teacher", "original", "before", "features", "validation"]


@dataclass(frozen=True)
class Warned:
    """Something that a person should know and that did not stop the run; `text` is a sentence."""

    text: str


@dataclass(frozen=True)
class RunStarted:
    """The run starts or resumes; the first event except for warnings.

    Attributes:
        epochs: Epochs of the whole run.
        first_epoch: Epoch that it starts with; above 0 when it resumes.
        batches: Batches per epoch.
        train, val: Descriptions of the data, for a person.
        device: Where it runs.
        processes: World size.
        workers: Loader processes.
        parameters: Parameters of the model.
        trainable: Parameters that learn.
        frozen: Names of the frozen stages (`freeze`).
        folder: Folder of the run.
        first_step: Updates before it starts; above 0 when it resumes.
        resumed: Whether it resumes from a state.
        config: What determines the result: data, model and options, JSON-safe.
        loss_note: How the loss of very many classes is computed, for a person; None with few.
        teacher_note: What the run learns from by default, for a person; None if a person chose it.
        convert_at: Updates after which the learned classifier becomes a fixed head; None if it does not.
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
    loss_note: str | None = None
    teacher_note: str | None = None
    convert_at: int | None = None


@dataclass(frozen=True)
class RateChosen:
    """The learning rate was found by a test (`lr="auto"`).

    Attributes:
        lr: The rate.
        before: Loss on held-out training images without training.
        losses: (rate, the same loss after a few steps) of each rate that was tried.
    """

    lr: float
    before: float
    losses: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Evaluating:
    """Some of the images were evaluated.

    Attributes:
        phase: "original" or "before": the original, or the model before training, is validated. "validation": the model
            is validated during training. "teacher": the teacher labels the validation images. "features": the features
            of training images are computed.
        images: Images so far.
        total: Images in this phase.
    """

    phase: Phase
    images: int
    total: int


@dataclass(frozen=True)
class OriginalEvaluated:
    """The original, whose accuracy is the goal, was evaluated."""

    name: str
    metrics: Metrics


@dataclass(frozen=True)
class Evaluated:
    """The model was evaluated before any training; a second time if its heads were `calibrated` first."""

    metrics: Metrics
    calibrated: bool = False


@dataclass(frozen=True)
class Calibrated:
    """The statistics of standardising heads were computed from this number of training images."""

    images: int


@dataclass(frozen=True)
class ClassifierConverted:
    """The learned classifier, with which the run began, became a fixed head; its validation follows.

    Attributes:
        step: Updates before it.
        head: The kind of the head.
        bytes_per_class: Bytes of the code of a class.
        images: Training images on which it was fitted to the learned classifier.
        loss_note: See `RunStarted`.
    """

    step: int
    head: str
    bytes_per_class: int
    images: int
    loss_note: str | None = None


@dataclass(frozen=True)
class LastBlockEpoch:
    """The last blocks were trained for one epoch, before the whole network.

    Attributes:
        epoch: Which epoch, from 0.
        epochs: Epochs in total.
        images: Images whose features are used.
        loss: Mean loss of the epoch.
    """

    epoch: int
    epochs: int
    images: int
    loss: float


@dataclass(frozen=True)
class EpochStarted:
    """An epoch starts, counted from 0."""

    epoch: int
    epochs: int


@dataclass(frozen=True)
class Step:
    """Progress within an epoch: after every step on a CPU, after every 20th on other devices.

    Attributes:
        epoch: Which epoch, from 0.
        batch: Batches of it that are done.
        batches: Batches per epoch.
        loss, top1: Means over the epoch so far.
        lr: Learning rate of the last update.
        images_per_second: Training throughput, loading included.
        scale: The head's learned scale alpha; None for other heads.
        step: Updates since the start of the run.
        recent_loss: Mean loss since the previous event of this kind.
        recent_images: Images since the previous event of this kind.
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
    """The record of one validation, after an epoch or within it; one line of metrics.jsonl.

    Epochs count from 0, as in timm's summary.csv.

    Attributes:
        epoch: Which epoch.
        step: Updates since the start of the run.
        lr: Learning rate of the last update.
        train_loss: Mean training loss over the epoch so far; None at its start.
        train_top1: Training top-1 over the epoch so far, percent. With mixup the label with the larger weight counts,
            without labels the teacher's answer.
        val_loss, val_top1, val_top5, val_ece: See `fixify.metrics.Metrics`; of the moving average if there is one.
        scale: The head's learned scale alpha; None for other heads.
        images_per_second: Training throughput, loading included.
        seconds: Time since the epoch started, this validation included.
        fraction: Part of the epoch that was done, 1 at its end.
        unreadable: Training images that could not be read and were replaced, since the start of the run.
        val_unreadable: Validation images that could not be read; the metrics leave them out.
        gradient_bytes: Bytes of gradients per update that each process gave to all-reduce (paper, section 4.1),
            counted where they are sent. None in one process, before training, and with `shard`.
        statistics_bytes: Bytes of running statistics per update: those of batch norms, and 2N + 1 numbers per fixed
            head. None as for `gradient_bytes`.
        classifier: In a run that converts its classifier: "learned" before that, "converted" for the validation that
            follows it. None later, and in other runs.
        gained: Validation images that are right and that the start gets wrong; None if it was not compared with the
            start image by image (see `is_above_start`).
        lost: Validation images that are wrong and that the start gets right; None like `gained`.
    """

    epoch: Count
    step: Count
    lr: Measured
    train_loss: Number | None
    train_top1: Percent | None
    val_loss: Measured
    val_top1: Percent
    val_top5: Percent
    val_ece: Measured
    scale: Number | None
    images_per_second: Measured
    seconds: Measured
    fraction: Share = 1.0
    unreadable: Count = 0
    val_unreadable: Count = 0
    gradient_bytes: Number | None = None
    statistics_bytes: Number | None = None
    classifier: Literal["learned", "converted"] | None = None
    gained: Count | None = None
    lost: Count | None = None

    @property
    def epochs(self) -> float:
        """Epochs since the start of the run."""
        return self.epoch + self.fraction

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a line of metrics.jsonl holds it; a number that is not finite becomes None."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}


def is_above_start(record: EpochRecord) -> bool:
    """Check that a validation is above the start by more than chance, if it was compared with the start.

    If b images were gained and c lost by chance, b - c has mean 0 and standard deviation sqrt(b + c) (McNemar, 1947).
    The start stays unless the gain is larger than two of them, about 2 % of chance for one validation. One of them, as
    in the rule of Breiman et al. (1984), is too little for the highest of several (tests/benchmarks/gentle.py). Without
    the comparison every validation counts as above it.
    """
    if record.gained is None or record.lost is None:
        return True
    return record.gained - record.lost > 2 * math.sqrt(record.gained + record.lost)


def best_of(start: EpochRecord | None, history: Sequence[EpochRecord]) -> EpochRecord | None:
    """Return the validation with the highest top-1; of equal ones that with the lowest loss, then the first.

    Those that are no more than chance above the start are no candidates (`is_above_start`), and neither are validations
    of a learned classifier that the run converts.

    Args:
        start: The validation before training; None if it is no candidate.
        history: The validations since then.
    """
    fixed = [record for record in history if record.classifier != "learned"]
    candidates = fixed if start is None else [start, *filter(is_above_start, fixed)]
    return max(candidates, key=lambda record: (record.val_top1, -record.val_loss), default=None)


def gentler(lr: float | None, *, taught: bool) -> str:
    """Say what to try where training makes a model worse.

    Args:
        lr: The peak learning rate; None if it is unknown.
        taught: Whether the run has a teacher already, other than the start itself.
    """
    rate = "" if lr is None else f": --lr {lr / 10:.1g}"
    teacher = "" if taught else ", or learn from the original too: --distill ORIGINAL"
    return f"Try a lower learning rate{rate}{teacher}."


@dataclass(frozen=True)
class Validated:
    """A validation that does not end an epoch (`val_every`, `max_drop`, `last_block_epochs`)."""

    record: EpochRecord
    is_best: bool


@dataclass(frozen=True)
class EpochEnded:
    """The validation at the end of an epoch."""

    record: EpochRecord
    is_best: bool


Event = (
    Warned
    | RunStarted
    | RateChosen
    | Evaluating
    | OriginalEvaluated
    | Evaluated
    | Calibrated
    | ClassifierConverted
    | LastBlockEpoch
    | EpochStarted
    | Step
    | Validated
    | EpochEnded
)
Listener = Callable[[Event], object]
