"""What a run leaves for people: run.json (its options), metrics.jsonl (the truth, one line a validation) and
summary.csv (timm's columns)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixify import __version__
from fixify._io import write_atomic
from fixify.errors import TrainingError
from fixify.training.events import EpochRecord
from fixify.training.options import FinetuneOptions

RUN_FILE, METRICS_FILE, SUMMARY_FILE = "run.json", "metrics.jsonl", "summary.csv"
LOG_FILES = (RUN_FILE, METRICS_FILE, SUMMARY_FILE)


def write_logs(folder: Path, history: Sequence[EpochRecord]) -> None:
    """Write both files anew from the whole history: after a crash and a resume no epoch is missing or twice.

    Raises:
        OutputError: they cannot be written.
    """
    lines = "".join(json.dumps(record.to_dict()) + "\n" for record in history)
    write_atomic(folder / METRICS_FILE, lines)
    write_atomic(folder / SUMMARY_FILE, _summary(history))


def write_run(folder: Path, options: FinetuneOptions, facts: dict[str, Any]) -> None:
    """Write what the run is of and how it is done."""
    content = {"fixify": __version__, **facts, "options": options.recipe()}
    write_atomic(folder / RUN_FILE, json.dumps(content, indent=2) + "\n")


def stored_options(folder: Path) -> FinetuneOptions:
    """The options that the run in `folder` was started with.

    Raises:
        TrainingError: there is no run.
    """
    path = folder / RUN_FILE
    try:
        stored = json.loads(path.read_text())["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"There is no run to resume in {folder}: {RUN_FILE} is missing or damaged.") from error
    return FinetuneOptions.create(**stored)


def _summary(history: Sequence[EpochRecord]) -> str:
    """The columns of `timm.utils.update_summary` as timm's train script calls it; an epoch's last validation."""
    last_of_epoch = {record.epoch: record for record in history}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"])
    for record in last_of_epoch.values():
        writer.writerow([record.epoch, record.train_loss, record.val_loss, record.val_top1, record.val_top5, record.lr])
    return text.getvalue()
