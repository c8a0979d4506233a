"""The state of a run, from which it continues exactly.

Stored are the weights, the optimiser's moments, the gradient scaler, the moving average, and how far the run is: epoch,
batch of it, updates, sums, history. Nothing else changes while training. Order, augmentation, mixing and dropout are
functions of (seed, epoch, batch, image) (see `fixify.data.seeding`), so there is no random state to store, and the
position of the sampler is the number of the batch; the learning rate is a function of the number of updates. A run can
be resumed after any update, by another number of loader processes, and whatever else draws random numbers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify.errors import TrainingError
from fixify.evaluation import Metrics
from fixify.training import distributed
from fixify.training.events import EpochRecord
from fixify.training.options import PATIENCE, FinetuneOptions
from fixify.training.shards import load_whole, whole_moments, whole_weights
from fixify.training.state import PREVIOUS_STATE_FILE, STATE_FILE, read_sealed, write_sealed
from fixify.training.steps import StepRecord

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
        unreadable: What was wrong with the images that could not be read, of "train" and "val".
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
    unreadable: dict[str, list[str]] = field(default_factory=dict)
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
    sharded: bool = False

    def state(self) -> dict[str, Any]:
        """All of it, on the device; of shards gathered on the first process's CPU, for which all have to call this."""
        return {
            "model": whole_weights(self.model) if self.sharded else self.model.state_dict(),
            "optimiser": whole_moments(self.model, self.optimiser) if self.sharded else self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; raises RuntimeError, ValueError or KeyError if it does not fit."""
        if self.sharded:
            load_whole(self.model, self.optimiser, state["model"], state["optimiser"])
        else:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def write_state(
    folder: Path,
    trained: Trained,
    progress: Progress,
    options: FinetuneOptions,
    facts: dict[str, Any],
    machine: dict[str, Any],
) -> None:
    """Write the state in one step, and keep the one before.

    Args:
        folder: The run's folder.
        trained: What is being trained.
        progress: How far it is.
        options: Compared when the run is resumed.
        facts: What the run is of (data, class names, source checkpoint); compared too.
        machine: Versions and device; a difference is told.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    state = {
        "version": _VERSION,
        **trained.state(),
        "progress": asdict(progress),
        "recipe": options.recipe(),
        "facts": facts,
        "machine": machine,
    }
    distributed.by_first(lambda: write_sealed(folder, state))


@dataclass(frozen=True)
class Stored:
    """A state that was read.

    Attributes:
        path: Its file.
        content: What is in it.
        damaged: The newer state, if it could not be used.
    """

    path: Path
    content: dict[str, Any]
    damaged: Path | None

    def packed(self) -> tuple[Path, bytes, Path | None]:
        """The same, to be sent: pickling would not know unsigned 16 bit codes again."""
        buffer = io.BytesIO()
        torch.save(self.content, buffer)
        return self.path, buffer.getvalue(), self.damaged


def newest_state(folder: Path, device: torch.device) -> Stored:
    """The newest state of a run that is whole.

    Raises:
        TrainingError: there is none.
    """
    newest, previous = folder / STATE_FILE, folder / PREVIOUS_STATE_FILE
    content = read_sealed(newest, device)
    if content is not None:
        return Stored(newest, content, None)
    content = read_sealed(previous, device)
    if content is not None:
        return Stored(previous, content, newest)
    if not newest.exists() and not previous.exists():
        raise TrainingError(f"There is no run to resume in {folder}: {STATE_FILE} is missing.")
    which = f"{newest} is" if not previous.exists() else f"{newest} and the state before it are"
    raise TrainingError(f"{which} damaged and cannot be resumed from.", hint="Start anew with --force.")


def read_state(stored: Stored, trained: Trained, options: FinetuneOptions, facts: dict[str, Any]) -> Progress:
    """Put a stored state into the model, the optimiser and the rest.

    Raises:
        TrainingError: it is of a run with other options, data or source.
    """
    path, state, folder = stored.path, stored.content, stored.path.parent
    version = state.get("version")
    if version != _VERSION:
        raise TrainingError(f"{path} is of state version {version}; this fixify reads version {_VERSION}.")
    _compare_images(folder, state["facts"], facts)
    _compare(folder, "facts", state["facts"], facts)
    # An option that is younger than the state had its default's effect.
    recipe = {**options.defaults(), **state["recipe"]}
    _compare_batches(folder, recipe["batch_size"], state.get("machine", {}).get("processes", 1), options.batch_size)
    _compare(folder, "options", recipe, options.recipe(), but=(*PATIENCE, "batch_size"))
    try:
        trained.load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} does not fit this model: {str(error).splitlines()[0]}") from error
    progress = Progress(**state["progress"])
    for name in ("original", "before"):
        metrics = state["progress"].get(name)
        setattr(progress, name, None if metrics is None else Metrics(**metrics))
    progress.history = [EpochRecord(**record) for record in state["progress"]["history"]]
    progress.steps = [StepRecord(**record) for record in state["progress"].get("steps", [])]
    return progress


def _compare_batches(folder: Path, size_then: int, processes_then: int, size: int) -> None:
    """Other processes may go on if their batches together are as large: order and augmentation are of those."""
    together, processes = size_then * processes_then, distributed.count()
    if size * processes == together:
        return
    fits = together % processes == 0
    raise TrainingError(
        f"The run in {folder} was started with {_batches(processes_then, size_then)}, and this would be "
        f"{_batches(processes, size)}.",
        hint=f"Resume with --batch-size {together // processes}."
        if fits
        else f"Resume with {processes_then} processes, or another number that divides {together}.",
    )


def _batches(processes: int, size: int) -> str:
    return f"{size} images a step" if processes == 1 else f"{processes} x {size} images a step"


def _compare_images(folder: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    for split, which in (("train", "training"), ("val", "validation")):
        if stored.get(f"{split}_listing") == given.get(f"{split}_listing"):
            continue
        was, now = stored[f"{split}_images"], given[f"{split}_images"]
        how = (
            f"there were {was:,} and are {now:,}"
            if was != now
            else f"{now:,} as before, of other names, sizes or labels"
        )
        raise TrainingError(
            f"The {which} images are not those that the run in {folder} was started with: {how}.",
            hint="Bring the data back to what it was, or start another run with -o.",
        )


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
