"""What a run leaves for people: run.json (its options), recipe.yaml (the same as a recipe that repeats it),
metrics.jsonl (the truth, one line a validation), summary.csv (timm's columns), steps.jsonl (a thin log of steps) and
confusions.json (what the last validation got wrong)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fixify import __version__
from fixify._io import write_atomic
from fixify.confusions import Confusions
from fixify.errors import TrainingError
from fixify.training.events import EpochRecord
from fixify.training.options import FinetuneOptions
from fixify.training.recipe_file import recipe_text
from fixify.training.steps import StepRecord
from fixify.training.unreadable import UNREADABLE_FILE
from fixify.validation import CheckedOptions

RUN_FILE, RECIPE_FILE, METRICS_FILE, SUMMARY_FILE = "run.json", "recipe.yaml", "metrics.jsonl", "summary.csv"
STEPS_FILE, CONFUSIONS_FILE = "steps.jsonl", "confusions.json"
LOG_FILES = (RUN_FILE, RECIPE_FILE, METRICS_FILE, SUMMARY_FILE, STEPS_FILE, CONFUSIONS_FILE, UNREADABLE_FILE)

Options = TypeVar("Options", bound=CheckedOptions)


def write_logs(folder: Path, history: Sequence[EpochRecord], steps: Sequence[StepRecord]) -> None:
    """Write the logs anew from the whole history: after a crash and a resume nothing is missing or twice.

    Raises:
        OutputError: they cannot be written.
    """
    write_atomic(folder / METRICS_FILE, _lines(history))
    write_atomic(folder / SUMMARY_FILE, _summary(history))
    write_atomic(folder / STEPS_FILE, _lines(steps))


def write_unreadable(folder: Path, messages: Mapping[str, Sequence[str]]) -> None:
    """Write what is wrong with which images of each split, one a line.

    Raises:
        OutputError: it cannot be written.
    """
    lines = "".join(f"{split}: {message}\n" for split, found in messages.items() for message in found)
    write_atomic(folder / UNREADABLE_FILE, lines)


def write_confusions(folder: Path, step: int, found: Confusions) -> None:
    """Write what the validation after so many updates got wrong; the classes are those of run.json, by number.

    Raises:
        OutputError: it cannot be written.
    """
    write_atomic(folder / CONFUSIONS_FILE, json.dumps({"step": step, **found.to_dict()}) + "\n")


def write_run(
    folder: Path,
    options: FinetuneOptions,
    facts: dict[str, Any],
    started: dict[str, Any],
    entries: Mapping[str, Any],
) -> None:
    """Write what the run is of and how it is done.

    Args:
        folder: The run's folder.
        options: How.
        facts: What the run is of; compared when it is resumed.
        started: What else was known when it started, and is not compared: the command, the model, metrics before.
        entries: See `fixify.training.recipe_file.recipe_text`.

    Raises:
        OutputError: it cannot be written.
    """
    content = {"fixify": __version__, **facts, **started, "options": options.recipe()}
    write_atomic(folder / RUN_FILE, json.dumps(content, indent=2) + "\n")
    write_atomic(folder / RECIPE_FILE, recipe_text(options, facts, entries))


def stored_options(folder: Path, kind: type[Options]) -> Options:
    """The options that the run in `folder` was started with.

    Raises:
        TrainingError: there is no run.
    """
    path = folder / RUN_FILE
    try:
        stored = json.loads(path.read_text())["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"There is no run to resume in {folder}: {RUN_FILE} is missing or damaged.") from error
    return kind.create(**stored)


def _lines(records: Sequence[EpochRecord] | Sequence[StepRecord]) -> str:
    return "".join(json.dumps(record.to_dict()) + "\n" for record in records)


def _summary(history: Sequence[EpochRecord]) -> str:
    """The columns of `timm.utils.update_summary` as timm's train script calls it; an epoch's last validation."""
    last_of_epoch = {record.epoch: record for record in history}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"])
    for record in last_of_epoch.values():
        writer.writerow([record.epoch, record.train_loss, record.val_loss, record.val_top1, record.val_top5, record.lr])
    return text.getvalue()
