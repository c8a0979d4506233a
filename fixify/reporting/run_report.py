"""Put runs side by side: plain data, which `--json` prints and the HTML page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fixify._values import finite_or_none
from fixify.metrics import Confusions, Metrics
from fixify.reporting.runs import Run
from fixify.savings import Savings
from fixify.training.events import EpochRecord, gentler
from fixify.training.run_folder import StepRecord


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of a model and, included in them, of its classifier.

    Attributes:
        name: The run or model.
        style: Number of the run, for its colour; None for a model that was not run.
    """

    name: str
    style: int | None
    parameters: int
    classifier_parameters: int
    bytes: int
    classifier_bytes: int


@dataclass(frozen=True)
class TakenFor:
    """A wrong answer: the class that images were taken for, and how many."""

    name: str
    images: int


@dataclass(frozen=True)
class ClassRow:
    """A class that a run gets wrong.

    Attributes:
        name: Name of the class.
        right: Its validation images that the run gets right.
        images: Its validation images.
        taken_for: The most frequent wrong answers.
        elsewhere: For each other run, by label, how many of these images it gets right; None if its classes differ.
    """

    name: str
    right: int
    images: int
    taken_for: tuple[TakenFor, ...]
    elsewhere: dict[str, int | None]


@dataclass(frozen=True)
class ClassReport:
    """The classes in a run's last validation.

    Attributes:
        step: Updates before it.
        total: Classes that have images.
        all_right: Classes with every image right.
        half_wrong: Classes with fewer than half of the images right.
        worst: The worst classes, at most 20.
    """

    step: int
    total: int
    all_right: int
    half_wrong: int
    worst: tuple[ClassRow, ...]


@dataclass(frozen=True)
class RunReport:
    """One run of a report.

    Attributes:
        label: Its name on the page.
        head: The kind of its fixed head, or "learned".
        architecture: Name of the architecture; None in an older run.
        command: The command that started it; None if it was started from Python, or in an older run.
        data: Name of the data.
        train_images: Number of training images.
        val_images: Number of validation images.
        epochs_done: Epochs that are done.
        epochs: Epochs in all.
        best: The best validation (`fixify.training.events.best_of`), the start included; None before the first.
        before: Metrics of the model before training.
        start: The validation before training, after calibration, if it was a candidate for the best.
        original: Metrics of the original.
        original_top1: The original's top-1, percent, measured or given.
        agreement: Whether top-1 is agreement with the teacher, because there were no labels.
        images_per_second: Training throughput at the last validation.
        size: Parameters and bytes; None in an older run.
        savings: Parameters and bytes before and after the conversion, if the model was converted.
        history: Every line of metrics.jsonl.
        steps: Every line of steps.jsonl.
        classes: Its worst classes; None if they were not recorded.
        options: The options that it was trained with.
        facts: Other facts for the page, name -> text.
    """

    label: str
    head: str
    architecture: str | None
    command: str | None
    data: str
    train_images: int | None
    val_images: int | None
    epochs_done: float
    epochs: int
    best: EpochRecord | None
    before: Metrics | None
    start: EpochRecord | None
    original: Metrics | None
    original_top1: float | None
    agreement: bool
    images_per_second: float | None
    size: Size | None
    savings: Savings | None
    history: tuple[EpochRecord, ...]
    steps: tuple[StepRecord, ...]
    classes: ClassReport | None
    options: dict[str, Any]
    facts: dict[str, str]

    @property
    def is_learned(self) -> bool:
        """Whether the classifier is learned."""
        return self.head == "learned"

    @property
    def start_top1(self) -> float | None:
        """Top-1 before training, percent: after calibration if it was measured then."""
        if self.start is not None:
            return self.start.val_top1
        return None if self.before is None else self.before.top1

    @property
    def best_is_start(self) -> bool:
        """Whether the best validation is the start."""
        return self.start is not None and self.best is self.start


@dataclass(frozen=True)
class Report:
    """Runs side by side.

    Attributes:
        runs: In the order given.
        differences: Options that differ between the runs: name -> the value in each run.
        verdict: The result in sentences.
    """

    runs: tuple[RunReport, ...]
    differences: dict[str, tuple[Any, ...]]
    verdict: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify report --json` prints; a number that is not finite becomes None."""
        found: dict[str, Any] = _finite(asdict(self))
        return found


def report_runs(runs: Sequence[Run]) -> Report:
    """Put runs side by side."""
    reports = tuple(_report(run, number, runs) for number, run in enumerate(runs))
    return Report(reports, _differences(reports), tuple(_verdict(reports)))


def _report(run: Run, number: int, runs: Sequence[Run]) -> RunReport:
    facts, last = run.facts, run.history[-1] if run.history else None
    savings = run.model.savings
    return RunReport(
        label=run.label,
        head=run.head,
        architecture=run.model.architecture,
        command=facts.command,
        data=facts.data,
        train_images=facts.train_images,
        val_images=facts.val_images,
        epochs_done=0 if last is None else round(last.epochs, 4),
        epochs=int(run.options.get("epochs", 0)),
        best=run.best,
        before=run.before,
        start=run.start,
        original=run.original,
        original_top1=run.original_top1,
        agreement=facts.val_labels is not None,
        images_per_second=None if last is None else last.images_per_second,
        size=_size(run, number, savings),
        savings=savings,
        history=run.history,
        steps=run.steps,
        classes=None if run.confusions is None else _classes(run, run.confusions, runs),
        options=run.options,
        facts=_facts(run),
    )


def _size(run: Run, number: int, savings: Savings | None) -> Size | None:
    model = run.model
    if savings is not None:  # what the slim checkpoint stores
        rest = savings.parameters_before - savings.classifier_parameters
        return Size(
            run.label,
            number,
            savings.parameters_after,
            savings.parameters_after - rest,
            savings.bytes_after,
            savings.classifier_bytes_after,
        )
    counts = (model.parameters, model.classifier_parameters, model.bytes, model.classifier_bytes)
    whole = [count for count in counts if count is not None]
    # An older run has none of these facts.
    return Size(run.label, number, *whole) if len(whole) == len(counts) else None


def _facts(run: Run) -> dict[str, str]:
    facts = run.facts
    counts = [
        f"{count:,} {what}"
        for count, what in ((facts.train_images, "training"), (facts.val_images, "validation images"))
        if count is not None
    ]
    classes = f"{len(run.class_names):,}" if run.class_names else None
    found = {
        "model": run.model.architecture,
        "checkpoint": facts.checkpoint,
        "data": facts.data or None,
        "images": " and ".join(counts) or None,
        "classes": classes,
        "classifier": next(
            (f"learned, converted after step {each.step:,}" for each in run.history if each.classifier == "converted"),
            None,
        ),
        "original": None if facts.original is None else facts.original.name,
        "teacher": None if facts.teacher is None else facts.teacher.name,
        "device": facts.device,
        "seed": run.options.get("seed"),
        "fixify": facts.fixify,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _classes(run: Run, found: Confusions, runs: Sequence[Run]) -> ClassReport:
    names = run.class_names
    others = [other for other in runs if other is not run]

    def name_of(label: int) -> str:
        return names[label] if label < len(names) else str(label)

    def right_in(other: Run, label: int) -> int | None:
        theirs = other.confusions
        same = theirs is not None and other.class_names == names and len(theirs.right) == len(found.right)
        return theirs.right[label] if same and theirs is not None else None

    rows = tuple(
        ClassRow(
            name_of(row.label),
            found.right[row.label],
            found.images[row.label],
            tuple(TakenFor(name_of(label), count) for label, count in row.taken_for),
            {other.label: right_in(other, row.label) for other in others},
        )
        for row in found.worst
    )
    present = [(right, images) for right, images in zip(found.right, found.images, strict=True) if images]
    return ClassReport(
        step=run.history[-1].step if run.history else 0,
        total=len(present),
        all_right=sum(right == images for right, images in present),
        half_wrong=sum(2 * right < images for right, images in present),
        worst=rows,
    )


def _differences(reports: Sequence[RunReport]) -> dict[str, tuple[Any, ...]]:
    names = dict.fromkeys(name for report in reports for name in report.options)
    values = {name: tuple(report.options.get(name) for report in reports) for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _verdict(reports: Sequence[RunReport]) -> list[str]:
    """Compare each fixed run with the first learned one; without one, with the original."""
    learned = next((report for report in reports if report.is_learned and report.best is not None), None)
    said = []
    for report in reports:
        if report.best is None:
            said.append(f"{report.label} has no validation yet.")
            continue
        top1 = report.best.val_top1
        what = "agreement with the teacher" if report.agreement else "validation top-1"
        start = " before training; no validation was clearly better" if report.best_is_start and report.history else ""
        if report.is_learned:
            said.append(f"{report.label} (learned classifier): {what} {top1:.2f} %{start}.")
            continue
        sentence = f"{report.label} ({report.head} head): {what} {top1:.2f} %{start}"
        if learned is not None and learned.best is not None:
            sentence += f", {_gap(top1 - learned.best.val_top1)} the learned classifier of {learned.label}"
        elif report.original_top1 is not None:
            sentence += f", {_gap(top1 - report.original_top1)} the original"
        if report.savings is not None and report.savings.classifier_bytes_before:
            before, after = report.savings.classifier_bytes_before, report.savings.classifier_bytes_after
            sentence += f"; its classifier takes {100 * after / before:.1f} % of the bytes that the original's took"
        said.append(f"{sentence}.")
        if start:
            lr = report.options.get("lr")
            said.append(gentler(lr if isinstance(lr, float) else None, taught="teacher" in report.facts))
    return said


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return finite_or_none(value)


def _gap(points: float) -> str:
    if abs(points) < 0.005:
        return "the same as"
    return f"{abs(points):.2f} points {'above' if points > 0 else 'below'}"
