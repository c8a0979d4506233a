"""The file that a run's state is in: sealed with its own checksum, and never without a whole one before it.

A state is what `torch.save` writes, a zip archive, and carries as the archive's comment the SHA-256 of every byte
before it. Nothing of a file whose seal does not fit is parsed. (The archive's own checksums would not do: `torch.load`
does not look at them.)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
import torchvision
import yaml
from torch import Tensor, nn

from fixify._files import atomic_path, write_atomic
from fixify._options import CheckedOptions
from fixify._version import __version__
from fixify.errors import NoClassifierError, OutputError, OutputExistsError, TrainingError
from fixify.heads import FixedClassifier
from fixify.metrics import Confusions
from fixify.models.classifiers import find_classifiers
from fixify.savings import count_bytes, count_parameters
from fixify.training import distributed
from fixify.training.events import EpochRecord
from fixify.training.options import FinetuneOptions
from fixify.training.validation import UNREADABLE_FILE

STATE_FILE, PREVIOUS_STATE_FILE = "state.pt", "state-previous.pt"

_SEAL = 64  # hexadecimal digits of a SHA-256
_NO_COMMENT, _COMMENT = (0).to_bytes(2, "little"), _SEAL.to_bytes(2, "little")
_CHUNK = 1 << 20


def write_sealed(folder: Path, content: dict[str, Any]) -> None:
    """Write the state; the one before becomes `state-previous.pt`, in the moment in which the new one is whole.

    Raises:
        OutputError: the disk is full, or the folder cannot be written; both states are as they were.
    """
    path = folder / STATE_FILE
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch's zip writer makes of any failure to write
            raise OutputError(f"Cannot write {path}: {_why(folder, content)}.", hint=_KEPT) from error
        _seal(temporary)
        if path.exists():
            path.replace(folder / PREVIOUS_STATE_FILE)


def read_sealed(path: Path, device: torch.device) -> dict[str, Any] | None:
    """What `write_sealed` wrote, tensors on `device`; None if there is no such file, or it is damaged.

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
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # sealed by somebody else: it holds more than plain values
        return None
    return content if isinstance(content, dict) else None


_KEPT = "The state before it was kept: make room, and go on with --resume."


def _why(folder: Path, content: dict[str, Any]) -> str:
    needed, free = _bytes_of(content), shutil.disk_usage(folder).free
    if free < needed:
        return f"the disk is full; the state takes {_megabytes(needed)}"
    return f"writing its {_megabytes(needed)} failed"


def _bytes_of(content: Any) -> int:
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(_bytes_of, content.values()))
    return sum(map(_bytes_of, content)) if isinstance(content, (list, tuple)) else 0


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _seal(path: Path) -> None:
    """Add the comment: its length, which are the last two bytes of a zip archive without one, and itself."""
    with open(path, "r+b") as file:
        digest = _digest(file, os.fstat(file.fileno()).st_size - len(_NO_COMMENT))
        if file.read() != _NO_COMMENT:
            raise OutputError(f"Cannot seal {path}: torch wrote a zip archive with a comment.")
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_COMMENT + digest)
        file.flush()
        os.fsync(file.fileno())  # before the state that it replaces gets another name


def _is_sealed(path: Path) -> bool:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - len(_COMMENT) - _SEAL
        return size > 0 and _COMMENT + _digest(file, size) == file.read()


def _digest(file: Any, size: int) -> bytes:
    """Of the first `size` bytes, after which the file is then."""
    found = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(_CHUNK, size))):
        found.update(chunk)
        size -= len(chunk)
    return found.hexdigest().encode()


# The thin log of steps: the loss and the head's scale, on a logarithmic axis (the paper's figure 1).


_PER_DECADE = 32


@dataclass(frozen=True)
class StepRecord:
    """One line of steps.jsonl.

    Attributes:
        step: Updates of the weights since the start of the run.
        epochs: Epochs since the start of the run.
        loss: Mean training loss of the images since the record before it.
        lr: Learning rate of this update.
        scale: The head's learned scale alpha after it; None for other heads.
    """

    step: int
    epochs: float
    loss: float
    lr: float
    scale: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_logged(step: int) -> bool:
    """Whether a step is in the log: each of the first 14, then 32 a decade, so a million steps make 164 lines.

    Depends on nothing but the step: a run that was resumed logs what one that was never stopped does.
    """
    return step == 1 or (step > 1 and _slot(step) > _slot(step - 1))


def _slot(step: int) -> int:
    return math.floor(_PER_DECADE * math.log10(step) + 1e-9)


# On what a run is trained: versions and device, which may change its numbers in the last digits.


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Versions of what computes, and the device's name; JSON-safe, nothing that identifies a person or a machine."""
    return {
        "fixify": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which is not read back
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "device": _name(device),
        "processes": distributed.world_size(),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def changed(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What a run that is resumed has different from when it was started: "torch 2.9.0 then, 2.13.0 now"."""
    return ", ".join(f"{key} {was} then, {now[key]} now" for key, was in then.items() if now.get(key) != was) or None


# What a run records about the model that it trains.


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Parameters and bytes of a model and of its classifier, JSON-safe.

    Returns:
        `architecture` (a name), `head` (the kind of its fixed head, or "learned"), `num_features` and `num_classes`
        (None if no classifier is found), `parameters`, `bytes` (of every stored tensor), `classifier_parameters`,
        `classifier_bytes`, and `savings` (see `fixify.savings.Savings`) if it is a converted model.
    """
    info = getattr(model, "fixify_info", None)
    fixed = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    layers: list[nn.Module] = [*fixed]
    head = "learned"
    num_features: int | None = None
    num_classes: int | None = None
    if fixed:
        spec = fixed[0].spec
        head, num_features, num_classes = spec.kind, spec.num_features, spec.num_classes
    else:
        try:
            sites = find_classifiers(model)
        except NoClassifierError:
            sites = []
        layers = [model.get_submodule(site.path) for site in sites]
        if sites:
            num_features, num_classes = sites[0].num_features, sites[0].num_classes
    return {
        "architecture": type(model).__name__ if info is None else info.architecture.ref,
        "head": head,
        "num_features": num_features,
        "num_classes": num_classes,
        "parameters": count_parameters(model),
        "bytes": count_bytes(model.state_dict().values()),
        "classifier_parameters": sum(count_parameters(layer) for layer in layers),
        "classifier_bytes": sum(count_bytes(layer.state_dict().values()) for layer in layers),
        **({} if info is None else {"savings": info.savings}),
    }


# recipe.yaml in the folder of a run: what repeats it.


RECORDED = ("checkpoint_sha256", "train_listing", "val_listing")
"""What a recipe records of its inputs: SHA-256 of the source checkpoint, and of the lists of images."""
IMAGES_A_STEP = "images_a_step"
"""It also records the images that all processes together had in a step: one process alone would train otherwise."""

_INPUTS = {
    "checkpoint_sha256": "The checkpoint is",
    "train_listing": "The training images are",
    "val_listing": "The validation images are",
}
_HEADER = f"""\
# Every option of the run in this folder. Written by fixify {__version__}, torch {torch.__version__},
# timm {timm.__version__}.
# To repeat it, into another folder:
#   fixify train recipe.yaml -o FOLDER
"""


def recipe_text(options: FinetuneOptions, facts: Mapping[str, Any], entries: Mapping[str, Any]) -> str:
    """The recipe of a run.

    Args:
        options: How.
        facts: What it is of.
        entries: Names and files as they were given: data, checkpoint, against, distill. Files become absolute paths:
            this is a file of this machine, unlike a checkpoint.
    """
    what = " on ".join(str(facts[key]) for key in ("checkpoint", "data") if key in facts)
    kind = "A finetuning run of" if options.section == "finetune" else f"{options.model} trained from scratch on"  # type: ignore[attr-defined]
    recipe = {
        "description": f"{kind} {what}.",
        **{key: _found(value) for key, value in entries.items() if value is not None},
        "recorded": {
            **{key: facts[key] for key in RECORDED if key in facts},
            IMAGES_A_STEP: options.batch_size * distributed.world_size(),
        },
        options.section: options.recipe(),
    }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return _HEADER + text


def check_recorded(recorded: Mapping[str, Any], facts: Mapping[str, Any], options: FinetuneOptions) -> None:
    """Refuse to repeat a run on other inputs than it had, or with other batches.

    Raises:
        TrainingError: the checkpoint or the images have changed since the recipe was written, or the processes together
            have another number of images in a step.
    """
    processes, together = distributed.world_size(), recorded.get(IMAGES_A_STEP)
    if together not in (None, options.batch_size * processes):
        fits = together % processes == 0
        raise TrainingError(
            f"The run that wrote this recipe had {together} images in a step, and this would have "
            f"{options.batch_size * processes} ({processes} x {options.batch_size}), so it would not repeat the run.",
            hint=(f"Add --set {options.section}.batch_size={together // processes}, or start" if fits else "Start")
            + f" as many processes with --nproc-per-node; or drop `recorded.{IMAGES_A_STEP}` from the recipe.",
        )
    for key in RECORDED:
        was = recorded.get(key)
        if was is not None and facts.get(key) != was:
            raise TrainingError(
                f"{_INPUTS[key]} not what this recipe recorded, so it would not repeat the run (SHA-256 {was[:12]}... "
                f"then, {str(facts.get(key))[:12]}... now).",
                hint="Bring back what was there; or drop `recorded` from the recipe to train on what is there now.",
            )


def _found(given: Any) -> str:
    path = Path(str(given)).expanduser()
    return str(path.resolve()) if path.exists() else str(given)


# What a run leaves for people: run.json (its options), recipe.yaml (the same as a recipe that repeats it),
# metrics.jsonl (the truth, one line a validation), summary.csv (timm's columns), steps.jsonl (a thin log of steps) and
# confusions.json (what the last validation got wrong).


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
        entries: See `fixify.training.run_folder.recipe_text`.

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


# The files of a run, and what its folder says about how far it came.


BEST_FILE, LAST_FILE = "best.fixed.safetensors", "last.fixed.safetensors"
_CHECKPOINTS = (BEST_FILE, LAST_FILE, "best.safetensors", "last.safetensors")
_FILES = (*_CHECKPOINTS, STATE_FILE, PREVIOUS_STATE_FILE, *LOG_FILES)


def claim_folder(out: Path, *, force: bool) -> None:
    """Make the folder, or clear what an earlier run left in it: a stale best would pass for this run's.

    Raises:
        OutputExistsError: there is a run, and `force` is not set.
        OutputError: the folder cannot be made or changed.
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


def stored_nothing(out: Path) -> bool:
    """Whether a run was begun in the folder and ended before it stored a state.

    Its options are the first that is written, its metrics come after the first state.
    """
    later = (STATE_FILE, PREVIOUS_STATE_FILE, METRICS_FILE)
    return (out / RUN_FILE).exists() and not any((out / name).exists() for name in later)


def tidy(out: Path) -> None:
    """Remove what a run that was killed while it wrote left half-written.

    Raises:
        OutputError: the folder cannot be changed.
    """
    try:
        for name in _FILES:
            for half_written in out.glob(f".{name}.*.tmp"):
                half_written.unlink()
    except OSError as error:
        raise OutputError(f"Cannot use the folder {out}: {error.strerror}.") from error
