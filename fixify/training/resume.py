"""The state of a run, from which it continues exactly.

Order, augmentation and dropout are functions of (seed, epoch, batch, image) (see `fixify.data.seeding`), and the
learning rate is one of the number of updates. So no random state has to be stored, and a run can be resumed in the
middle of an epoch.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify._io import atomic_path
from fixify.errors import OutputError, TrainingError
from fixify.evaluation import Metrics
from fixify.training.events import EpochRecord
from fixify.training.options import PATIENCE, FinetuneOptions
from fixify.training.steps import StepRecord

STATE_FILE = "state.pt"
_VERSION = 1


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: Epoch being trained, from 0; equal to the number of epochs at the end.
        batch: Batches of it that are done.
        updates: Updates of the weights since the start.
        loss_sum, right, images: Sums over this epoch so far.
        seconds: Training time in this epoch so far.
        skipped: Steps that were left out since the start, because they were not finite.
        lr: Learning rate of the last update.
        original: Metrics of the model whose accuracy is the goal, if it was evaluated.
        before: Metrics of the model as it came.
        history: One record a validation.
        steps: The thin log of steps.
        window_loss, window_images: Sums since the last record of it.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    right: int = 0
    images: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    original: Metrics | None = None
    before: Metrics | None = None
    history: list[EpochRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    window_loss: float = 0.0
    window_images: int = 0

    def best(self) -> EpochRecord | None:
        """The validation with the highest top-1; of equal ones the lowest loss, then the first."""
        return max(self.history, key=lambda record: (record.val_top1, -record.val_loss), default=None)

    def log_step(self, epochs: float, scale: float | None) -> None:
        """Add the last update to the log of steps."""
        loss = self.window_loss / self.window_images
        self.steps.append(StepRecord(self.updates, epochs, loss, self.lr, scale))
        self.window_loss, self.window_images = 0.0, 0

    def next_epoch(self) -> None:
        """Close the epoch."""
        self.epoch += 1
        self.batch = self.right = self.images = 0
        self.loss_sum = self.seconds = 0.0


@dataclass(frozen=True)
class Trained:
    """Everything that has tensors to keep."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: nn.Module | None


def write_state(
    folder: Path, trained: Trained, progress: Progress, options: FinetuneOptions, facts: dict[str, Any]
) -> None:
    """Write the state in one step; the one before stays until the new one is whole.

    Args:
        folder: The run's folder.
        trained: What is being trained.
        progress: How far it is.
        options: Compared when the run is resumed.
        facts: What the run is of (data, class names, source checkpoint); compared too.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    state = {
        "version": _VERSION,
        "model": trained.model.state_dict(),
        "optimiser": trained.optimiser.state_dict(),
        "scaler": trained.scaler.state_dict(),
        "ema": None if trained.ema is None else trained.ema.state_dict(),
        "progress": asdict(progress),
        "recipe": options.recipe(),
        "facts": facts,
    }
    path = folder / STATE_FILE
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch's zip writer makes of a full disk
            raise OutputError(f"Cannot write {path}: {error}.", hint="The state before it was kept.") from error


def read_state(
    folder: Path, trained: Trained, options: FinetuneOptions, facts: dict[str, Any], device: torch.device
) -> Progress:
    """Put a stored state into the model, the optimiser and the rest.

    Raises:
        TrainingError: there is none, it is damaged, or it is of a run with other options, data or source.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise TrainingError(f"There is no run to resume in {folder}: {STATE_FILE} is missing.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        version = state["version"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{path} is damaged and cannot be resumed from.", hint="Start anew with --force."
        ) from error
    if version != _VERSION:
        raise TrainingError(f"{path} is of state version {version}; this fixify reads version {_VERSION}.")
    _compare(folder, "facts", state["facts"], facts)
    # An option that is younger than the state had its default's effect.
    _compare(folder, "options", {**FinetuneOptions().recipe(), **state["recipe"]}, options.recipe(), but=PATIENCE)
    try:
        trained.model.load_state_dict(state["model"])
        trained.optimiser.load_state_dict(state["optimiser"])
        trained.scaler.load_state_dict(state["scaler"])
        if trained.ema is not None:
            trained.ema.load_state_dict(state["ema"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} does not fit this model: {str(error).splitlines()[0]}") from error
    progress = Progress(**state["progress"])
    for name in ("original", "before"):
        stored = state["progress"].get(name)
        setattr(progress, name, None if stored is None else Metrics(**stored))
    progress.history = [EpochRecord(**record) for record in state["progress"]["history"]]
    progress.steps = [StepRecord(**record) for record in state["progress"].get("steps", [])]
    return progress


def _compare(folder: Path, what: str, stored: dict[str, Any], given: dict[str, Any], but: Sequence[str] = ()) -> None:
    differences = [
        f"{key} was {_short(stored.get(key))} and is {_short(given.get(key))}"
        for key in sorted({*stored, *given})
        if key not in but and stored.get(key) != given.get(key)
    ]
    if differences:
        raise TrainingError(
            f"The run in {folder} was started with other {what}: {'; '.join(differences)}.",
            hint="Resume with the same ones, or choose another folder with -o.",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
