"""What a run leaves for people: run.json (its options), recipe.yaml (the same as a recipe that repeats it),
metrics.jsonl (the truth, one line a validation) and summary.csv (timm's columns)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from fixify import __version__
from fixify._io import write_atomic
from fixify.errors import TrainingError
from fixify.training.events import EpochRecord
from fixify.training.options import FinetuneOptions

RUN_FILE, RECIPE_FILE, METRICS_FILE, SUMMARY_FILE = "run.json", "recipe.yaml", "metrics.jsonl", "summary.csv"
LOG_FILES = (RUN_FILE, RECIPE_FILE, METRICS_FILE, SUMMARY_FILE)

_RECIPE_HEADER = f"""\
# Every option of the run in this folder. Written by fixify {__version__}, torch {torch.__version__},
# timm {timm.__version__}. To repeat it:
#   fixify finetune SLIM --data DATA --recipe {RECIPE_FILE}
"""


def write_logs(folder: Path, history: Sequence[EpochRecord]) -> None:
    """Write both files anew from the whole history: after a crash and a resume no epoch is missing or twice.

    Raises:
        OutputError: they cannot be written.
    """
    lines = "".join(json.dumps(record.to_dict()) + "\n" for record in history)
    write_atomic(folder / METRICS_FILE, lines)
    write_atomic(folder / SUMMARY_FILE, _summary(history))


def write_run(folder: Path, options: FinetuneOptions, facts: dict[str, Any]) -> None:
    """Write what the run is of and how it is done.

    Raises:
        OutputError: it cannot be written.
    """
    content = {"fixify": __version__, **facts, "options": options.recipe()}
    write_atomic(folder / RUN_FILE, json.dumps(content, indent=2) + "\n")
    what = " on ".join(str(facts[key]) for key in ("checkpoint", "data") if key in facts)
    recipe = {"description": f"A finetuning run of {what}.", "finetune": options.recipe()}
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    write_atomic(folder / RECIPE_FILE, _RECIPE_HEADER + text)


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
