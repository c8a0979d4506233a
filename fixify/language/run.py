"""Reading the folders of language models' runs, to put them side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fixify._files import write_atomic
from fixify._version import __version__
from fixify.errors import FormatError, TrainingError
from fixify.language.checkpoint import load_language, save_language
from fixify.language.corpus import END_OF_LINE, Corpus, read_corpus
from fixify.language.loop import (
    LanguageEpochEnded,
    LanguageListener,
    LanguageRecord,
    LanguageRunStarted,
    Prediction,
    Trainer,
    predict,
)
from fixify.language.model import Size, build_model, size_of
from fixify.language.options import LanguageOptions
from fixify.training.checkpointing import newest_state
from fixify.training.interrupt import Stopped, StopRequest, TrainingInterrupted, stop_on_signals
from fixify.training.run_folder import (
    METRICS_FILE,
    RECIPE_FILE,
    RUN_FILE,
    claim_folder,
    machine_facts,
    tidy,
    write_sealed,
)


@dataclass(frozen=True)
class LanguageRun:
    """What a run left.

    Attributes:
        label: A short name.
        text: What it is of.
        words: What stands for words, in a few words.
        num_layers, num_features, num_words: Of the model.
        perplexity: On the validation text, the lowest of all epochs.
        test_perplexity: On the test text, of that epoch's weights; None if the run did not come to its end.
        epochs: Done.
        size: What the model has.
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
        """Whether embedding and classifier are learned, and not shared: what the others are compared with."""
        return self.words == "learned"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "size": self.size.to_dict()}


def is_language_run(folder: Path) -> bool:
    """Whether a run's folder is that of a language model."""
    try:
        return bool(json.loads((folder / RUN_FILE).read_text()).get("section") == LanguageOptions.section)
    except (OSError, ValueError, AttributeError):
        return False


def read_language_runs(folders: Sequence[Path]) -> list[LanguageRun]:
    """Read runs.

    Raises:
        FormatError: a file of one is missing or damaged, or it has no epoch yet.
    """
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> LanguageRun:
    try:
        about = json.loads((folder / RUN_FILE).read_text())
        options = LanguageOptions.create(**about["options"])
        history = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
        size = Size(*(about["size"][name] for name in ("parameters", "fixed", "learned")))
        return LanguageRun(
            label=folder.resolve().name,
            text=about["text"],
            words=options.label,
            num_layers=options.num_layers,
            num_features=options.num_features,
            num_words=about["num_words"],
            perplexity=min(record["val_perplexity"] for record in history),
            test_perplexity=about.get("result", {}).get("test_perplexity"),
            epochs=len(history),
            size=size,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder} is not a whole run of a language model: {error}.") from error


# A whole run: text in, trained language model and logs out.


BEST_FILE, LAST_FILE = "best.safetensors", "last.safetensors"
TEXT_SHA256 = "text_sha256"
"""What a recipe records of its text."""
_VERSION = 1
DIVERGED = 100.0
"""Nats a word that no text has: that of guessing among 1e43 words."""


@dataclass(frozen=True)
class LanguageResult:
    """What came of a run.

    Attributes:
        folder: Of the run.
        best_path, last_path: Checkpoints of the epoch with the lowest validation loss, and of the last.
        best: That epoch.
        val, test: How well the best checkpoint predicts the two texts.
        size: What the model has.
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
    """Train a language model; perplexity of validation after each epoch, of the test text once, by the best weights.

    Args:
        data: See `fixify.language.read_corpus`.
        out_dir: Folder of the run: best.safetensors, last.safetensors, metrics.jsonl, run.json, recipe.yaml, state.pt.
        options: How.
        resume: Continue the run in `out_dir`, exactly.
        force: Replace the run in `out_dir`.
        command: What was typed, for the record.
        recorded: SHA-256 of the text that a recipe was written for.
        on_event: Told what happens.

    Raises:
        DataError: see `read_corpus`.
        UsageError: the options do not fit this machine.
        TrainingError: the loss is not finite; or the run cannot be resumed: there is none, or it had other options or
            another text.
        TrainingInterrupted: it was asked to stop, and can be resumed.
        OutputExistsError, OutputError: there is a run in the folder, or it cannot be written.
    """
    out = Path(out_dir)
    tell: LanguageListener = (lambda event: None) if on_event is None else on_event
    corpus = read_corpus(data, min_count=options.min_count, lowercase=options.lowercase)
    _check_text((recorded or {}).get(TEXT_SHA256), corpus)
    if not (resume or force):
        claim_folder(out, force=False)  # before vectors are computed, which can take minutes
    with stop_on_signals() as stop:
        keeper = _Keeper(out, options, corpus, tell)
        if resume:
            tidy(out)
            keeper.load()
        else:
            claim_folder(out, force=force)
            keeper.begin(data, command)
        keeper.train(stop)
    return keeper.result()


class _Keeper:
    """Trains, and keeps what a run leaves."""

    def __init__(self, out: Path, options: LanguageOptions, corpus: Corpus, on_event: LanguageListener) -> None:
        self.out, self.options, self.corpus, self.on_event = out, options, corpus, on_event
        self.trainer = Trainer(build_model(options, corpus), corpus.train, options, on_event)
        self.size = size_of(self.trainer.model, options)
        self.first = corpus.words.index(END_OF_LINE)
        self.saved_at = time.monotonic()

    def begin(self, data: str, command: str | None) -> None:
        """Write what the run is of."""
        about = {
            "fixify": __version__,
            "command": command,
            "section": self.options.section,
            "text": self.corpus.description,
            TEXT_SHA256: self.corpus.digest,
            "num_words": len(self.corpus.words),
            "size": self.size.to_dict(),
            "machine": machine_facts(self.trainer.device),
            "options": self.options.recipe(),
        }
        write_atomic(self.out / RUN_FILE, json.dumps(about, indent=2) + "\n")
        recipe = {
            "description": f"A language model of {self.corpus.description}, words: {self.options.words}.",
            "data": str(Path(data).resolve()) if Path(data).exists() else data,
            "recorded": {TEXT_SHA256: self.corpus.digest},
            self.options.section: self.options.recipe(),
        }
        header = (
            f"# Every option of the run in this folder. Written by fixify {__version__}, torch {torch.__version__}.\n"
        )
        write_atomic(self.out / RECIPE_FILE, header + yaml.safe_dump(recipe, sort_keys=False, width=120))

    def train(self, stop: StopRequest) -> None:
        """From where the run is to its end."""
        trainer, options = self.trainer, self.options
        position = trainer.position
        steps = len(trainer.steps()) if position.epoch < options.epochs else 0
        self.on_event(
            LanguageRunStarted(
                self.corpus.description, str(trainer.device), self.size.learned, options.epochs, steps, position.epoch,
                self.out,
            )
        )  # fmt: skip
        try:
            while position.epoch < options.epochs:
                trainer.epoch(stop, self.save_if_old)
                self._close_epoch()
        except Stopped:
            self.save()
            raise TrainingInterrupted(
                f"Stopped in epoch {position.epoch + 1} of {options.epochs} after {position.step} updates of it; "
                f"everything up to there is in {self.out}.",
                number=stop.number or 0,
                hint="Go on with the same command and --resume.",
            ) from None

    def _close_epoch(self) -> None:
        trainer, position = self.trainer, self.trainer.position
        found = predict(trainer.evaluated, self.corpus.val, self.first, trainer.device)
        if not found.loss < DIVERGED:
            raise TrainingError(
                f"The validation loss is {found.loss:.3g} after epoch {position.epoch + 1}.",
                hint=f"Try a lower rate: --set language.lr={self.options.lr / 3:.1g}",
            )
        record = trainer.record(found.loss)
        before = position.best()
        is_best = before is None or record.val_loss < before.val_loss
        earlier = position.history[: -self.options.patience]
        position.history.append(record)
        position.next_epoch()
        for path, wanted in ((LAST_FILE, True), (BEST_FILE, is_best)):
            if wanted:
                training = {"epoch": record.epoch, "val_loss": record.val_loss, "text": self.corpus.description}
                save_language(trainer.evaluated, self.out / path, self.options, self.corpus.words, training)
        waits = self.options.opt == "asgd" and trainer.average is None
        if waits and earlier and record.val_loss > min(each.val_loss for each in earlier):
            trainer.start_averaging()
        self.save()
        write_atomic(self.out / METRICS_FILE, "".join(json.dumps(each.to_dict()) + "\n" for each in position.history))
        self.on_event(LanguageEpochEnded(record, is_best))

    def save_if_old(self) -> None:
        """Store the state if the last one is as old as the options say."""
        minutes = self.options.save_minutes
        if minutes is not None and time.monotonic() - self.saved_at > 60 * minutes:
            self.save()

    def save(self) -> None:
        """Store the state."""
        content = {
            "version": _VERSION,
            **self.trainer.state(),
            "recipe": self.options.recipe(),
            TEXT_SHA256: self.corpus.digest,
        }
        write_sealed(self.out, content)
        self.saved_at = time.monotonic()

    def load(self) -> None:
        """Put back the newest state that is whole."""
        stored = newest_state(self.out, self.trainer.device)
        content = stored.content
        if content.get("version") != _VERSION or "hidden" not in content:
            raise TrainingError(f"{stored.path} is not the state of a language model of this version of fixify.")
        if content[TEXT_SHA256] != self.corpus.digest:
            raise TrainingError(f"The run in {self.out} was started with another text.", hint="Bring it back.")
        was, now = content["recipe"], self.options.recipe()
        if different := [f"{key} was {was.get(key)} and is {now[key]}" for key in now if was.get(key) != now[key]]:
            raise TrainingError(
                f"The run in {self.out} was started with other options: {'; '.join(different)}.",
                hint="Resume with the same ones, or choose another folder with -o.",
            )
        try:
            self.trainer.load(content)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{stored.path} does not fit: {str(error).splitlines()[0]}") from error

    def result(self) -> LanguageResult:
        """Of the run, once it is done; the best checkpoint is read again, as anybody would."""
        best_path = self.out / BEST_FILE
        model = load_language(best_path).model.to(self.trainer.device)
        val, test = (
            predict(model, text, self.first, self.trainer.device) for text in (self.corpus.val, self.corpus.test)
        )
        history = self.trainer.position.history
        best = min(history, key=lambda record: record.val_loss)
        result = LanguageResult(self.out, best_path, self.out / LAST_FILE, best, val, test, self.size, tuple(history))
        about = json.loads((self.out / RUN_FILE).read_text())
        about["result"] = {"val_perplexity": val.perplexity, "test_perplexity": test.perplexity}
        write_atomic(self.out / RUN_FILE, json.dumps(about, indent=2) + "\n")
        return result


def _check_text(was: str | None, corpus: Corpus) -> None:
    if was is not None and was != corpus.digest:
        raise TrainingError(
            f"The text is not what this recipe recorded, so it would not repeat the run (SHA-256 {was[:12]}... then, "
            f"{corpus.digest[:12]}... now).",
            hint="Bring back what was there; or drop `recorded` from the recipe to train on what is there now.",
        )
