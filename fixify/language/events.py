"""What the training of a language model tells its listener."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LanguageRunStarted:
    """Before anything else.

    Attributes:
        text: What the text is, for a person.
        device: Where it runs.
        learned: Parameters that learn.
        epochs, steps: Of the whole run, and of one epoch (an estimate where lengths vary).
        first_epoch: Where it begins: above 0 when a run is resumed.
        folder: Of the run.
    """

    text: str
    device: str
    learned: int
    epochs: int
    steps: int
    first_epoch: int
    folder: Path


@dataclass(frozen=True)
class LanguageStep:
    """After an update. The loss is the mean of the epoch so far, nats a word."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    words_per_second: float
    scale: float | None


@dataclass(frozen=True)
class LanguageRecord:
    """One validation, after an epoch, as it goes into metrics.jsonl. Epochs count from 0.

    Attributes:
        epoch: Which epoch.
        step: Updates since the start of the run.
        lr: Learning rate of the last update.
        train_loss: Mean over the epoch, with dropout, while the weights moved; nats a word.
        val_loss: Over the whole validation text.
        averaged: Whether `val_loss` is that of the mean of the weights ("asgd").
        scale: The fixed head's alpha; None with learned words.
        words_per_second: Training throughput.
        seconds: Training of this epoch.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    val_loss: float
    averaged: bool
    scale: float | None
    words_per_second: float
    seconds: float

    @property
    def val_perplexity(self) -> float:
        """e to the validation loss."""
        return math.exp(self.val_loss)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "val_perplexity": self.val_perplexity}


@dataclass(frozen=True)
class LanguageEpochEnded:
    record: LanguageRecord
    is_best: bool


LanguageEvent = LanguageRunStarted | LanguageStep | LanguageEpochEnded
LanguageListener = Callable[[LanguageEvent], object]
