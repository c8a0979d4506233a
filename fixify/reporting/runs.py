"""Read the folders of runs, as `fixify finetune` and `fixify train` leave them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fixify.checkpoints.files import holds_one_checkpoint
from fixify.errors import FormatError, UsageError
from fixify.metrics import Confusions, Metrics
from fixify.training.events import EpochRecord
from fixify.training.run_folder import CONFUSIONS_FILE, METRICS_FILE, RUN_FILE, STEPS_FILE, StepRecord

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Run:
    """What a run left in its folder.

    Attributes:
        folder: The folder.
        label: A short name, different from those of the other runs.
        facts: Everything in run.json: data, class_names, options; in newer runs also command and model.
        history: Every validation.
        steps: The logged steps.
        confusions: The mistakes of the last validation; None if they were not recorded.
        before: Metrics of the model before training, if measured.
        original: Metrics of the original, if measured.
    """

    folder: Path
    label: str
    facts: dict[str, Any]
    history: tuple[EpochRecord, ...]
    steps: tuple[StepRecord, ...]
    confusions: Confusions | None
    before: Metrics | None
    original: Metrics | None

    @property
    def options(self) -> dict[str, Any]:
        """The options that it was trained with."""
        return dict(self.facts["options"])

    @property
    def model(self) -> dict[str, Any]:
        """Facts of the model, see `fixify.training.run_folder`; empty in an older run."""
        return dict(self.facts.get("model") or {})

    @property
    def head(self) -> str:
        """The kind of its fixed head, or "learned"; an older run with a scale is "fixed"."""
        scaled = any(record.scale is not None for record in self.history)
        return str(self.model.get("head") or ("fixed" if scaled else "learned"))

    @property
    def is_learned(self) -> bool:
        """Whether the classifier is learned."""
        return self.head == "learned"

    @property
    def best(self) -> EpochRecord | None:
        """The validation with the highest top-1; of equal ones, that with the lowest loss."""
        return max(self.history, key=lambda record: (record.val_top1, -record.val_loss), default=None)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order."""
        return [str(name) for name in self.facts.get("class_names") or ()]

    @property
    def original_top1(self) -> float | None:
        """Top-1 of the original, percent; None if it was neither measured nor given."""
        return self.options.get("original_top1") if self.original is None else self.original.top1


def runs_in(folder: Path) -> list[Path]:
    """List the runs at a path: the folder itself, or its subfolders, sorted; none if the path is a checkpoint."""
    if not folder.is_dir():
        return []
    if _is_run(folder):
        return [folder]
    if holds_one_checkpoint(folder):
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))


def runs_among(names: Sequence[str]) -> list[Path]:
    """List the runs that names stand for.

    Args:
        names: Folders of runs, or folders that hold some; or else checkpoints and model names only.

    Raises:
        UsageError: some are runs and some are not.
    """
    found = {name: runs_in(Path(name)) for name in names}
    runs = [run for found_in in found.values() for run in found_in]
    others = [name for name in names if not found[name]]
    if runs and others:
        raise UsageError(
            f"{runs[0]} is the folder of a run, and {others[0]} is not: a page shows runs, a table counts models.",
            hint="Report them one after the other.",
        )
    return runs


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs and give each its own label.

    Raises:
        FormatError: a file of one is missing or damaged.
    """
    unique = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [_read(folder, label) for folder, label in zip(unique, _labels(unique), strict=True)]


def _is_run(folder: Path) -> bool:
    """Check that run.json is fixify's and not another program's."""
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "fixify" in content and isinstance(content.get("options"), dict)


def _labels(folders: Sequence[Path]) -> list[str]:
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath(folders))
    return [str(folder.relative_to(common)) for folder in folders]


def _read(folder: Path, label: str) -> Run:
    facts = _json(folder / RUN_FILE)
    measured = [
        _parsed(folder / RUN_FILE, lambda values: None if values is None else Metrics(**values), facts.get(name))
        for name in ("before", "original_metrics")
    ]
    confusions = None
    if (folder / CONFUSIONS_FILE).exists():
        confusions = _parsed(folder / CONFUSIONS_FILE, Confusions.from_dict, _json(folder / CONFUSIONS_FILE))
    return Run(
        folder=folder,
        label=label,
        facts=facts,
        history=_lines(folder / METRICS_FILE, EpochRecord),
        steps=_lines(folder / STEPS_FILE, StepRecord) if (folder / STEPS_FILE).exists() else (),
        confusions=confusions,
        before=measured[0],
        original=measured[1],
    )


def _lines(path: Path, record: Callable[..., _Record]) -> tuple[_Record, ...]:
    lines = _text(path).splitlines()
    return tuple(_parsed(path, lambda text: record(**json.loads(text)), line) for line in lines)


def _json(path: Path) -> dict[str, Any]:
    return _parsed(path, lambda text: dict(json.loads(text)), _text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise FormatError(f"The run in {path.parent} cannot be read: {path.name}: {reason}.") from error


def _parsed(path: Path, parse: Callable[[Any], _Record], value: Any) -> _Record:
    try:
        return parse(value)
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(
            f"The run in {path.parent} is damaged: {path.name} is not what fixify writes ({error}).",
            hint="Resuming the run writes its logs again.",
        ) from error
