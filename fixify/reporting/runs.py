"""Read the folders of runs, as `fixify finetune` and `fixify train` leave them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fixify._values import Count, Text
from fixify.checkpoints.files import holds_one_checkpoint
from fixify.errors import FormatError, UsageError
from fixify.metrics import WORST, Confusions, Metrics, WorstClass
from fixify.savings import Savings
from fixify.training.events import EpochRecord, best_of
from fixify.training.run_folder import CONFUSIONS_FILE, METRICS_FILE, RUN_FILE, STEPS_FILE, StepRecord
from fixify.training.run_records import StartedRun, read_record, read_records, read_run_file

_STRICT = ConfigDict(strict=True, frozen=True)


def _counts(savings: Savings) -> Savings:
    """Check that the counts are counts, and that there is something to take a share of."""
    for name, count in asdict(savings).items():
        if not (name == "parameters_before") <= count <= 2**53:
            raise ValueError(f"{name} is no possible count")
    return savings


class ModelFacts(BaseModel):
    """What run.json says of the model; see `fixify.training.facts.describe_model`."""

    model_config = _STRICT

    architecture: Text | None = None
    head: Text | None = None
    num_features: Count | None = None
    num_classes: Count | None = None
    parameters: Count | None = None
    bytes: Count | None = None
    classifier_parameters: Count | None = None
    classifier_bytes: Count | None = None
    savings: Annotated[Savings, AfterValidator(_counts)] | None = None


class NamedModel(BaseModel):
    """The original or the teacher."""

    model_config = _STRICT

    name: Text


class ImageRun(StartedRun):
    """What run.json says of a run on images. Everything but the options may be missing in an older run.

    Attributes:
        command: What was typed.
        data: Name of the data.
        class_names: In label order.
        train_images, val_images: Number of images per split.
        checkpoint: Name of the checkpoint that was finetuned.
        device: Where it ran.
        val_labels: What stands for labels that the validation images lack.
        original, teacher: The reference models.
        before, original_metrics: Metrics of the model before training, and of the original.
        start: The validation before training, after calibration, if it was a candidate for the best.
        model: Facts of the model.
    """

    command: Text | None = None
    data: Text = ""
    class_names: tuple[Text, ...] | None = None
    train_images: Count | None = None
    val_images: Count | None = None
    checkpoint: Text | None = None
    device: Text | None = None
    val_labels: Text | None = None
    original: NamedModel | None = None
    teacher: NamedModel | None = None
    before: Metrics | None = None
    start: EpochRecord | None = None
    original_metrics: Metrics | None = None
    model: ModelFacts = ModelFacts()


class StoredConfusions(BaseModel):
    """What confusions.json holds; see `fixify.metrics.Confusions`."""

    model_config = _STRICT

    images: tuple[Count, ...]
    right: tuple[Count, ...]
    worst: Annotated[tuple[WorstClass, ...], Field(max_length=WORST)]

    @model_validator(mode="after")
    def _fits_together(self) -> StoredConfusions:
        Confusions.from_dict(self.model_dump())
        if any(right > images for right, images in zip(self.right, self.images, strict=True)):
            raise ValueError("a class has more right predictions than images")
        return self

    def to_confusions(self) -> Confusions:
        """Return what was stored."""
        return Confusions(self.images, self.right, self.worst)


@dataclass(frozen=True)
class Run:
    """What a run left in its folder.

    Attributes:
        folder: The folder.
        label: A short name, different from those of the other runs.
        facts: What run.json says.
        start: The validation before training, if it was a candidate for the best.
        history: Every validation after it.
        steps: The logged steps.
        confusions: The mistakes of the last validation; None if they were not recorded.
        before: Metrics of the model before training, if measured.
        original: Metrics of the original, if measured.
    """

    folder: Path
    label: str
    facts: ImageRun
    start: EpochRecord | None
    history: tuple[EpochRecord, ...]
    steps: tuple[StepRecord, ...]
    confusions: Confusions | None
    before: Metrics | None
    original: Metrics | None

    @property
    def options(self) -> dict[str, Any]:
        """The options that it was trained with."""
        return dict(self.facts.options)

    @property
    def model(self) -> ModelFacts:
        """Facts of the model; empty in an older run."""
        return self.facts.model

    @property
    def head(self) -> str:
        """The kind of its fixed head, or "learned"; an older run with a scale is "fixed"."""
        scaled = any(record.scale is not None for record in self.history)
        return str(self.model.head or ("fixed" if scaled else "learned"))

    @property
    def is_learned(self) -> bool:
        """Whether the classifier is learned."""
        return self.head == "learned"

    @property
    def best(self) -> EpochRecord | None:
        """The best validation, the start included (`fixify.training.events.best_of`); None before the first."""
        return best_of(self.start, self.history)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order."""
        return list(self.facts.class_names or ())

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
    path = folder / RUN_FILE
    try:
        content = read_record(path, dict[str, Any])
    except FormatError:
        return False
    return "fixify" in content and isinstance(content.get("options"), dict)


def _labels(folders: Sequence[Path]) -> list[str]:
    names = [folder.name for folder in folders]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath(folders))
    return [str(folder.relative_to(common)) for folder in folders]


def _read(folder: Path, label: str) -> Run:
    facts = read_run_file(folder, ImageRun)
    confusions = None
    if (folder / CONFUSIONS_FILE).exists():
        confusions = read_record(folder / CONFUSIONS_FILE, StoredConfusions).to_confusions()
    return Run(
        folder=folder,
        label=label,
        facts=facts,
        start=facts.start,
        history=read_records(folder / METRICS_FILE, EpochRecord),
        steps=read_records(folder / STEPS_FILE, StepRecord) if (folder / STEPS_FILE).exists() else (),
        confusions=confusions,
        before=facts.before,
        original=facts.original_metrics,
    )
