"""Run the whole training of a model: validate, calibrate, train and validate in turn, keep the best and the last."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fixify._leftovers import FolderLock
from fixify._memory import peak_bytes
from fixify._values import counted
from fixify.errors import LoaderError, ResourceError, TrainingError
from fixify.metrics import Metrics
from fixify.training import distributed
from fixify.training.checkpointing import RunKeeper
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
    best_of,
    gentler,
)
from fixify.training.facts import OpenedInputs, RunFacts, RunOutput, describe_model
from fixify.training.failures import Failure, machine_failure
from fixify.training.head_conversion import HeadConversion, check_conversion
from fixify.training.interrupt import RESUME_HINT, Stopped, StopRequest, stop_on_signals
from fixify.training.last_block import Preparation
from fixify.training.loop import train_epoch
from fixify.training.optimisers import hold_signs_
from fixify.training.options import FinetuneOptions, TrainOptions
from fixify.training.run_folder import add_to_run, begins_anew, claim_folder, write_recipe, write_run
from fixify.training.starting_point import defends_start, resolved_options
from fixify.training.teacher import Teacher
from fixify.training.validation import Validation, warn_of_unreadable

FAR_BELOW = 2.0
"""Points of top-1 below the start from which the first epoch is warned of."""


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a run.

    Attributes:
        best_path, last_path: The checkpoints of the best and of the last validation.
        before: Metrics of the model before training.
        after: The best validation. It is the start if none was better, and for a model that starts near the original if
            none was better by more than chance (`fixify.training.starting_point.defends_start`).
        history: Every validation after it.
        original_top1: The original's top-1 on the validation data, percent; None if it was neither given nor measured.
        reached: Whether the run met `max_drop`; None without one.
        peak_memory: Largest resident memory of this process in its life so far, bytes; 0 where it is not known. Loader
            processes and the memory of a GPU are not in it.
        start: The validation before training, after calibration, which is a candidate for the best; None if there was
            none (from scratch, if `max_drop` was met without training, and in runs of older versions).
        advice: What to try, in sentences, if the best checkpoint is the start; else None.
    """

    best_path: Path
    last_path: Path
    before: Metrics
    after: EpochRecord
    history: tuple[EpochRecord, ...]
    original_top1: float | None = None
    reached: bool | None = None
    peak_memory: int = 0
    start: EpochRecord | None = None
    advice: str | None = None

    @property
    def best_is_start(self) -> bool:
        """Whether the best checkpoint is the start."""
        return self.after is self.start


def train_model(
    model: nn.Module,
    opened: OpenedInputs,
    options: FinetuneOptions,
    output: RunOutput,
    *,
    facts: RunFacts | None = None,
    on_event: Listener | None = None,
) -> FinetuneResult:
    """Train a classifier on opened data, and keep its best and its last state.

    Args:
        model: Any classifier, images to logits; it is trained in place. A fixed head that standardises and has no
            statistics yet is calibrated first.
        opened: The images, and the reference models.
        options: How to train; see `fixify.training.starting_point.resolved_options` for those that are None.
        output: Where the run goes. The folder gets the checkpoints, state.pt, run.json, recipe.yaml, metrics.jsonl,
            summary.csv, steps.jsonl and confusions.json.
        facts: What identifies the run; None: what `opened` says.
        on_event: Called with each event.

    Raises:
        UsageError: `max_drop` without a top-1 to measure it from; images without labels and without a teacher; or a
            teacher of images with other channels.
        TrainingError: a loss is not finite, the run cannot be resumed, or the state is of another run; a loader process
            ended or hangs, or memory or file handles ran out.
        TrainingInterrupted: SIGINT, SIGTERM, SIGHUP or SIGUSR1; the state was saved.
        OutputExistsError, OutputError: the folder has a run already, another process trains in it, or it cannot be
            written.
        DataError: too many images cannot be read.
    """
    opened.check(options)
    tells = on_event if on_event is not None and distributed.is_rank_zero() else _ignore
    options = resolved_options(options, model, opened, output.folder, resume=output.resume, on_event=tells)
    with stop_on_signals() as stop:
        run = _Run(model, opened, options, output, RunFacts.of(opened) if facts is None else facts, on_event, stop)
        try:
            run.check_recorded()
            run.lock()
            run.prepare()
            return run.train()
        except Stopped:
            raise run.interruption() from None
        except (LoaderError, ResourceError, RuntimeError, MemoryError, OSError) as error:
            failure = machine_failure(error)
            if failure is None:
                raise
            raise run.failed(failure) from error
        finally:
            run.close()


class _Run:
    """The parts of a run, and the order in which they act."""

    def __init__(
        self,
        model: nn.Module,
        opened: OpenedInputs,
        options: FinetuneOptions,
        output: RunOutput,
        facts: RunFacts,
        on_event: Listener | None,
        stop: StopRequest,
    ) -> None:
        self.opened, self.options, self.output, self.facts, self.stop = opened, options, output, facts, stop
        tells = on_event is not None and distributed.is_rank_zero()
        self.on_event: Listener = stop.on_hangup(on_event) if tells and on_event is not None else _ignore
        if isinstance(options, TrainOptions) and options.converts:
            check_conversion(model, opened, options)
        self.engine = make_engine(model, opened, options)
        self.engine.loader.unreadable.on_found = warn_of_unreadable("training", self.on_event)
        self.engine.loader.unreadable.on_remark = lambda text: self.on_event(Warned(text))
        self.validation = Validation(opened, options, self.engine.device, stop, self.on_event)
        self.validation.without_logits = self.engine.loss_plan.blocked
        self.preparation = Preparation(self.engine, opened, stop, self.on_event)
        unreadable = {"train": self.engine.loader.unreadable, "val": self.validation.unreadable}
        self.conversion: HeadConversion | None = None
        if isinstance(options, TrainOptions) and options.converts:
            self.conversion = HeadConversion(self.engine, opened, options, self.preparation, self.on_event)
        self.keeper = RunKeeper(self.engine, output, facts, self.on_event, unreadable, self.conversion)
        self._lock = FolderLock(output.folder)

    def check_recorded(self) -> None:
        """Check the inputs against what the recipe recorded, if the run repeats one."""
        if self.opened.given is not None:
            recorded = self.opened.given.recorded
            recorded.check_batches(self.options)
            recorded.check_inputs(self.facts.recorded(self.options))

    def lock(self) -> None:
        """Keep other processes out of the folder until `close`."""
        distributed.on_rank_zero(self._lock.acquire)

    def prepare(self) -> None:
        """Bring the model to where training starts or resumes."""
        if self._resumes():
            self.engine.start_average()
            self.keeper.resume()
            self.validation.without_logits = self.engine.loss_plan.blocked
            self._announce(resumed=True)
            self._label_validation()
        else:
            self._start()
        self.keeper.write_logs()
        if self.opened.teacher is not None:
            self.engine.teacher = Teacher(
                self.opened.teacher,
                self.opened.preprocessing,
                device=self.engine.device,
                amp=self.options.amp,
                channels_last=self.options.channels_last,
            )

    def _resumes(self) -> bool:
        folder = self.output.folder
        if not self.output.resume:
            distributed.on_rank_zero(lambda: self._claim(force=self.output.force))
            return False
        why = distributed.on_rank_zero(lambda: begins_anew(folder))
        if why is not None:
            self.on_event(Warned(why))
            distributed.on_rank_zero(lambda: self._claim(force=True))
            return False
        return True

    def _claim(self, *, force: bool) -> None:
        claim_folder(self.output.folder, force=force)
        self._write_about()

    def _start(self) -> None:
        """Measure and calibrate the model, and write the first state."""
        keeper = self.keeper
        self._announce(resumed=False)
        self._label_validation()
        self._measure_original()
        metrics = keeper.progress.before = self.validation.measure(self.engine.model, "before")
        self.on_event(Evaluated(metrics))
        from_scratch = self.options.from_scratch
        if self.preparation.calibrate() and (not from_scratch or self.options.max_drop is not None):
            metrics = self.validation.measure(self.engine.model, "before")
            self.on_event(Evaluated(metrics, calibrated=True))
        self.engine.start_average()
        is_enough = not self.engine.awaits_conversion and keeper.is_enough(metrics.top1)
        if not from_scratch and not is_enough:
            answers = self.validation.answers()
            keeper.start_from(metrics, answers.right() if defends_start(self.engine.model, self.options) else None)
        distributed.on_rank_zero(self._write_about)  # again, with these metrics
        if is_enough:
            keeper.record(metrics, self.validation.answers(), fraction=0.0, seconds=metrics.seconds)
        elif keeper.progress.start is not None:
            keeper.write_start(keeper.progress.start, self.validation.answers())
        else:
            keeper.write_state()

    def train(self) -> FinetuneResult:
        """Train to the end, or until the accuracy is high enough."""
        keeper = self.keeper
        if self.options.last_block_epochs and not keeper.progress.history:
            self.preparation.train_last_blocks()
            metrics = self.validation.measure(self.engine.evaluated, "validation")
            keeper.record(metrics, self.validation.answers(), fraction=0.0, seconds=metrics.seconds)
        with self.engine.training():
            while keeper.progress.epoch < self.options.epochs and not keeper.has_reached_goal():
                self.on_event(EpochStarted(keeper.progress.epoch, self.options.epochs))
                try:
                    if not self._train_epoch():
                        self._validate()
                        self._compare_with_start()
                except Stopped:
                    keeper.write_state()
                    raise
        if self.engine.signs is not None:
            hold_signs_(self.engine.model)
        return self._result()

    def _train_epoch(self) -> bool:
        """Train the rest of an epoch, and convert the classifier when that is due.

        Returns:
            Whether the accuracy is high enough to stop; if not, the epoch is complete.
        """
        at = None if self.conversion is None else self.conversion.at
        while True:
            if self._conversion_is_due() and self._convert():
                return True
            progress, events = self.keeper.progress, self.on_event
            if train_epoch(self.engine, progress, self.stop, events, self._validate, self.keeper, pause_at=at):
                return True
            if not self._conversion_is_due():
                return False

    def _conversion_is_due(self) -> bool:
        """Check whether the classifier is to be converted here. At the end of an epoch its validation comes first."""
        progress = self.keeper.progress
        return (
            self.conversion is not None
            and progress.updates >= self.conversion.at
            and progress.batch < len(self.engine.loader)
            and not any(record.classifier == "converted" for record in progress.history)
        )

    def _convert(self) -> bool:
        """Convert the classifier, unless the state has the converted one already, and measure the model."""
        if self.conversion is not None and self.engine.awaits_conversion:
            self.conversion.convert(self.keeper.progress.updates)
            self.validation.without_logits = self.engine.loss_plan.blocked
            model = describe_model(self.engine.model, self.facts.architecture)
            distributed.on_rank_zero(lambda: add_to_run(self.output.folder, {"model": model}))
        return self._validate(converted=True)

    def _validate(self, *, converted: bool = False) -> bool:
        """Measure the model, and return whether the accuracy is high enough to stop."""
        started, progress = time.perf_counter(), self.keeper.progress
        metrics = self.validation.measure(self.engine.evaluated, "validation")
        self.keeper.record(
            metrics,
            self.validation.answers(),
            fraction=progress.batch / len(self.engine.loader),
            seconds=progress.seconds + time.perf_counter() - started,
            converted=converted,
        )
        return self.keeper.has_reached_goal()

    def _compare_with_start(self) -> None:
        """Warn after the first of several epochs if it is far below the start."""
        progress = self.keeper.progress
        start, now = progress.start, progress.history[-1].val_top1
        if progress.epoch == 1 < self.options.epochs and start is not None and start.val_top1 - now > FAR_BELOW:
            self.on_event(
                Warned(
                    f"After the first epoch validation top-1 is {now:.2f} %, {start.val_top1 - now:.2f} points below "
                    f"the start. The start is kept as {self.output.best_path.name} until a validation is better. "
                    f"{gentler(self.options.peak_rate, taught=self._learns_from_another())}"
                )
            )

    def _result(self) -> FinetuneResult:
        progress = self.keeper.progress
        best, before = progress.best(), progress.before
        if best is None or before is None:
            raise TrainingError(f"The state in {self.output.folder} has no epochs.")
        return FinetuneResult(
            best_path=self.output.best_path,
            last_path=self.output.last_path,
            before=before,
            after=best,
            history=tuple(progress.history),
            original_top1=self.keeper.original_top1(),
            reached=None if self.options.max_drop is None else self.keeper.has_reached_goal(),
            peak_memory=peak_bytes(),
            start=progress.start,
            advice=self._advice() if best is progress.start else None,
        )

    def _learns_from_another(self) -> bool:
        """Check that there is a teacher, and that it is not the start."""
        return self.opened.teacher is not None and not self.opened.taught_by_start

    def _advice(self) -> str:
        kept = f"{self.output.best_path.name} is the model before training."
        highest = best_of(None, self.keeper.progress.history)
        if highest is None or highest.gained is None or highest.lost is None or highest.gained <= highest.lost:
            advice = gentler(self.options.peak_rate, taught=self._learns_from_another())
            return f"No validation was better than the start: {kept} {advice}"
        return (
            f"No validation was better than the start by more than chance: {kept} The highest has "
            f"{highest.val_top1:.2f} % ({counted(highest.gained, 'image')} gained, {highest.lost:,} lost). More "
            f"validation images show smaller gains. {self.output.last_path.name} is the model after training."
        )

    def interruption(self) -> TrainingError:
        """Make the error that says where the run stopped."""
        if not self.keeper.store.has_state:
            return self.stop.interruption_before_training()
        progress = self.keeper.progress
        return self.stop.interruption(self._place(progress.epoch, progress.batch), self.output.folder)

    def _place(self, epoch: int, batch: int) -> str:
        return f"in epoch {epoch + 1} of {self.options.epochs} after {batch} of {len(self.engine.loader)} batches"

    def failed(self, failure: Failure) -> TrainingError:
        """Make the error that says what the machine did to the run, and what was saved before."""
        saved = self.keeper.saved
        if saved is None:
            return TrainingError(
                f"{failure.what}. This was before training began.",
                hint=f"{failure.hint} Start again with the same command and --resume, or with --force.".lstrip(),
            )
        progress = self.keeper.progress
        epoch, batch = saved
        done = self._place(epoch, batch) if epoch < self.options.epochs else "at its end"
        return TrainingError(
            f"{failure.what}. Training stopped {self._place(progress.epoch, progress.batch)}; the state {done} is "
            f"saved in {self.output.folder}.",
            hint=f"{failure.hint} {RESUME_HINT}".lstrip(),
        )

    def close(self) -> None:
        """Stop the loaders' processes, and let other processes into the folder."""
        try:
            self.engine.loader.close()
            self.validation.close()
        finally:
            self._lock.release()

    def _write_about(self) -> None:
        """Write run.json and recipe.yaml."""
        write_run(self.output.folder, {**self.facts.to_dict(), **self._started()}, self.options)
        given = {} if self.opened.given is None else self.opened.given.to_recipe()
        recipe = {
            "description": self._description(),
            **given,
            "recorded": self.facts.recorded(self.options).to_dict(),
        }
        write_recipe(self.output.folder, recipe, self.options.section, self.options)

    def _description(self) -> str:
        if isinstance(self.options, TrainOptions):
            return f"{self.options.model} trained from scratch on {self.facts.title}."
        return f"A finetuning run of {self.facts.title}."

    def _started(self) -> dict[str, Any]:
        """Collect what is known when the run starts and is not compared when it resumes."""
        progress, command = self.keeper.progress, self.output.command
        measured = {"before": progress.before, "start": progress.start, "original_metrics": progress.original}
        return {
            **distributed.launch_record(),
            **({} if command is None else {"command": command}),
            "device": str(self.engine.device),
            "machine": self.keeper.machine.to_dict(),
            "model": describe_model(self.engine.model, self.facts.architecture),
            **{name: metrics.to_dict() for name, metrics in measured.items() if metrics is not None},
        }

    def _announce(self, *, resumed: bool) -> None:
        parameters = [(parameter.numel(), parameter.requires_grad) for parameter in self.engine.model.parameters()]
        agreement = "; top-1 is agreement with the teacher" if self.facts.teacher_labels_val else ""
        self.on_event(
            RunStarted(
                epochs=self.options.epochs,
                first_epoch=self.keeper.progress.epoch,
                batches=len(self.engine.loader),
                train=self.opened.train.description,
                val=self.opened.val.description + agreement,
                device=str(self.engine.device),
                processes=distributed.world_size(),
                workers=self.options.resolved_workers(),
                parameters=sum(count for count, _ in parameters),
                trainable=sum(count for count, learns in parameters if learns),
                frozen=self.engine.frozen.stages,
                loss_note=self.engine.loss_plan.note,
                teacher_note=self.opened.teacher_note,
                convert_at=None if self.conversion is None else self.conversion.at,
                folder=self.output.folder,
                first_step=self.keeper.progress.updates,
                resumed=resumed,
                config={**self.facts.to_dict(), "options": self.options.recipe()},
            )
        )

    def _label_validation(self) -> None:
        if not self.opened.val.labelled and self.opened.teacher is not None:
            self.validation.label_with(self.opened.teacher)

    def _measure_original(self) -> None:
        original = self.opened.original
        if original is not None:
            self.keeper.progress.original = self.validation.measure_reference(original, "original")
            self.on_event(OriginalEvaluated(original.name, self.keeper.progress.original))


def _ignore(_event: Event) -> None:
    """Do nothing with an event."""
