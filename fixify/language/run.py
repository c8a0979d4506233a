"""Train a language model from a text to a checkpoint and logs, and read the folders of such runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fixify._leftovers import FolderLock
from fixify._values import Count, Text
from fixify.errors import FormatError, TrainingError, UsageError
from fixify.language.checkpoint import load_language, save_language
from fixify.language.corpus import END_OF_LINE, Corpus, read_corpus
from fixify.language.loop import (
    LanguageEpochEnded,
    LanguageListener,
    LanguageRecord,
    LanguageRunStarted,
    Prediction,
    Trainer,
    lower_rate_hint,
    predict,
)
from fixify.language.model import Size, build_model, size_of
from fixify.language.options import LanguageOptions
from fixify.training.checkpointing import StateStore
from fixify.training.events import Warned
from fixify.training.facts import Recorded, absolute_if_found, this_machine
from fixify.training.failures import machine_failure
from fixify.training.interrupt import RESUME_HINT, Stopped, StopRequest, stop_on_signals
from fixify.training.run_folder import (
    LEARNED_BEST_FILE as BEST_FILE,
)
from fixify.training.run_folder import (
    LEARNED_LAST_FILE as LAST_FILE,
)
from fixify.training.run_folder import (
    METRICS_FILE,
    RUN_FILE,
    add_to_run,
    begins_anew,
    claim_folder,
    write_lines,
    write_recipe,
    write_run,
)
from fixify.training.run_records import StartedRun, read_record, read_records, read_run_file

DIVERGED = 100.0
"""Validation loss above which a run has diverged, nats per word: that of guessing among 1e43 words."""
_VERSION = 1


@dataclass(frozen=True)
class LanguageResult:
    """The result of a run.

    Attributes:
        folder: Folder of the run.
        best_path, last_path: Checkpoints of the epoch with the lowest validation loss, and of the last epoch.
        best: The epoch with the lowest validation loss.
        val, test: How well the best checkpoint predicts the validation and the test text.
        size: Parameters of the model.
        history: Every epoch.
    """

    folder: Path
    best_path: Path
    last_path: Path
    best: LanguageRecord
    val: Prediction
    test: Prediction
    size: Size
    history: tuple[LanguageRecord, ...]


def run_language(
    data: str,
    out_dir: Path | str,
    options: LanguageOptions,
    *,
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    on_event: LanguageListener | None = None,
) -> LanguageResult:
    """Train a language model; measure it on the validation text per epoch, and the best one on the test text.

    Args:
        data: See `fixify.language.read_corpus`.
        out_dir: Folder of the run; it gets best.safetensors, last.safetensors, metrics.jsonl, run.json, recipe.yaml and
            state.pt.
        options: How to train.
        resume: Continue the run in `out_dir`. The final weights are those of a run that was never stopped.
        force: Replace the run in `out_dir`.
        command: What was typed to start the run; recorded.
        recorded: What a recipe recorded of its text (`fixify.training.facts.Recorded`); it must be the same.
        on_event: Called with each event.

    Raises:
        DataError: see `read_corpus`.
        UsageError: the options do not fit this machine.
        TrainingError: the loss is not finite; there is nothing to resume; or the run has other options or another text.
        TrainingInterrupted: SIGINT, SIGTERM, SIGHUP or SIGUSR1; the state was saved.
        OutputExistsError, OutputError: the folder has a run already, another process trains in it, or it cannot be
            written.
    """
    out = Path(out_dir)
    corpus = read_corpus(data, min_count=options.min_count, lowercase=options.lowercase)
    Recorded.from_dict(recorded).check_inputs(Recorded(text_sha256=corpus.digest))
    tell = _ignore if on_event is None else on_event
    lock = FolderLock(out)
    lock.acquire()
    try:
        why = begins_anew(out) if resume else None
        if why is not None:
            tell(Warned(why))
            resume, force = False, True
        if not (resume or force):
            claim_folder(out, force=False)  # before computing word vectors, which can take minutes
        with stop_on_signals() as stop:
            run = _LanguageRun(out, options, corpus, stop.on_hangup(tell))
            if resume:
                run.resume()
            else:
                claim_folder(out, force=force)
                run.write_about(data, command)
            run.train(stop)
        return run.result()
    except (RuntimeError, MemoryError, OSError) as error:
        failure = machine_failure(error)
        if failure is None:
            raise
        hint = f"{failure.hint} The last saved state is kept. {RESUME_HINT}"
        raise TrainingError(f"{failure.what} while training in {out}.", hint=hint) from error
    finally:
        lock.release()


class _LanguageRun:
    """The parts of a run, and what it writes."""

    def __init__(self, out: Path, options: LanguageOptions, corpus: Corpus, on_event: LanguageListener) -> None:
        self.out, self.options, self.corpus, self.on_event = out, options, corpus, on_event
        self.trainer = Trainer(build_model(options, corpus), corpus.train, options, on_event)
        self.size = size_of(self.trainer.model, options)
        self.first = corpus.words.index(END_OF_LINE)
        self.recorded = Recorded(text_sha256=corpus.digest)
        self.store = StateStore(out, options.save_minutes, lambda text: on_event(Warned(text)))

    def write_about(self, data: str, command: str | None) -> None:
        """Write run.json and recipe.yaml."""
        about = {
            "command": command,
            "section": self.options.section,
            "text": self.corpus.description,
            **self.recorded.to_dict(),
            "num_words": len(self.corpus.words),
            "size": self.size.to_dict(),
            "machine": this_machine(self.trainer.device).to_dict(),
        }
        write_run(self.out, about, self.options)
        recipe = {
            "description": f"A language model of {self.corpus.description}, words: {self.options.words}.",
            "data": absolute_if_found(data),
            "recorded": self.recorded.to_dict(),
        }
        write_recipe(self.out, recipe, self.options.section, self.options)

    def train(self, stop: StopRequest) -> None:
        """Train to the end of the last epoch.

        Raises:
            TrainingInterrupted: a signal asked to stop; the state was saved.
        """
        trainer, options, position = self.trainer, self.options, self.trainer.position
        self.on_event(
            LanguageRunStarted(
                text=self.corpus.description,
                device=str(trainer.device),
                learned=self.size.learned,
                epochs=options.epochs,
                steps=len(trainer.sequences()) if position.epoch < options.epochs else 0,
                first_epoch=position.epoch,
                folder=self.out,
            )
        )
        try:
            while position.epoch < options.epochs:
                trainer.train_epoch(stop, self._save_if_due)
                self._end_epoch()
        except Stopped:
            self._save()
            where = f"in epoch {position.epoch + 1} of {options.epochs} after {position.step} updates"
            raise stop.interruption(where, self.out) from None

    def _end_epoch(self) -> None:
        """Validate, save the checkpoints, the state and metrics.jsonl, and decide whether to start averaging."""
        trainer, position = self.trainer, self.trainer.position
        found = predict(trainer.evaluated, self.corpus.val, self.first, trainer.device)
        if not found.loss < DIVERGED:
            raise TrainingError(
                f"The validation loss is {found.loss:.3g} after epoch {position.epoch + 1}.",
                hint=lower_rate_hint(self.options),
            )
        record = trainer.record(found.loss)
        before = position.best()
        is_best = before is None or record.val_loss < before.val_loss
        earlier = position.history[: -self.options.patience]
        position.history.append(record)
        position.next_epoch()
        for name in (LAST_FILE, BEST_FILE) if is_best else (LAST_FILE,):
            training = {"epoch": record.epoch, "val_loss": record.val_loss, "text": self.corpus.description}
            save_language(trainer.evaluated, self.out / name, self.options, self.corpus.words, training)
        may_average = self.options.opt == "asgd" and trainer.average is None
        if may_average and earlier and record.val_loss > min(each.val_loss for each in earlier):
            trainer.start_averaging()
        self._save()
        write_lines(self.out / METRICS_FILE, position.history)
        self.on_event(LanguageEpochEnded(record, is_best))

    def _save_if_due(self) -> None:
        if self.store.is_due():
            self._save()

    def _save(self) -> None:
        self.store.write(
            {
                "version": _VERSION,
                **self.trainer.state(),
                "recipe": self.options.recipe(),
                **self.recorded.to_dict(),
            }
        )

    def resume(self) -> None:
        """Restore the newest state of the folder.

        Raises:
            TrainingError: there is none, or it does not belong to this run.
        """
        stored = self.store.read(self.trainer.device)
        stored.check_kind(_VERSION, "hidden")
        stored.check_entries(recipe=dict, position=dict)
        if Recorded.from_dict(stored.content) != self.recorded:
            raise TrainingError(
                f"The run in {self.out} was started with another text.", hint="Restore the original text."
            )
        stored.check_same("options", stored.content["recipe"], self.options.recipe())
        stored.load(self.trainer.load)
        self.store.resume_from(stored)

    def result(self) -> LanguageResult:
        """Evaluate the best checkpoint as its file has it, and add the result to run.json."""
        best_path, device = self.out / BEST_FILE, self.trainer.device
        model = load_language(best_path).model.to(device)
        val, test = (predict(model, text, self.first, device) for text in (self.corpus.val, self.corpus.test))
        add_to_run(self.out, {"result": {"val_perplexity": val.perplexity, "test_perplexity": test.perplexity}})
        history = self.trainer.position.history
        best = min(history, key=lambda record: record.val_loss)
        return LanguageResult(self.out, best_path, self.out / LAST_FILE, best, val, test, self.size, tuple(history))


def _ignore(_event: object) -> None:
    """Do nothing with an event."""


# Reading the folders of runs, to compare them.


@dataclass(frozen=True)
class LanguageRun:
    """What a run left in its folder.

    Attributes:
        label: A short name.
        text: Description of the text.
        words: The kind of word vectors, for a person; see `LanguageOptions.label`.
        num_layers, num_features, num_words: Sizes of the model.
        perplexity: On the validation text, the lowest of all epochs.
        test_perplexity: On the test text, with the weights of that epoch; None if the run did not finish.
        epochs: Epochs that are done.
        size: Parameters of the model.
    """

    label: str
    text: str
    words: str
    num_layers: int
    num_features: int
    num_words: int
    perplexity: float
    test_perplexity: float | None
    epochs: int
    size: Size

    @property
    def is_learned(self) -> bool:
        """Whether embedding and classifier are learned and not tied; the others are compared with it."""
        return self.words == "learned"

    def to_dict(self) -> dict[str, Any]:
        """Return the values, JSON-safe."""
        return {**asdict(self), "size": self.size.to_dict()}


_Perplexity = Annotated[float, Field(gt=0, le=1e50, allow_inf_nan=False)]
_STRICT = ConfigDict(strict=True, frozen=True)


class _StoredSize(BaseModel):
    model_config = _STRICT

    parameters: Annotated[Count, Field(ge=1)]
    fixed: Count
    learned: Count


class _StoredResult(BaseModel):
    model_config = _STRICT

    test_perplexity: _Perplexity | None = None


class _StartedLanguageRun(StartedRun):
    """What reports take from run.json."""

    text: Text
    num_words: Count
    size: _StoredSize
    result: _StoredResult = _StoredResult()


class _EpochLine(BaseModel):
    """What reports take from a line of metrics.jsonl."""

    model_config = _STRICT

    val_perplexity: _Perplexity


def is_language_run(folder: Path) -> bool:
    """Check whether a folder is that of a language model's run."""
    try:
        return read_record(folder / RUN_FILE, dict[str, Any]).get("section") == LanguageOptions.section
    except FormatError:
        return False


def read_language_runs(folders: Sequence[Path]) -> list[LanguageRun]:
    """Read the folders of runs.

    Raises:
        FormatError: a file is missing or damaged, or a run has no epoch yet.
    """
    return [_read_run(folder) for folder in folders]


def _read_run(folder: Path) -> LanguageRun:
    about = read_run_file(folder, _StartedLanguageRun)
    history = read_records(folder / METRICS_FILE, _EpochLine)
    if not history:
        raise FormatError(f"The run in {folder} has no complete epoch yet.", hint="Resume it, or leave it out.")
    try:
        options = LanguageOptions.create(**about.options)
    except UsageError as error:
        raise FormatError(f"The run in {folder} is damaged: {RUN_FILE}: options: {error.message}") from error
    return LanguageRun(
        label=folder.resolve().name,
        text=about.text,
        words=options.label,
        num_layers=options.num_layers,
        num_features=options.num_features,
        num_words=about.num_words,
        perplexity=min(record.val_perplexity for record in history),
        test_perplexity=about.result.test_perplexity,
        epochs=len(history),
        size=Size(about.size.parameters, about.size.fixed, about.size.learned),
    )
