"""Save and resume a run exactly.

A state holds the weights, the optimiser's moments, the gradient scaler, the moving average, and the progress: epoch,
batch, updates, sums and history. Nothing else changes during training. Order, augmentation, mixing and dropout are
functions of (seed, epoch, batch, image) (see `fixify.data.seeding`), so there is no random state to store; the
position of the sampler is the number of the batch, and the learning rate is a function of the number of updates. A run
can resume after any update and with any number of loader processes.

`StateStore` and `StoredState` know nothing of images; `fixify.language` uses them too.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from fixify._values import Count, counted
from fixify.data import Unreadable, UnreadableImages
from fixify.errors import CodebookMismatchError, FormatError, HeadSpecError, TrainingError
from fixify.metrics import Metrics
from fixify.training import distributed
from fixify.training.answers import Answers, RightImages
from fixify.training.engine import Engine, head_scale
from fixify.training.events import EpochEnded, EpochRecord, Listener, Validated, Warned, best_of
from fixify.training.facts import Machine, Recorded, RunFacts, RunOutput, this_machine
from fixify.training.head_conversion import HeadConversion
from fixify.training.options import PATIENCE, FinetuneOptions
from fixify.training.parallel import gather_optimiser_state, gather_weights, load_gathered, local_part
from fixify.training.run_folder import (
    PREVIOUS_STATE_FILE,
    STATE_FILE,
    StepRecord,
    read_sealed,
    tidy,
    write_confusions,
    write_logs,
    write_sealed,
    write_unreadable,
)
from fixify.training.run_records import from_plain

# Any run: find the state, check that it belongs to the run, write a new one.


_DAMAGED_HINT = "Choose another folder with -o, or replace the run with --force."


@dataclass(frozen=True)
class StoredState:
    """A state that was read.

    Attributes:
        path: Its file.
        content: What is in it.
        unusable: The newer state file, if that is damaged or missing.
    """

    path: Path
    content: dict[str, Any]
    unusable: Path | None = None

    def check_kind(self, version: int, key: str) -> None:
        """Check the version, an entry that only this kind of run has, and that what is compared can be.

        Raises:
            TrainingError: another version or kind of run wrote the state, or it is damaged.
        """
        for name in _PLAIN:
            if not _is_plain(self.content.get(name)):
                raise TrainingError(
                    f"{self.path} is damaged: its {name} is nested too deeply, or holds other than plain values.",
                    hint=_DAMAGED_HINT,
                )
        found = self.content.get("version")
        if found != version:
            raise TrainingError(f"{self.path} is of state version {found}; this fixify reads version {version}.")
        if key not in self.content:
            raise TrainingError(
                f"{self.path} is the state of another kind of run: it has no {key}.",
                hint="Choose another folder with -o.",
            )

    def check_entries(self, **kinds: type) -> None:
        """Check that entries have these types; a state of an older version may lack "machine".

        Raises:
            TrainingError: one is missing or of another type.
        """
        for name, kind in kinds.items():
            if name not in self.content and name == "machine":
                continue
            if not isinstance(self.content.get(name), kind):
                raise TrainingError(f"{self.path} is damaged: its {name} is no {kind.__name__}.", hint=_DAMAGED_HINT)

    def check_same(
        self, what: str, stored: Mapping[str, Any], given: Mapping[str, Any], *, ignored: Iterable[str] = ()
    ) -> None:
        """Refuse to resume a run that was started with other values.

        Args:
            what: "options" or "facts".
            stored: The values that the run was started with.
            given: The values now.
            ignored: Names that may differ.

        Raises:
            TrainingError: some differ; each is named.
        """
        differences = [
            f"{key} was {_shortened(stored.get(key))} and is {_shortened(given.get(key))}"
            for key in sorted({*stored, *given} - set(ignored))
            if stored.get(key) != given.get(key)
        ]
        if differences:
            raise TrainingError(
                f"The run in {self.path.parent} was started with other {what}: {'; '.join(differences)}.",
                hint="Resume with the same ones, or choose another folder with -o.",
            )

    def load(self, load: Callable[[dict[str, Any]], None]) -> None:
        """Put the content into a model.

        Raises:
            TrainingError: it does not fit.
        """
        try:
            load(self.content)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainingError(f"{self.path} does not fit this model: {problem}") from error

    def to_bytes(self) -> tuple[Path, bytes, Path | None]:
        """Serialise the state for other processes; pickle cannot restore unsigned 16-bit tensors."""
        buffer = io.BytesIO()
        torch.save(self.content, buffer)
        return self.path, buffer.getvalue(), self.unusable


# What a state says of its run; tensors, keys of several types and lists that hold themselves are not comparable.
_PLAIN = ("version", "recipe", "facts", "machine", "heads", *(each.name for each in fields(Recorded)))
_DEPTH = 12


def _is_plain(value: object, depth: int = 0) -> bool:
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return False
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return depth < _DEPTH and all(_is_plain(each, depth + 1) for each in value)
    return not isinstance(value, Tensor)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def newest_state(folder: Path, device: torch.device) -> StoredState:
    """Read the newest state of a run that is not damaged.

    Raises:
        TrainingError: there is none.
    """
    newest, previous = folder / STATE_FILE, folder / PREVIOUS_STATE_FILE
    content = read_sealed(newest, device)
    if content is not None:
        return StoredState(newest, content)
    content = read_sealed(previous, device)
    if content is not None:
        return StoredState(previous, content, unusable=newest)
    if not newest.exists() and not previous.exists():
        raise TrainingError(f"There is no run to resume in {folder}: {STATE_FILE} is missing.")
    which = f"{newest} is" if not previous.exists() else f"{newest} and the state before it are"
    raise TrainingError(f"{which} damaged and cannot be resumed from.", hint="Start anew with --force.")


class StateStore:
    """Writes the states of one run, and reads the newest one.

    Args:
        folder: Folder of the run.
        save_minutes: Age at which a state is due; None: it never is.
        on_warning: Called with a sentence if the newest state cannot be used.

    Attributes:
        has_state: Whether the run has written or resumed from a state.
    """

    def __init__(self, folder: Path, save_minutes: float | None, on_warning: Callable[[str], object]) -> None:
        self.folder, self.save_minutes, self.on_warning = folder, save_minutes, on_warning
        self.has_state = False
        self._written = time.monotonic()

    def is_due(self) -> bool:
        """Check whether the last state is older than `save_minutes`, by rank 0's clock; all processes call this."""
        if self.save_minutes is None:
            return False
        due = time.monotonic() - self._written >= 60 * self.save_minutes
        return distributed.all_max(int(due and distributed.is_rank_zero())) == (1,)

    def write(self, content: dict[str, Any]) -> None:
        """Write a state in one step, and keep the one before.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        distributed.on_rank_zero(lambda: write_sealed(self.folder, content))
        self.has_state = True
        self._written = time.monotonic()

    def read(self, device: torch.device) -> StoredState:
        """Read the newest state. Rank 0 reads it for all, because other machines may not have the folder.

        Raises:
            TrainingError: there is none that is not damaged.
        """
        if distributed.world_size() == 1:
            return newest_state(self.folder, device)
        path, packed, unusable = distributed.on_rank_zero(
            lambda: newest_state(self.folder, torch.device("cpu")).to_bytes()
        )
        return StoredState(path, torch.load(io.BytesIO(packed), weights_only=True), unusable)

    def resume_from(self, stored: StoredState) -> None:
        """Make a state that was loaded the newest one; else the next one would replace it and keep a damaged one.

        Raises:
            OutputError: the folder cannot be changed.
        """
        self.has_state = True
        distributed.on_rank_zero(lambda: tidy(self.folder))
        if stored.unusable is not None:
            distributed.on_rank_zero(lambda: self._promote(stored.path, stored.unusable))

    def _promote(self, path: Path, unusable: Path | None) -> None:
        if unusable is not None:
            problem = "damaged" if unusable.exists() else "missing"
            self.on_warning(f"{unusable} is {problem}. Resuming from the state before it, {path.name}.")
            path.replace(unusable)


# A run on images: its progress, and the content of its state.


def _of_splits(messages: dict[str, list[str]]) -> dict[str, list[str]]:
    if not messages.keys() <= {"train", "val"}:
        raise ValueError("the splits are train and val")
    return messages


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: Epoch being trained, from 0; the number of epochs at the end.
        batch: Batches of it that are done.
        updates: Updates since the start of the run.
        skipped: Steps that were skipped since the start because they were not finite.
        loss_sum, right, images: Sums over this epoch so far.
        seconds: Training time in this epoch so far.
        lr: Learning rate of the last update.
        original: Metrics of the original, if it was evaluated.
        before: Metrics of the model before training.
        start: The validation of the model that training starts from, after calibration. None if it is no candidate for
            the best one: from scratch, in a run that needs no training, and in a run that an older version started.
        start_right: Which validation images the start gets right, if later validations are compared with it image by
            image (`fixify.training.starting_point.defends_start`); None in a run that an older version started.
        history: One record per validation since then.
        unreadable: What is wrong with the images that could not be read, of "train" and "val".
        steps: The records of steps.jsonl.
        window_loss, window_images: Sums since the last of these records.
    """

    epoch: Count = 0
    batch: Count = 0
    updates: Count = 0
    skipped: Count = 0
    loss_sum: float = 0.0
    right: Count = 0
    images: Count = 0
    seconds: float = 0.0
    lr: float = 0.0
    original: Metrics | None = None
    before: Metrics | None = None
    start: EpochRecord | None = None
    start_right: RightImages | None = None
    history: list[EpochRecord] = field(default_factory=list)
    unreadable: Annotated[dict[str, list[str]], AfterValidator(_of_splits)] = field(default_factory=dict)
    steps: list[StepRecord] = field(default_factory=list)
    window_loss: float = 0.0
    window_images: Count = 0

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Progress:
        """Read what `dataclasses.asdict` made of a progress.

        Raises:
            ValueError: a value has another type, is out of range, or is unknown; the message names it.
        """
        return from_plain(cls, stored, "progress")

    def best(self) -> EpochRecord | None:
        """Return the best validation, the start included; None before the first."""
        return best_of(self.start, self.history)

    def log_step(self, epochs: float, scale: float | None) -> None:
        """Add the last update to the log of steps."""
        loss = self.window_loss / self.window_images
        self.steps.append(StepRecord(self.updates, epochs, loss, self.lr, scale))
        self.window_loss, self.window_images = 0.0, 0

    def next_epoch(self) -> None:
        """Go to the next epoch and reset the sums."""
        self.epoch += 1
        self.batch = self.right = self.images = 0
        self.loss_sum = self.seconds = 0.0


_VERSION = 1


def engine_state(engine: Engine) -> dict[str, Any]:
    """Collect everything that has tensors.

    Tensors stay on the device. A sharded model's are gathered on rank 0's CPU, and every process must call this.
    """
    sharded = engine.options.shard
    return {
        "model": gather_weights(engine.model) if sharded else engine.model.state_dict(),
        "optimiser": (
            gather_optimiser_state(engine.model, engine.optimiser) if sharded else engine.optimiser.state_dict()
        ),
        "scaler": engine.scaler.state_dict(),
        "ema": None if engine.ema is None else engine.ema.module.state_dict(),
        **({} if engine.signs is None else {"signs": engine.signs.state_dict()}),
    }


def load_engine_state(engine: Engine, state: dict[str, Any]) -> None:
    """Restore what `engine_state` returned.

    Raises:
        RuntimeError, ValueError, KeyError: it does not fit.
    """
    if engine.options.shard:
        load_gathered(engine.model, engine.optimiser, state["model"], state["optimiser"])
    else:
        engine.model.load_state_dict(state["model"])
        engine.optimiser.load_state_dict(state["optimiser"])
    engine.scaler.load_state_dict(state["scaler"])
    if engine.ema is not None:
        engine.ema.module.load_state_dict(state["ema"])
    if engine.signs is not None:
        engine.signs.load_state_dict(state["signs"])


def check_stored_run(stored: StoredState, facts: RunFacts, options: FinetuneOptions) -> None:
    """Check that a state belongs to a run with these facts and options.

    Raises:
        TrainingError: it is of another version, or was started with other data, source or options.
    """
    stored.check_kind(_VERSION, "facts")
    state, folder = stored.content, stored.path.parent
    try:
        was = RunFacts.from_dict(state["facts"])
        if not all(isinstance(count, int) for count in (was.train_images, was.val_images)):
            raise TypeError("the numbers of images are no whole numbers")
    except (KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{stored.path} does not say what its run is of: {error}.") from error
    stored.check_entries(recipe=dict, machine=dict)
    _check_images(folder, was, facts)
    stored.check_same("facts", was.to_dict(), facts.to_dict())
    # An option that did not exist when the state was written had the effect of its default.
    recipe = {**options.defaults(), **state["recipe"]}
    machine = Machine.from_dict(state.get("machine", {}))
    if not all(isinstance(each, int) and each > 0 for each in (recipe["batch_size"], machine.processes)):
        raise TrainingError(f"{stored.path} is damaged: it does not say how many images were in a step.")
    _check_batches(folder, recipe["batch_size"], machine.processes, options.batch_size)
    stored.check_same("options", recipe, options.recipe(), ignored=(*PATIENCE, "batch_size"))


def _check_images(folder: Path, was: RunFacts, now: RunFacts) -> None:
    for split, name in (("train", "training"), ("val", "validation")):
        if getattr(was, f"{split}_listing") == getattr(now, f"{split}_listing"):
            continue
        then, found = getattr(was, f"{split}_images"), getattr(now, f"{split}_images")
        how = (
            f"there were {then:,} and are {found:,}"
            if then != found
            else f"{found:,} as before, with other names, sizes or labels"
        )
        raise TrainingError(
            f"The {name} images are not those that the run in {folder} was started with: {how}.",
            hint="Restore the original data, or start another run with -o.",
        )


def _check_batches(folder: Path, size_then: int, processes_then: int, size: int) -> None:
    """Another number of processes may resume if all together have as many images per step."""
    together, processes = size_then * processes_then, distributed.world_size()
    if size * processes == together:
        return
    divides = together % processes == 0
    then = counted(processes_then, "process", "processes")
    raise TrainingError(
        f"The run in {folder} was started with {_batches(processes_then, size_then)}; this would be "
        f"{_batches(processes, size)}.",
        hint=f"Resume with --batch-size {together // processes}."
        if divides
        else f"Resume with {then}, or another number that divides {together}.",
    )


def _batches(processes: int, size: int) -> str:
    images = f"{counted(size, 'image')} per step"
    return images if processes == 1 else f"{processes} x {images}"


# What a run on images keeps.

_ROUNDING = 1e-9  # 97.8 - 97.3 is slightly more than 0.5


class RunKeeper:
    """Keeps the progress of a run, and writes its state, checkpoints and logs.

    Args:
        engine: What is trained.
        output: Where the run goes.
        facts: What the run is; part of every file, and compared when resuming.
        on_event: Called with every validation and warning.
        unreadable: The images of "train" and "val" that cannot be read; they are counted and listed.
        conversion: Converts the classifier in the run; None if it does not.

    Attributes:
        progress: How far the run is.
        saved: The epoch of the newest state, from 0, and how many of its batches are done; None if there is no state.
    """

    def __init__(
        self,
        engine: Engine,
        output: RunOutput,
        facts: RunFacts,
        on_event: Listener,
        unreadable: dict[str, UnreadableImages],
        conversion: HeadConversion | None = None,
    ) -> None:
        self.conversion = conversion
        self.engine, self.options = engine, engine.options
        self.output, self.facts, self.on_event, self.unreadable = output, facts, on_event, unreadable
        self.progress = Progress()
        self.machine = this_machine(engine.device)
        self.saved: tuple[int, int] | None = None
        self.store = StateStore(output.folder, self.options.save_minutes, lambda text: on_event(Warned(text)))

    def resume(self) -> None:
        """Restore the newest state of the folder.

        Raises:
            TrainingError: there is none, or it does not belong to this run.
        """
        stored = self.store.read(self.engine.device)
        check_stored_run(stored, self.facts, self.options)
        stored.load(self._load)
        for split, messages in self.progress.unreadable.items():
            self.unreadable[split].messages.update(dict.fromkeys(messages))
        changes = Machine.from_dict(stored.content.get("machine", {})).changes_to(self.machine)
        if changes is not None:
            self.on_event(Warned(f"Results may differ from an uninterrupted run: {changes}."))
        self.store.resume_from(stored)
        self.saved = self.progress.epoch, self.progress.batch

    def _load(self, state: dict[str, Any]) -> None:
        if self.conversion is not None and "heads" in state:
            try:
                self.conversion.restore(state["heads"], state["model"])
            except (FormatError, HeadSpecError, CodebookMismatchError) as error:
                raise ValueError(error.message) from error  # `StoredState.load` names the file
        load_engine_state(self.engine, state)
        self.progress = Progress.from_dict(state["progress"])
        self.engine.schedule.step_update(self.progress.updates)  # of the learning rates that the optimiser's state has

    def state_is_due(self) -> bool:
        """Check whether the last state is older than `options.save_minutes`; every process must call this."""
        return self.store.is_due()

    def write_state(self) -> None:
        """Write the state.

        Raises:
            TrainingError: some weights are not finite; the previous state is kept.
            OutputError: the disk is full.
        """
        check_weights(self.engine.model, self.progress.updates)
        self._share_unreadable()
        self.store.write(
            {
                "version": _VERSION,
                **engine_state(self.engine),
                **self._converted_heads(),
                "progress": asdict(self.progress),
                "recipe": self.options.recipe(),
                "facts": self.facts.to_dict(),
                "machine": self.machine.to_dict(),
            }
        )
        self.saved = self.progress.epoch, self.progress.batch

    def _converted_heads(self) -> dict[str, Any]:
        """Describe the heads that the classifier was converted to, if it was."""
        return {} if self.conversion is None or self.engine.awaits_conversion else {"heads": self.conversion.records()}

    def _share_unreadable(self) -> None:
        """Tell every process which images the others could not read."""
        for split, images in self.unreadable.items():
            for messages in distributed.all_gather(list(images.messages)):
                for message in messages:
                    images.add(Unreadable(message))
            self.progress.unreadable[split] = list(images.messages)

    def write_logs(self) -> None:
        """Write metrics.jsonl, summary.csv and steps.jsonl; unreadable.txt if it has a line."""
        distributed.on_rank_zero(self._write_logs)

    def _write_logs(self) -> None:
        write_logs(self.output.folder, self.progress.history, self.progress.steps)
        if any(self.progress.unreadable.values()):
            write_unreadable(self.output.folder, self.progress.unreadable)

    def record(
        self, metrics: Metrics, answers: Answers, *, fraction: float, seconds: float, converted: bool = False
    ) -> None:
        """Add a validation to the history, and write every file; no checkpoints while the run awaits a conversion.

        Args:
            metrics: Metrics of `engine.evaluated`.
            answers: Its answers.
            fraction: Part of the epoch that was done; 1 ends it.
            seconds: Time since the epoch started.
            converted: Whether the classifier was just converted.

        Raises:
            TrainingError: some weights are not finite; nothing is written.
            OutputError: a file cannot be written.
        """
        progress = self.progress
        self._share_unreadable()
        record = self._epoch_record(metrics, fraction=fraction, seconds=seconds, converted=converted)
        changes = None if progress.start_right is None else progress.start_right.changes_to(answers.right())
        if changes is not None:
            record = replace(record, gained=changes[0], lost=changes[1])
        to_save = self.engine.model_to_save()
        check_weights(self.engine.evaluated, progress.updates)
        progress.history.append(record)
        if fraction == 1:
            progress.next_epoch()
        is_best = progress.best() is record
        # The state comes after the checkpoints: after a crash between them, the same steps write the same files again.
        if record.classifier != "learned":
            distributed.on_rank_zero(lambda: self._save(to_save, record, is_best=is_best))
        self._write_files(record, answers)
        self.on_event(EpochEnded(record, is_best) if fraction == 1 else Validated(record, is_best))

    def start_from(self, metrics: Metrics, right: RightImages | None) -> None:
        """Make the model as it is, before any training, a candidate for the best; `write_start` writes it.

        Args:
            metrics: Its metrics.
            right: Which images it gets right, if later validations are to be compared with it image by image.
        """
        self._share_unreadable()
        self.progress.start = self._epoch_record(metrics, fraction=0.0, seconds=metrics.seconds)
        self.progress.start_right = right

    def write_start(self, record: EpochRecord, answers: Answers) -> None:
        """Write the start as the best checkpoint, the first state, and the logs.

        Raises:
            TrainingError: some weights are not finite; nothing is written.
            OutputError: a file cannot be written.
        """
        to_save = self.engine.model_to_save()
        check_weights(self.engine.evaluated, self.progress.updates)
        distributed.on_rank_zero(
            lambda: self.output.save(to_save, self.output.best_path, self._training_record(record))
        )
        self._write_files(record, answers)

    def _write_files(self, record: EpochRecord, answers: Answers) -> None:
        self.write_state()
        self.write_logs()
        distributed.on_rank_zero(lambda: write_confusions(self.output.folder, record.step, answers.confusions()))

    def _epoch_record(
        self, metrics: Metrics, *, fraction: float, seconds: float, converted: bool = False
    ) -> EpochRecord:
        progress, parallel = self.progress, self.engine.parallel
        gradient_bytes, statistics_bytes = (None, None) if parallel is None else parallel.bytes_per_update()
        return EpochRecord(
            epoch=progress.epoch,
            step=progress.updates,
            lr=progress.lr,
            train_loss=progress.loss_sum / progress.images if progress.images else None,
            train_top1=100 * progress.right / progress.images if progress.images else None,
            val_loss=metrics.loss,
            val_top1=metrics.top1,
            val_top5=metrics.top5,
            val_ece=metrics.ece,
            scale=head_scale(self.engine.evaluated),
            images_per_second=progress.images / max(progress.seconds, 1e-9),
            seconds=seconds,
            fraction=fraction,
            unreadable=len(self.unreadable["train"]),
            val_unreadable=len(self.unreadable["val"]),
            gradient_bytes=gradient_bytes,
            statistics_bytes=statistics_bytes,
            classifier="learned" if self.engine.awaits_conversion else "converted" if converted else None,
        )

    def _save(self, model: nn.Module, record: EpochRecord, *, is_best: bool) -> None:
        self.output.save(model, self.output.last_path, self._training_record(record))
        if is_best:
            self.output.save(model, self.output.best_path, self._training_record(record))

    def _training_record(self, record: EpochRecord) -> dict[str, Any]:
        before = None if self.progress.before is None else self.progress.before.to_dict()
        if before is not None:
            del before["seconds"]  # no result: equal runs write equal files
        original_top1 = self.original_top1()
        return {
            **self.facts.to_dict(),
            "options": self.options.recipe(),
            "before": before,
            "after": {key: value for key, value in record.to_dict().items() if key.startswith("val_")},
            "epochs_done": record.epoch + 1 if record.fraction == 1 else round(record.epochs, 4) or 0,
            "updates": record.step,
            **({} if original_top1 is None else {"original_top1": original_top1}),
        }

    def original_top1(self) -> float | None:
        """Return the original's top-1 in percent, given or measured; None if it is unknown."""
        measured = self.progress.original
        return self.options.original_top1 if measured is None else measured.top1

    def is_enough(self, top1: float) -> bool:
        """Check whether a top-1 is within `options.max_drop` of the original's."""
        original, allowed = self.original_top1(), self.options.max_drop
        return original is not None and allowed is not None and original - top1 <= allowed + _ROUNDING

    def has_reached_goal(self) -> bool:
        """Check whether the top-1 of the last validation is enough, and of a classifier that stays."""
        last = self.progress.history[-1] if self.progress.history else None
        return last is not None and last.classifier != "learned" and self.is_enough(last.val_top1)


NOT_FINITE_HINT = "Try a lower --lr, a longer --warmup-epochs, or --clip-grad 1."


def check_weights(model: nn.Module, updates: int) -> None:
    """Refuse weights and statistics that are not finite, before they are written.

    The loss shows such weights one step later, which is too late after the last step of an epoch. Buffers may hold an
    infinity on purpose (masks), so only NaN is refused in them.

    Args:
        model: What would be written.
        updates: Updates so far, for the message.

    Raises:
        TrainingError: some are not finite; the message names the first ones.
    """
    parameters = {name for name, _ in model.named_parameters()}
    here = [name for name, value in model.state_dict().items() if _is_bad(local_part(value), name in parameters)]
    bad = list(dict.fromkeys(name for names in distributed.all_gather(here) for name in names))
    if bad:
        named = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise TrainingError(
            f"After update {updates} some weights are not finite: {named}.",
            hint=f"They were not written; the files are those of the last validation or save. {NOT_FINITE_HINT}",
        )


def _is_bad(value: Tensor, is_parameter: bool) -> bool:
    if not value.is_floating_point():
        return False
    return bool((~value.isfinite()).any() if is_parameter else value.isnan().any())
