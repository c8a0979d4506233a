"""The state of a run, from which it continues exactly.

Stored are the weights, the optimiser's moments, the gradient scaler, the moving average, and how far the run is: epoch,
batch of it, updates, sums, history. Nothing else changes while training. Order, augmentation, mixing and dropout are
functions of (seed, epoch, batch, image) (see `fixify.data.seeding`), so there is no random state to store, and the
position of the sampler is the number of the batch; the learning rate is a function of the number of updates. A run can
be resumed after any update, by another number of loader processes, and whatever else draws random numbers.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixify.data import Unreadable, UnreadableImages
from fixify.errors import TrainingError
from fixify.metrics import Confusions, Metrics
from fixify.training import distributed
from fixify.training.engine import Engine, head_scale
from fixify.training.events import EpochEnded, EpochRecord, Listener, Validated, Warned
from fixify.training.options import PATIENCE, FinetuneOptions
from fixify.training.parallel import load_whole, own_part, whole_moments, whole_weights
from fixify.training.run_folder import (
    PREVIOUS_STATE_FILE,
    STATE_FILE,
    StepRecord,
    changed,
    machine_facts,
    read_sealed,
    tidy,
    write_confusions,
    write_logs,
    write_sealed,
    write_unreadable,
)

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
    distributed.on_rank_zero(lambda: write_sealed(folder, state))


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
    together, processes = size_then * processes_then, distributed.world_size()
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


# What a run keeps: how far it is, and the files that say so.


_ROUNDING = 1e-9  # 97.8 - 97.3 is a little more than 0.5

SaveModel = Callable[[nn.Module, Path, dict[str, Any]], object]
"""Writes the model to the path, replacing what is there, with the record of its training (JSON-safe)."""


class Keeper:
    """Keeps the progress of a run, and writes its state, its checkpoints and its logs.

    Args:
        engine: What is trained.
        out: Folder of the run.
        save: Writes a checkpoint.
        suffix: Of its file.
        facts: What the run is of; in every file, and compared on resuming.
        on_event: Told of every validation.
        unreadable: Images that cannot be read, of "train" and "val"; counted and listed.
    """

    def __init__(
        self,
        engine: Engine,
        out: Path,
        save: SaveModel,
        suffix: str,
        facts: dict[str, Any],
        on_event: Listener,
        unreadable: dict[str, UnreadableImages],
    ) -> None:
        self.engine, self.options = engine, engine.options
        self.out, self.save, self.facts, self.on_event = out, save, facts, on_event
        self.best_path, self.last_path = out / f"best{suffix}", out / f"last{suffix}"
        self.progress = Progress()
        self.unreadable = unreadable
        self.has_state = False
        self.written = time.monotonic()
        self.machine = machine_facts(engine.device)

    def read_state(self) -> None:
        """Continue where the newest whole state in the folder is; raises `TrainingError` if there is none that fits."""
        stored = self._newest_state()
        self.progress = read_state(stored, self._trained(), self.options, self.facts)
        for split, messages in self.progress.unreadable.items():
            self.unreadable[split].messages.update(dict.fromkeys(messages))
        self.has_state = True
        distributed.on_rank_zero(lambda: tidy(self.out))
        if (difference := changed(stored.content.get("machine", {}), self.machine)) is not None:
            self.on_event(Warned(f"Other numbers than without the interruption are possible: {difference}."))
        if stored.damaged is not None:
            distributed.on_rank_zero(lambda: self._promote(stored))
        self.engine.schedule.step_update(self.progress.updates)

    def _newest_state(self) -> Stored:
        """The first process reads it: the folder need not be where the others are."""
        if distributed.world_size() == 1:
            return newest_state(self.out, self.engine.device)
        path, packed, damaged = distributed.on_rank_zero(lambda: newest_state(self.out, torch.device("cpu")).packed())
        return Stored(path, torch.load(io.BytesIO(packed), weights_only=True), damaged)

    def _promote(self, stored: Stored) -> None:
        """Make the previous state the newest: else the next one would push the good one out."""
        if stored.damaged is not None:
            what = "damaged" if stored.damaged.exists() else "missing"
            self.on_event(Warned(f"{stored.damaged} is {what}; going on from the state before it, {stored.path.name}."))
            stored.path.replace(stored.damaged)

    def write_state(self) -> None:
        """Write how far the run is.

        Raises:
            TrainingError: weights are not finite; the state before is kept.
            OutputError: the disk is full.
        """
        check_weights(self.engine.model, self.progress.updates)
        self._count_unreadable()
        write_state(self.out, self._trained(), self.progress, self.options, self.facts, self.machine)
        self.has_state = True
        self.written = time.monotonic()

    def _count_unreadable(self) -> None:
        """Tell all processes what each could not read."""
        for split, images in self.unreadable.items():
            for messages in distributed.all_gather(list(images.messages)):
                for message in messages:
                    images.add(Unreadable(message))
            self.progress.unreadable[split] = list(images.messages)

    def state_is_due(self) -> bool:
        """Whether the last state is older than `options.save_minutes`, by the first process's clock."""
        if self.options.save_minutes is None:
            return False
        due = time.monotonic() - self.written >= 60 * self.options.save_minutes
        return distributed.largest(int(due and distributed.is_rank_zero())) == (1,)

    def write_logs(self) -> None:
        """Write metrics.jsonl, summary.csv and steps.jsonl; unreadable.txt if there is anything to list."""
        distributed.on_rank_zero(self._write_logs)

    def _write_logs(self) -> None:
        write_logs(self.out, self.progress.history, self.progress.steps)
        if any(self.progress.unreadable.values()):
            write_unreadable(self.out, self.progress.unreadable)

    def record(self, metrics: Metrics, confusions: Confusions, *, fraction: float, seconds: float) -> None:
        """Add a validation to the history and write everything.

        Args:
            metrics, confusions: Of `engine.evaluated`.
            fraction: Part of the epoch that was done; 1 closes it.
            seconds: That it took.
        """
        progress, evaluated, parallel = self.progress, self.engine.evaluated, self.engine.parallel
        gradient_bytes, statistics_bytes = (None, None) if parallel is None else parallel.bytes_an_update()
        self._count_unreadable()
        record = EpochRecord(
            epoch=progress.epoch,
            step=progress.updates,
            lr=progress.lr,
            train_loss=progress.loss_sum / progress.images if progress.images else None,
            train_top1=100 * progress.right / progress.images if progress.images else None,
            val_loss=metrics.loss,
            val_top1=metrics.top1,
            val_top5=metrics.top5,
            val_ece=metrics.ece,
            scale=head_scale(evaluated),
            images_per_second=progress.images / max(progress.seconds, 1e-9),
            seconds=seconds,
            fraction=fraction,
            unreadable=len(self.unreadable["train"]),
            val_unreadable=len(self.unreadable["val"]),
            gradient_bytes=gradient_bytes,
            statistics_bytes=statistics_bytes,
        )
        trained = self.engine.to_save()
        check_weights(evaluated, progress.updates)
        progress.history.append(record)
        if fraction == 1:
            progress.next_epoch()
        is_best = progress.best() is record
        # The state comes last: a crash between the files repeats the steps, and writes the same ones again.
        distributed.on_rank_zero(lambda: self._save(trained, record, is_best=is_best))
        self.write_state()
        self.write_logs()
        distributed.on_rank_zero(lambda: write_confusions(self.out, record.step, confusions))
        self.on_event(EpochEnded(record, is_best) if fraction == 1 else Validated(record, is_best))

    def _save(self, trained: nn.Module, record: EpochRecord, *, is_best: bool) -> None:
        self.save(trained, self.last_path, self._training_record(record))
        if is_best:
            self.save(trained, self.best_path, self._training_record(record))

    def original_top1(self) -> float | None:
        """The original's top-1, percent, given or measured."""
        measured = self.progress.original
        return self.options.original_top1 if measured is None else measured.top1

    def is_enough(self, top1: float) -> bool:
        """Whether this top-1 is within `options.max_drop` of the original's."""
        original, allowed = self.original_top1(), self.options.max_drop
        return original is not None and allowed is not None and original - top1 <= allowed + _ROUNDING

    def has_reached(self) -> bool:
        """Whether the last validation's top-1 is enough."""
        return bool(self.progress.history) and self.is_enough(self.progress.history[-1].val_top1)

    def _training_record(self, record: EpochRecord) -> dict[str, Any]:
        before = None if self.progress.before is None else self.progress.before.to_dict()
        return {
            **self.facts,
            "options": self.options.recipe(),
            "before": before,
            "after": {key: value for key, value in record.to_dict().items() if key.startswith("val_")},
            "epochs_done": record.epoch + 1 if record.fraction == 1 else round(record.epochs, 4) or 0,
            "updates": record.step,
            **({} if self.original_top1() is None else {"original_top1": self.original_top1()}),
        }

    def _trained(self) -> Trained:
        engine = self.engine
        average = None if engine.ema is None else engine.ema.module
        return Trained(engine.model, engine.optimiser, engine.scaler, average, sharded=engine.options.shard)


HINT = "Try a lower --lr, a longer --warmup-epochs, or --clip-grad 1."


def check_weights(model: nn.Module, updates: int) -> None:
    """Refuse to go on with weights or statistics that are not finite; to be called before they are written.

    A loss tells of such weights one step later; the last step of an epoch has none. Buffers may hold an infinity on
    purpose (masks), so of them only NaN is refused.

    Args:
        model: What would be written.
        updates: After how many updates, for the message.

    Raises:
        TrainingError: some are not; the names of the first are in it.
    """
    parameters = {name for name, _ in model.named_parameters()}
    here = [name for name, value in model.state_dict().items() if _is_bad(own_part(value), name in parameters)]
    bad = list(dict.fromkeys(name for names in distributed.all_gather(here) for name in names))
    if bad:
        named = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise TrainingError(
            f"After update {updates} some weights are not finite: {named}.",
            hint=f"They were not written; the files are those of the last validation or save before. {HINT}",
        )


def _is_bad(value: Tensor, is_parameter: bool) -> bool:
    if not value.is_floating_point():
        return False
    return bool((~value.isfinite()).any() if is_parameter else value.isnan().any())
