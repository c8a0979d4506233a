"""The folder of a run: claim it, write its state, and write the files that people and other programs read.

A run leaves its checkpoints; state.pt and state-previous.pt, from which it resumes; run.json, what it is and its
options; recipe.yaml, the same as a recipe that repeats it; metrics.jsonl, one line per validation; summary.csv, timm's
columns of the same; steps.jsonl, a thin log of steps; and confusions.json, the errors of the last validation.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import timm
import torch
import yaml
from torch import Tensor

from fixify._files import atomic_path, write_atomic
from fixify._leftovers import leftovers, remove
from fixify._options import CheckedOptions
from fixify._values import Count, Measured, Number, finite_or_none
from fixify._version import __version__
from fixify.errors import OutputError, OutputExistsError, TrainingError
from fixify.metrics import Confusions
from fixify.training.events import EpochRecord
from fixify.training.run_records import StartedRun, read_record, read_run_file

BEST_FILE, LAST_FILE = "best.fixed.safetensors", "last.fixed.safetensors"
LEARNED_BEST_FILE, LEARNED_LAST_FILE = "best.safetensors", "last.safetensors"
STATE_FILE, PREVIOUS_STATE_FILE = "state.pt", "state-previous.pt"
RUN_FILE, RECIPE_FILE, METRICS_FILE, SUMMARY_FILE = "run.json", "recipe.yaml", "metrics.jsonl", "summary.csv"
STEPS_FILE, CONFUSIONS_FILE, UNREADABLE_FILE = "steps.jsonl", "confusions.json", "unreadable.txt"

_CHECKPOINTS = (BEST_FILE, LAST_FILE, LEARNED_BEST_FILE, LEARNED_LAST_FILE)
_LOGS = (RUN_FILE, RECIPE_FILE, METRICS_FILE, SUMMARY_FILE, STEPS_FILE, CONFUSIONS_FILE, UNREADABLE_FILE)
_FILES = (*_CHECKPOINTS, STATE_FILE, PREVIOUS_STATE_FILE, *_LOGS)

Options = TypeVar("Options", bound=CheckedOptions)


# The folder itself.


def claim_folder(out: Path, *, force: bool) -> None:
    """Create the folder, or remove what an earlier run left in it, so that none of it is taken for this run's.

    Raises:
        OutputExistsError: there is a run, and `force` is not set.
        OutputError: the folder cannot be created or changed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        present = [out / name for name in _FILES if (out / name).exists()]
        if present and not force:
            raise OutputExistsError(
                f"There is a run in {out} already ({present[0].name}).",
                hint="Go on with --resume, choose another folder with -o, or replace it with --force.",
            )
        for path in present:
            path.unlink()
        tidy(out)
    except OSError as error:
        raise OutputError(f"Cannot use the folder {out}: {error.strerror}.") from error


def tidy(out: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote.

    Raises:
        OutputError: the folder cannot be changed.
    """
    for name in _FILES:
        remove(leftovers(out / name))


def begins_anew(out: Path) -> str | None:
    """Return why resuming a folder means to start from the beginning, as a sentence; None if there is a run to resume.

    A run that was killed early left nothing, or what it writes before the first state. run.json is its first file;
    metrics.jsonl comes after the first state.
    """
    if (out / RUN_FILE).exists():
        if any((out / name).exists() for name in (STATE_FILE, PREVIOUS_STATE_FILE, METRICS_FILE)):
            return None
        return f"The run in {out} ended before it stored a state. It starts again."
    if any((out / name).exists() for name in _FILES):
        return None
    return f"There is no run in {out} yet. It starts from the beginning."


# The state: a zip archive that `torch.save` writes. Its comment holds the SHA-256 of all bytes before the comment, and
# a file whose digest does not match is never parsed. (`torch.load` does not verify the archive's own checksums.)

_DIGEST_SIZE = 64  # hexadecimal digits of a SHA-256
_NO_COMMENT, _COMMENT = (0).to_bytes(2, "little"), _DIGEST_SIZE.to_bytes(2, "little")
_CHUNK = 1 << 20
_ZIP_WRITER = ("PytorchStreamWriter", "inline_container")  # in its messages
_STATE_KEPT = "The previous state was kept. Free some space, then go on with --resume."


def write_sealed(folder: Path, content: dict[str, Any]) -> None:
    """Write the state; once the new file is complete, the one before it becomes `state-previous.pt`.

    Raises:
        OutputError: the disk is full, or the folder cannot be written; both states are unchanged.
    """
    path = folder / STATE_FILE
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's zip writer raises this for every failure to write
            if not any(word in str(error) for word in _ZIP_WRITER):
                raise
            raise OutputError(f"Cannot write {path}: {_failure(folder, content)}.", hint=_STATE_KEPT) from error
        _seal(temporary)
        if path.exists():
            path.replace(folder / PREVIOUS_STATE_FILE)


def read_sealed(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Read what `write_sealed` wrote, tensors on `device`; None if the file is missing or damaged.

    Raises:
        TrainingError: the file cannot be read.
    """
    try:
        if not _is_sealed(path):
            return None
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrainingError(f"Cannot read {path}: {error.strerror}.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # another program's file: more than plain values
        return None
    return content if isinstance(content, dict) else None


def _failure(folder: Path, content: dict[str, Any]) -> str:
    needed, free = _num_bytes(content), shutil.disk_usage(folder).free
    size = f"{needed / 1e6:,.1f} MB"
    return f"the disk is full; the state takes {size}" if free < needed else f"writing its {size} failed"


def _num_bytes(content: Any) -> int:
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(_num_bytes, content.values()))
    return sum(map(_num_bytes, content)) if isinstance(content, (list, tuple)) else 0


def _seal(path: Path) -> None:
    """Append the comment. A zip archive without one ends with its length, two zero bytes."""
    with open(path, "r+b") as file:
        digest = _digest(file, os.fstat(file.fileno()).st_size - len(_NO_COMMENT))
        if file.read() != _NO_COMMENT:
            raise OutputError(f"Cannot seal {path}: torch wrote a zip archive with a comment.")
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_COMMENT + digest)
        file.flush()
        os.fsync(file.fileno())  # before the previous state is renamed


def _is_sealed(path: Path) -> bool:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - len(_COMMENT) - _DIGEST_SIZE
        return size > 0 and _COMMENT + _digest(file, size) == file.read()


def _digest(file: Any, size: int) -> bytes:
    """Hash the first `size` bytes; the file is positioned after them."""
    found = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(_CHUNK, size))):
        found.update(chunk)
        size -= len(chunk)
    return found.hexdigest().encode()


# run.json and recipe.yaml: what the run is, for people, `fixify report`, and repeating it.

_RECIPE_HEADER = f"""\
# Every option of the run in this folder. Written by fixify {__version__}, torch {torch.__version__},
# timm {timm.__version__}.
# To repeat it, into another folder:
#   fixify train recipe.yaml -o FOLDER
"""


def write_run(folder: Path, about: Mapping[str, Any], options: CheckedOptions) -> None:
    """Write run.json.

    Args:
        folder: Folder of the run.
        about: What the run is and what was known when it started, JSON-safe.
        options: The options of the run.

    Raises:
        OutputError: it cannot be written.
    """
    content = {"fixify": __version__, **about, "options": options.recipe()}
    write_atomic(folder / RUN_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def add_to_run(folder: Path, more: Mapping[str, Any]) -> None:
    """Add entries to run.json.

    Raises:
        FormatError: it is damaged.
        OutputError: it cannot be written.
    """
    content = {**read_record(folder / RUN_FILE, dict[str, Any], hint=None), **more}
    write_atomic(folder / RUN_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_recipe(folder: Path, recipe: Mapping[str, Any], section: str, options: CheckedOptions) -> None:
    """Write recipe.yaml.

    Args:
        folder: Folder of the run.
        recipe: What the recipe says besides options: description, inputs, recorded.
        section: Name of the section of the options.
        options: The options of the run.

    Raises:
        OutputError: it cannot be written.
    """
    values = options.recipe()
    # None puts lists on one line. Without any list, it would put the whole section on one line.
    style = None if any(isinstance(value, (list, dict)) for value in values.values()) else False
    text = yaml.safe_dump(
        {**recipe, section: values},
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=style,
        width=120,
    )
    write_atomic(folder / RECIPE_FILE, _RECIPE_HEADER + text)


def stored_options(folder: Path, kind: type[Options]) -> Options | None:
    """Read the options that the run in a folder was started with.

    Args:
        folder: Folder of the run.
        kind: The class of the options.

    Returns:
        The options; None if the folder has no run yet.

    Raises:
        TrainingError: run.json is missing beside other files of a run.
        FormatError: run.json is damaged.
        UsageError: this version does not know the options.
    """
    if not (folder / RUN_FILE).exists():
        if begins_anew(folder) is not None:
            return None
        raise TrainingError(
            f"The run in {folder} cannot be resumed: {RUN_FILE} is missing.",
            hint="Choose another folder with -o, or replace the run with --force.",
        )
    return kind.create(**read_run_file(folder, StartedRun).options)


# The logs. Each is written anew from the whole history, so that no line is missing or doubled after a crash.


class LogRecord(Protocol):
    """A record that becomes one line of a .jsonl file."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record, JSON-safe."""
        ...


@dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl; its steps are evenly spaced on a logarithmic axis, as in the paper's figure 1.

    Attributes:
        step: Updates since the start of the run.
        epochs: Epochs since the start of the run.
        loss: Mean training loss since the previous record.
        lr: Learning rate of this update.
        scale: The head's learned scale alpha after it; None for other heads.
    """

    step: Count
    epochs: Measured
    loss: Measured
    lr: Measured
    scale: Number | None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a line of steps.jsonl holds it; a number that is not finite becomes None."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}


_PER_DECADE = 32


def is_logged(step: int) -> bool:
    """Check whether steps.jsonl has a step: each of the first 14, then 32 per decade (164 of a million).

    The answer depends on the step alone, so a resumed run logs the same steps as one that never stopped.

    >>> [step for step in range(30) if is_logged(step)][-4:]
    [23, 24, 26, 28]
    """
    return step == 1 or (step > 1 and _slot(step) > _slot(step - 1))


def _slot(step: int) -> int:
    return math.floor(_PER_DECADE * math.log10(step) + 1e-9)


def write_lines(path: Path, records: Iterable[LogRecord]) -> None:
    """Write records as JSON, one per line.

    Raises:
        OutputError: it cannot be written.
    """
    write_atomic(path, "".join(json.dumps(record.to_dict(), allow_nan=False) + "\n" for record in records))


def write_logs(folder: Path, history: Sequence[EpochRecord], steps: Sequence[StepRecord]) -> None:
    """Write metrics.jsonl, summary.csv and steps.jsonl.

    Raises:
        OutputError: they cannot be written.
    """
    write_lines(folder / METRICS_FILE, history)
    write_atomic(folder / SUMMARY_FILE, _summary(history))
    write_lines(folder / STEPS_FILE, steps)


def _summary(history: Sequence[EpochRecord]) -> str:
    """Format the columns of `timm.utils.update_summary` as timm's train script calls it: one row per epoch."""
    last_of_epoch = {record.epoch: record for record in history}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"])
    for record in last_of_epoch.values():
        writer.writerow([record.epoch, record.train_loss, record.val_loss, record.val_top1, record.val_top5, record.lr])
    return text.getvalue()


def write_unreadable(folder: Path, messages: Mapping[str, Sequence[str]]) -> None:
    """Write unreadable.txt: what is wrong with which images of each split, one per line.

    Raises:
        OutputError: it cannot be written.
    """
    lines = "".join(f"{split}: {message}\n" for split, found in messages.items() for message in found)
    write_atomic(folder / UNREADABLE_FILE, lines)


def write_confusions(folder: Path, step: int, found: Confusions) -> None:
    """Write confusions.json: the errors of the validation after `step` updates; classes are indices into run.json's.

    Raises:
        OutputError: it cannot be written.
    """
    write_atomic(folder / CONFUSIONS_FILE, json.dumps({"step": step, **found.to_dict()}, allow_nan=False) + "\n")
