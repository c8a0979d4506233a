"""A whole run: validate, calibrate, train, validate each epoch, keep the best and the last, resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from fixify.data import OpenedData, Subset, make_loader
from fixify.data.seeding import permutation
from fixify.errors import OutputError, OutputExistsError, TrainingError
from fixify.evaluation import Metrics, evaluate
from fixify.training.calibration import calibrate_heads_, uncalibrated_heads
from fixify.training.events import (
    Calibrated,
    EpochEnded,
    EpochRecord,
    EpochStarted,
    Evaluated,
    Evaluating,
    Event,
    Listener,
    RunStarted,
)
from fixify.training.interrupt import Stopped, StopRequest, TrainingInterrupted, stop_on_signals
from fixify.training.logging import LOG_FILES, write_logs, write_run
from fixify.training.loop import Engine, head_scale, train_epoch
from fixify.training.optimisation import make_optimiser, make_schedule
from fixify.training.options import FinetuneOptions
from fixify.training.resume import STATE_FILE, Progress, Trained, read_state, write_state

BEST_FILE, LAST_FILE = "best.fixed.safetensors", "last.fixed.safetensors"
_CALIBRATION = 4  # random stream beside those of fixify.data.loader and fixify.training.loop

SaveModel = Callable[[nn.Module, Path, dict[str, Any]], object]
"""Writes the model to the path, replacing what is there, with the record of its training (JSON-safe)."""


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run.

    Attributes:
        best_path, last_path: The checkpoints of the best and of the last epoch.
        before: Metrics of the model as it came.
        after: The best epoch.
        history: Every epoch.
    """

    best_path: Path
    last_path: Path
    before: Metrics
    after: EpochRecord
    history: tuple[EpochRecord, ...]


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
        on_event: Told what happens.

    Raises:
        TrainingError: a loss that is not finite, nothing to resume, or a state of another run.
        TrainingInterrupted: SIGINT or SIGTERM; the state was saved.
        OutputExistsError, OutputError: `out` has a run already, or cannot be written.
        DataError: an image cannot be read.
    """
    with stop_on_signals() as stop:
        run = _Run(model, train, val, preprocessing, options, out, save, facts or {}, on_event or _silent, stop)
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
        on_event: Listener,
        stop: StopRequest,
    ) -> None:
        self.options, self.out, self.save, self.on_event, self.stop = options, out, save, on_event, stop
        self.preprocessing, self.train_data, self.val_data = preprocessing, train, val
        self.device, self.workers = options.resolved_device(), options.resolved_workers()
        self.facts = {
            **facts,
            "data": train.name,
            "class_names": list(train.class_names),
            "train_images": len(train),
            "val_images": len(val),
        }
        self.progress = Progress()
        self.has_state = False
        self.model = model.to(self.device)
        if options.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.val_loader = make_loader(val, preprocessing, training=False, **self._loading())
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
            _claim_folder(self.out, force=force)
            self._announce()
            self.progress.before = self._evaluate(self.model, "before")
            self.on_event(Evaluated(self.progress.before))
            self._calibrate()
        if self.options.ema_decay is not None:
            # An average over few steps would still be the start: the decay warms up, 1 - (1 + step)^(-2/3) at first.
            self.engine.ema = ModelEmaV3(self.model, decay=self.options.ema_decay, use_warmup=True)
        if resume:
            self.progress = read_state(self.out, self._trained(), self.options, self.facts, self.device)
            self.has_state = True
            self.engine.schedule.step_update(self.progress.updates)
            self._announce()
        else:
            write_run(self.out, self.options, self.facts)
            self._write_state()
        write_logs(self.out, self.progress.history)

    def _announce(self) -> None:
        self.on_event(
            RunStarted(
                epochs=self.options.epochs,
                first_epoch=self.progress.epoch,
                batches=len(self.engine.loader),
                train=self.train_data.description,
                val=self.val_data.description,
                device=str(self.device),
                workers=self.workers,
            )
        )

    def train(self) -> FinetuneResult:
        while self.progress.epoch < self.options.epochs:
            self.on_event(EpochStarted(self.progress.epoch, self.options.epochs))
            try:
                train_epoch(self.engine, self.progress, self.stop, self.on_event)
                self._end_epoch()
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
        )

    def close(self) -> None:
        self.engine.loader.close()
        self.val_loader.close()

    def _end_epoch(self) -> None:
        progress, started = self.progress, time.perf_counter()
        evaluated = self.model if self.engine.ema is None else self.engine.ema.module
        metrics = self._evaluate(evaluated, "validation")
        record = EpochRecord(
            epoch=progress.epoch,
            step=progress.updates,
            lr=progress.lr,
            train_loss=progress.loss_sum / progress.images,
            train_top1=100 * progress.right / progress.images,
            val_loss=metrics.loss,
            val_top1=metrics.top1,
            val_top5=metrics.top5,
            val_ece=metrics.ece,
            scale=head_scale(evaluated),
            images_per_second=progress.images / max(progress.seconds, 1e-9),
            seconds=progress.seconds + time.perf_counter() - started,
        )
        progress.next_epoch(record)
        is_best = progress.best() is record
        # The state comes last: a crash between the files repeats the epoch, and writes the same ones again.
        self.save(evaluated, self.out / LAST_FILE, self._training_record(record))
        if is_best:
            self.save(evaluated, self.out / BEST_FILE, self._training_record(record))
        self._write_state()
        write_logs(self.out, progress.history)
        self.on_event(EpochEnded(record, is_best))

    def _training_record(self, record: EpochRecord) -> dict[str, Any]:
        before = None if self.progress.before is None else self.progress.before.to_dict()
        return {
            **self.facts,
            "options": self.options.recipe(),
            "before": before,
            "after": {key: value for key, value in record.to_dict().items() if key.startswith("val_")},
            "epochs_done": record.epoch + 1,
            "updates": record.step,
        }

    def _evaluate(self, model: nn.Module, phase: Any) -> Metrics:
        def on_batch(images: int) -> None:
            self.on_event(Evaluating(phase, images, len(self.val_data)))
            if self.stop.requested:
                raise Stopped

        return evaluate(
            model,
            self.val_loader,
            device=self.device,
            amp=self.options.amp,
            channels_last=self.options.channels_last,
            on_batch=on_batch,
        )

    def _calibrate(self) -> None:
        if not uncalibrated_heads(self.model):
            return
        order = permutation(self.options.seed, 0, _CALIBRATION, count=len(self.train_data))
        picked = Subset(self.train_data.images, order[: self.options.calibration_images].tolist())
        images = OpenedData(picked, self.train_data.class_names, "", "", self.train_data.name, "train")
        loading = {**self._loading(), "workers": 0}
        loader = make_loader(images, self.preprocessing, training=False, **loading)
        self.on_event(Calibrated(calibrate_heads_(self.model, loader, device=self.device)))

    def _trained(self) -> Trained:
        engine = self.engine
        return Trained(self.model, engine.optimiser, engine.scaler, None if engine.ema is None else engine.ema.module)

    def _write_state(self) -> None:
        write_state(self.out, self._trained(), self.progress, self.options, self.facts)
        self.has_state = True


def _claim_folder(out: Path, *, force: bool) -> None:
    """Make the folder, or clear what an earlier run left in it: a stale best would pass for this run's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        present = [out / name for name in (BEST_FILE, LAST_FILE, STATE_FILE, *LOG_FILES) if (out / name).exists()]
        if present and not force:
            raise OutputExistsError(
                f"There is a run in {out} already ({present[0].name}).",
                hint="Go on with --resume, choose another folder with -o, or replace it with --force.",
            )
        for path in present:
            path.unlink()
    except OSError as error:
        raise OutputError(f"Cannot use the folder {out}: {error.strerror}.") from error


def _silent(_event: Event) -> None:
    pass
