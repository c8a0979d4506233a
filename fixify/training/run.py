"""A whole run: validate, calibrate, train and validate in turns, keep the best and the last, resume."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fixify.checkpoints.slim import SUFFIX
from fixify.data import OpenedData, listing_digest
from fixify.errors import TrainingError
from fixify.metrics import Metrics
from fixify.training import distributed
from fixify.training.checkpointing import Keeper, SaveModel
from fixify.training.engine import make_engine
from fixify.training.events import (
    EpochRecord,
    EpochStarted,
    Evaluated,
    Event,
    Listener,
    OriginalEvaluated,
    RunStarted,
    Warned,
)
from fixify.training.interrupt import Stopped, StopRequest, TrainingInterrupted, stop_on_signals
from fixify.training.last_block import Stages
from fixify.training.loop import train_epoch
from fixify.training.options import FinetuneOptions
from fixify.training.run_folder import (
    check_recorded,
    claim_folder,
    machine_facts,
    model_facts,
    stored_nothing,
    write_run,
)
from fixify.training.teacher import OtherModel, Teacher, check_others
from fixify.training.validation import Validation, teller


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run.

    Attributes:
        best_path, last_path: The checkpoints of the best and of the last validation.
        before: Metrics of the model as it came.
        after: The best validation.
        history: Every validation.
        original_top1: The original's top-1 on the validation data, percent; None if it was neither given nor measured.
        reached: Whether `max_drop` was met; None without one.
    """

    best_path: Path
    last_path: Path
    before: Metrics
    after: EpochRecord
    history: tuple[EpochRecord, ...]
    original_top1: float | None = None
    reached: bool | None = None


def train_model(
    model: nn.Module,
    train: OpenedData,
    val: OpenedData,
    preprocessing: dict[str, Any],
    options: FinetuneOptions,
    out: Path,
    *,
    save: SaveModel,
    resume: bool = False,
    force: bool = False,
    facts: dict[str, Any] | None = None,
    original: OtherModel | None = None,
    teacher: OtherModel | None = None,
    command: str | None = None,
    suffix: str = SUFFIX,
    entries: Mapping[str, Any] | None = None,
    recorded: Mapping[str, Any] | None = None,
    on_event: Listener | None = None,
) -> FinetuneResult:
    """Train a classifier and keep its best and last state in `out`.

    Args:
        model: Any classifier, images to logits; trained in place. A fixed head that standardises and has no
            statistics yet is calibrated first.
        train, val: See `fixify.data.open_train_val`; their class counts have been checked.
        preprocessing: timm's data configuration of the model.
        options: How.
        out: Folder of the run; made if missing. Gets best.fixed.safetensors, last.fixed.safetensors, state.pt,
            run.json, recipe.yaml, metrics.jsonl, summary.csv, steps.jsonl and confusions.json.
        save: Writes a checkpoint.
        resume: Continue the run in `out`. Exact: the final weights are those of a run that was never stopped.
        force: Replace the run in `out`.
        facts: What else identifies the run (source checkpoint): recorded, and compared on resuming.
        original: What the model was converted from: evaluated once, before training, for `options.max_drop` and for the
            record.
        teacher: What the model learns from, beside the labels (`options.distill_weight`) or, with
            `options.unlabelled`, alone. If `val` is not labelled, its answers are what validation compares with.
        command: What was typed to start the run; recorded.
        suffix: Of the checkpoints: best and last with another suffix, where `save` writes other files.
        entries: Names and files as they were given (data, checkpoint, against, distill), for recipe.yaml.
        recorded: What a recipe recorded of its inputs (`fixify.training.run_folder.RECORDED`), to be the same.
        on_event: Told what happens.

    Raises:
        UsageError: `options.max_drop` without one top-1 to measure it from; unlabelled images without a teacher, or one
            that takes images of other channels.
        TrainingError: a loss that is not finite, nothing to resume, or a state of another run.
        TrainingInterrupted: SIGINT or SIGTERM; the state was saved.
        OutputExistsError, OutputError: `out` has a run already, or cannot be written.
        DataError: an image cannot be read.
    """
    check_others(options, preprocessing, (train, val), original, teacher)
    with stop_on_signals() as stop:
        run = _Run(
            model, train, val, preprocessing, options, out, save, suffix, facts or {}, original, teacher, on_event, stop
        )
        run.entries = entries or {}
        try:
            check_recorded(recorded or {}, run.facts, options)
            run.prepare(resume=resume, force=force, command=command)
            return run.train()
        except Stopped:
            keeper, number = run.keeper, stop.number or signal.SIGINT
            if not keeper.has_state:
                raise TrainingInterrupted(
                    "Stopped before training began.",
                    number=number,
                    hint="Begin with the same command and --resume, or with --force.",
                ) from None
            raise TrainingInterrupted(
                f"Stopped in epoch {keeper.progress.epoch + 1} of {options.epochs} after {keeper.progress.batch} of "
                f"{len(run.engine.loader)} batches; everything up to there is in {out}.",
                number=number,
                hint="Go on with the same command and --resume.",
            ) from None
        finally:
            run.close()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        train: OpenedData,
        val: OpenedData,
        preprocessing: dict[str, Any],
        options: FinetuneOptions,
        out: Path,
        save: SaveModel,
        suffix: str,
        facts: dict[str, Any],
        original: OtherModel | None,
        teacher: OtherModel | None,
        on_event: Listener | None,
        stop: StopRequest,
    ) -> None:
        self.entries: Mapping[str, Any] = {}
        self.options, self.stop = options, stop
        self.on_event: Listener = on_event if on_event is not None and distributed.is_rank_zero() else _silent
        self.original, self.teacher = original, teacher
        self.preprocessing, self.train_data = preprocessing, train
        self.facts = {
            "data": train.name,
            "class_names": list(train.class_names),
            "train_images": len(train),
            "val_images": len(val),
            "train_listing": listing_digest(train),
            "val_listing": listing_digest(val),
            **facts,
        }
        if original is not None:
            self.facts["original"] = original.identity()
        if teacher is not None:
            self.facts["teacher"] = teacher.identity()
        if not val.labelled:
            self.facts["val_labels"] = "the teacher's answers"
        self.engine = make_engine(model, train, preprocessing, options)
        self.engine.loader.unreadable.on_found = teller("training", self.on_event)
        self.validation = Validation(val, preprocessing, options, self.engine.device, stop, self.on_event)
        self.stages = Stages(self.engine, train, preprocessing, self.on_event, self._look_at_stop)
        self.keeper = Keeper(
            self.engine,
            out,
            save,
            suffix,
            self.facts,
            self.on_event,
            {"train": self.engine.loader.unreadable, "val": self.validation.unreadable},
        )

    def prepare(self, *, resume: bool, force: bool, command: str | None) -> None:
        """Bring the model to where training begins or goes on."""
        keeper = self.keeper
        if resume and distributed.on_rank_zero(lambda: stored_nothing(keeper.out)):
            self.on_event(Warned(f"The run in {keeper.out} ended before it had stored anything; it begins anew."))
            resume, force = False, True
        if not resume:
            started = self._started(command)
            distributed.on_rank_zero(lambda: self._begin(started, force=force))
            self._announce(resumed=False)
            self._open_validation()
            self._measure_original()
            as_calibrated = keeper.progress.before = self.validation.measure(self.engine.model, "before")
            self.on_event(Evaluated(as_calibrated))
            if self.stages.calibrate() and self.options.max_drop is not None:
                as_calibrated = self.validation.measure(self.engine.model, "before")
        self.engine.start_average()
        if resume:
            keeper.read_state()
            self._announce(resumed=True)
            self._open_validation()
        else:
            started = self._started(command)
            distributed.on_rank_zero(lambda: write_run(keeper.out, self.options, self.facts, started, self.entries))
            if keeper.is_enough(as_calibrated.top1):
                keeper.record(as_calibrated, self.validation.confusions(), fraction=0.0, seconds=as_calibrated.seconds)
            else:
                keeper.write_state()
        keeper.write_logs()
        if self.teacher is not None:
            self.engine.teacher = Teacher(
                self.teacher,
                self.preprocessing,
                device=self.engine.device,
                amp=self.options.amp,
                channels_last=self.options.channels_last,
            )

    def _begin(self, started: dict[str, Any], *, force: bool) -> None:
        claim_folder(self.keeper.out, force=force)
        write_run(self.keeper.out, self.options, self.facts, started, self.entries)

    def train(self) -> FinetuneResult:
        """Train to the end, or until it is good enough."""
        keeper = self.keeper
        if self.options.last_block_epochs and not keeper.progress.history:
            self.stages.train_last_block()
            metrics = self.validation.measure(self.engine.evaluated, "validation")
            keeper.record(metrics, self.validation.confusions(), fraction=0.0, seconds=metrics.seconds)
        with self.engine.training():
            while keeper.progress.epoch < self.options.epochs and not keeper.has_reached():
                self.on_event(EpochStarted(keeper.progress.epoch, self.options.epochs))
                try:
                    if not train_epoch(self.engine, keeper.progress, self.stop, self.on_event, self._validate, keeper):
                        self._validate()
                except Stopped:
                    keeper.write_state()
                    raise
        best, before = keeper.progress.best(), keeper.progress.before
        if best is None or before is None:
            raise TrainingError(f"The state in {keeper.out} has no epochs.")
        return FinetuneResult(
            best_path=keeper.best_path,
            last_path=keeper.last_path,
            before=before,
            after=best,
            history=tuple(keeper.progress.history),
            original_top1=keeper.original_top1(),
            reached=None if self.options.max_drop is None else keeper.has_reached(),
        )

    def close(self) -> None:
        """Stop the loaders' processes."""
        self.engine.loader.close()
        self.validation.close()

    def _validate(self) -> bool:
        """Measure what was trained so far, and say whether it is good enough to stop."""
        started = time.perf_counter()
        metrics = self.validation.measure(self.engine.evaluated, "validation")
        progress = self.keeper.progress
        fraction = progress.batch / len(self.engine.loader)
        seconds = progress.seconds + time.perf_counter() - started
        self.keeper.record(metrics, self.validation.confusions(), fraction=fraction, seconds=seconds)
        return self.keeper.has_reached()

    def _announce(self, *, resumed: bool) -> None:
        parameters = [(parameter.numel(), parameter.requires_grad) for parameter in self.engine.model.parameters()]
        self.on_event(
            RunStarted(
                epochs=self.options.epochs,
                first_epoch=self.keeper.progress.epoch,
                batches=len(self.engine.loader),
                train=self.train_data.description,
                val=self.validation.data.description + self._whose_labels(),
                device=str(self.engine.device),
                processes=distributed.world_size(),
                workers=self.options.resolved_workers(),
                parameters=sum(count for count, _ in parameters),
                trainable=sum(count for count, learns in parameters if learns),
                frozen=self.engine.frozen.stages,
                folder=self.keeper.out,
                first_step=self.keeper.progress.updates,
                resumed=resumed,
                config={**self.facts, "options": self.options.recipe()},
            )
        )

    def _started(self, command: str | None) -> dict[str, Any]:
        progress = self.keeper.progress
        named = {key: self.facts[key] for key in ("architecture",) if key in self.facts}
        measured = {"before": progress.before, "original_metrics": progress.original}
        return {
            **distributed.launch_record(),
            **({} if command is None else {"command": command}),
            "device": str(self.engine.device),
            "machine": machine_facts(self.engine.device),
            "model": {**model_facts(self.engine.model), **named},
            **{name: metrics.to_dict() for name, metrics in measured.items() if metrics is not None},
        }

    def _whose_labels(self) -> str:
        return "" if "val_labels" not in self.facts else "; top-1 is agreement with the teacher"

    def _open_validation(self) -> None:
        if not self.validation.data.labelled and self.teacher is not None:
            self.validation.label_with(self.teacher)

    def _measure_original(self) -> None:
        if self.original is not None:
            self.keeper.progress.original = self.validation.measure_other(self.original, "original")
            self.on_event(OriginalEvaluated(self.original.name, self.keeper.progress.original))

    def _look_at_stop(self) -> None:
        if self.stop.requested():
            raise Stopped


def _silent(_event: Event) -> None:
    pass
