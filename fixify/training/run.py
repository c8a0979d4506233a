"""A whole run: validate, calibrate, train and validate in turns, keep the best and the last, resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fixify.data import ImageLoader, OpenedData, Subset, make_loader
from fixify.data.seeding import permutation
from fixify.errors import TrainingError
from fixify.evaluation import Metrics
from fixify.training.calibration import calibrate_heads_, uncalibrated_heads
from fixify.training.distillation import Teacher
from fixify.training.events import (
    Calibrated,
    EpochEnded,
    EpochRecord,
    EpochStarted,
    Evaluated,
    Evaluating,
    Event,
    LastBlockEpoch,
    Listener,
    OriginalEvaluated,
    RunStarted,
    Validated,
)
from fixify.training.files import BEST_FILE, LAST_FILE, claim_folder
from fixify.training.interrupt import Stopped, StopRequest, TrainingInterrupted, stop_on_signals
from fixify.training.last_block import compute, divide, most_images, train_tail
from fixify.training.logging import write_logs, write_run
from fixify.training.loop import Engine, head_scale, train_epoch, training_loss
from fixify.training.optimisation import make_optimiser, make_schedule
from fixify.training.options import FinetuneOptions
from fixify.training.others import OtherModel, check_others
from fixify.training.resume import Progress, Trained, read_state, write_state
from fixify.training.validation import Validation

_ROUNDING = 1e-9  # 97.8 - 97.3 is a little more than 0.5
_CALIBRATION, _LAST_BLOCK = 4, 8  # random streams beside those of fixify.data.loader and fixify.training.loop

SaveModel = Callable[[nn.Module, Path, dict[str, Any]], object]
"""Writes the model to the path, replacing what is there, with the record of its training (JSON-safe)."""


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


def finetune(
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
            run.json, recipe.yaml, metrics.jsonl and summary.csv.
        save: Writes a checkpoint.
        resume: Continue the run in `out`. Exact: the final weights are those of a run that was never stopped.
        force: Replace the run in `out`.
        facts: What else identifies the run (source checkpoint): recorded, and compared on resuming.
        original: What the model was converted from: evaluated once, before training, for `options.max_drop` and for the
            record.
        teacher: What the model learns from, beside the labels (`options.distill_weight`) or, with
            `options.unlabelled`, alone. If `val` is not labelled, its answers are what validation compares with.
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
        run = _Run(model, train, val, preprocessing, options, out, save, facts or {}, original, teacher, on_event, stop)
        try:
            run.prepare(resume=resume, force=force)
            return run.train()
        except Stopped:
            if not run.has_state:
                raise TrainingInterrupted("Stopped before training began; there is nothing to resume.") from None
            raise TrainingInterrupted(
                f"Stopped in epoch {run.progress.epoch + 1} of {options.epochs} after {run.progress.batch} of "
                f"{len(run.engine.loader)} batches; everything up to there is in {out}.",
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
        facts: dict[str, Any],
        original: OtherModel | None,
        teacher: OtherModel | None,
        on_event: Listener | None,
        stop: StopRequest,
    ) -> None:
        self.options, self.out, self.save, self.stop = options, out, save, stop
        self.on_event: Listener = on_event if on_event is not None else _silent
        self.original, self.teacher = original, teacher
        self.preprocessing, self.train_data = preprocessing, train
        self.device, self.workers = options.resolved_device(), options.resolved_workers()
        self.facts = {
            "data": train.name,
            "class_names": list(train.class_names),
            "train_images": len(train),
            "val_images": len(val),
            **facts,
        }
        if original is not None:
            self.facts["original"] = original.identity()
        if teacher is not None:
            self.facts["teacher"] = teacher.identity()
        if not val.labelled:
            self.facts["val_labels"] = "the teacher's answers"
        self.progress = Progress()
        self.has_state = False
        self.model = model.to(self.device)
        if options.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.validation = Validation(val, preprocessing, options, self.device, stop, self.on_event)
        loader = make_loader(
            train,
            preprocessing,
            training=True,
            seed=options.seed,
            augmentation=options.augmentation(),
            **self._loading(),
        )
        optimiser = make_optimiser(self.model, options)
        self.engine = Engine(
            model=self.model,
            optimiser=optimiser,
            schedule=make_schedule(optimiser, options, -(-len(loader) // options.grad_accum)),
            scaler=torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16"),
            ema=None,
            loader=loader,
            options=options,
            device=self.device,
        )

    def _loading(self) -> dict[str, Any]:
        return {"batch_size": self.options.batch_size, "workers": self.workers, "device": self.device}

    def prepare(self, *, resume: bool, force: bool) -> None:
        """Bring the model to where training begins or goes on."""
        if not resume:
            claim_folder(self.out, force=force)
            self._announce()
            self._open_validation()
            self._measure_original()
            as_calibrated = self.progress.before = self.validation.measure(self.model, "before")
            self.on_event(Evaluated(as_calibrated))
            if self._calibrate() and self.options.max_drop is not None:
                as_calibrated = self.validation.measure(self.model, "before")
        if self.options.ema_decay is not None:
            # An average over few steps would still be the start: the decay warms up, 1 - (1 + step)^(-2/3) at first.
            self.engine.ema = ModelEmaV3(self.model, decay=self.options.ema_decay, use_warmup=True)
        if resume:
            self.progress = read_state(self.out, self._trained(), self.options, self.facts, self.device)
            self.has_state = True
            self.engine.schedule.step_update(self.progress.updates)
            self._announce()
            self._open_validation()
        else:
            write_run(self.out, self.options, self.facts)
            if self._is_enough(as_calibrated.top1):
                self._record(as_calibrated, fraction=0.0, seconds=as_calibrated.seconds)
            else:
                self._write_state()
        write_logs(self.out, self.progress.history)
        if self.teacher is not None:
            self.engine.teacher = Teacher(
                self.teacher,
                self.preprocessing,
                device=self.device,
                amp=self.options.amp,
                channels_last=self.options.channels_last,
            )

    def _open_validation(self) -> None:
        if not self.validation.data.labelled and self.teacher is not None:
            self.validation.label_with(self.teacher)

    def _announce(self) -> None:
        self.on_event(
            RunStarted(
                epochs=self.options.epochs,
                first_epoch=self.progress.epoch,
                batches=len(self.engine.loader),
                train=self.train_data.description,
                val=self.validation.data.description + self._whose_labels(),
                device=str(self.device),
                workers=self.workers,
            )
        )

    def _whose_labels(self) -> str:
        return "" if "val_labels" not in self.facts else "; top-1 is agreement with the teacher"

    def train(self) -> FinetuneResult:
        if self.options.last_block_epochs and not self.progress.history:
            self._train_last_block()
        while self.progress.epoch < self.options.epochs and not self._has_reached():
            self.on_event(EpochStarted(self.progress.epoch, self.options.epochs))
            try:
                if not train_epoch(self.engine, self.progress, self.stop, self.on_event, self._validate):
                    self._validate()
            except Stopped:
                self._write_state()
                raise
        best, before = self.progress.best(), self.progress.before
        if best is None or before is None:
            raise TrainingError(f"The state in {self.out} has no epochs.")
        return FinetuneResult(
            best_path=self.out / BEST_FILE,
            last_path=self.out / LAST_FILE,
            before=before,
            after=best,
            history=tuple(self.progress.history),
            original_top1=self._original_top1(),
            reached=None if self.options.max_drop is None else self._has_reached(),
        )

    def close(self) -> None:
        self.engine.loader.close()
        self.validation.close()

    def _original_top1(self) -> float | None:
        measured = self.progress.original
        return self.options.original_top1 if measured is None else measured.top1

    def _is_enough(self, top1: float) -> bool:
        original, allowed = self._original_top1(), self.options.max_drop
        return original is not None and allowed is not None and original - top1 <= allowed + _ROUNDING

    def _has_reached(self) -> bool:
        return bool(self.progress.history) and self._is_enough(self.progress.history[-1].val_top1)

    def _evaluated_model(self) -> nn.Module:
        return self.model if self.engine.ema is None else self.engine.ema.module

    def _validate(self) -> bool:
        """Measure what was trained so far, and say whether it is good enough to stop."""
        started = time.perf_counter()
        metrics = self.validation.measure(self._evaluated_model(), "validation")
        fraction = self.progress.batch / len(self.engine.loader)
        self._record(metrics, fraction, self.progress.seconds + time.perf_counter() - started)
        return self._has_reached()

    def _record(self, metrics: Metrics, fraction: float, seconds: float) -> None:
        progress, evaluated = self.progress, self._evaluated_model()
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
        )
        progress.history.append(record)
        if fraction == 1:
            progress.next_epoch()
        is_best = progress.best() is record
        # The state comes last: a crash between the files repeats the steps, and writes the same ones again.
        self.save(evaluated, self.out / LAST_FILE, self._training_record(record))
        if is_best:
            self.save(evaluated, self.out / BEST_FILE, self._training_record(record))
        self._write_state()
        write_logs(self.out, progress.history)
        self.on_event(EpochEnded(record, is_best) if fraction == 1 else Validated(record, is_best))

    def _training_record(self, record: EpochRecord) -> dict[str, Any]:
        before = None if self.progress.before is None else self.progress.before.to_dict()
        return {
            **self.facts,
            "options": self.options.recipe(),
            "before": before,
            "after": {key: value for key, value in record.to_dict().items() if key.startswith("val_")},
            "epochs_done": record.epoch + 1 if record.fraction == 1 else round(record.epochs, 4) or 0,
            "updates": record.step,
            **({} if self._original_top1() is None else {"original_top1": self._original_top1()}),
        }

    def _measure_original(self) -> None:
        if self.original is not None:
            self.progress.original = self.validation.measure_other(self.original, "original")
            self.on_event(OriginalEvaluated(self.original.name, self.progress.original))

    def _calibrate(self) -> bool:
        if not uncalibrated_heads(self.model):
            return False
        with self._some_images(_CALIBRATION, self.options.calibration_images) as loader:
            self.on_event(Calibrated(calibrate_heads_(self.model, loader, device=self.device)))
        return True

    def _train_last_block(self) -> None:
        """Until it is done nothing is stored: a run that is stopped here begins it anew, and exactly so."""
        options = self.options
        with self._some_images(_LAST_BLOCK, 2) as loader:
            few = next(iter(loader))[0].to(self.device)
        divided = divide(self.model, few)
        count = min(len(self.train_data), most_images(divided, few))

        def tell(images: int) -> None:
            self.on_event(Evaluating("features", images, count))
            self._look_at_stop()

        with self._some_images(_LAST_BLOCK, count) as loader:
            features = compute(divided, loader, self.engine.teacher, device=self.device, amp=options.amp, on_batch=tell)
        train_tail(
            divided,
            features,
            options,
            lambda logits, targets, taught: training_loss(logits, targets, taught, options),
            device=self.device,
            on_epoch=lambda epoch, loss: self.on_event(LastBlockEpoch(epoch, options.last_block_epochs, count, loss)),
            on_step=self._look_at_stop,
        )
        if self.engine.ema is not None:
            self.engine.ema.set(self.model)
        metrics = self.validation.measure(self._evaluated_model(), "validation")
        self._record(metrics, fraction=0.0, seconds=metrics.seconds)

    def _look_at_stop(self) -> None:
        if self.stop.requested:
            raise Stopped

    @contextmanager
    def _some_images(self, stream: int, count: int) -> Iterator[ImageLoader]:
        """Some training images, as in validation."""
        order = permutation(self.options.seed, 0, stream, count=len(self.train_data))
        picked = replace(self.train_data, images=Subset(self.train_data.images, order[:count].tolist()))
        workers = self.workers if stream == _LAST_BLOCK else 0
        loader = make_loader(picked, self.preprocessing, training=False, **{**self._loading(), "workers": workers})
        try:
            yield loader
        finally:
            loader.close()

    def _trained(self) -> Trained:
        engine = self.engine
        return Trained(self.model, engine.optimiser, engine.scaler, None if engine.ema is None else engine.ema.module)

    def _write_state(self) -> None:
        write_state(self.out, self._trained(), self.progress, self.options, self.facts)
        self.has_state = True


def _silent(_event: Event) -> None:
    pass
