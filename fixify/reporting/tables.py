"""Tables for the terminal. They fit 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fixify.checkpoint import SlimInfo
from fixify.counts import Savings
from fixify.prediction import Prediction
from fixify.reporting.models import ModelReport
from fixify.reporting.plan import KindPlan
from fixify.retrofit import HeadRecord
from fixify.verification import Check
from fixify.zoo.architectures import LIBRARIES
from fixify.zoo.coverage import Coverage
from fixify.zoo.identify import Identification


def new_table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the house style. A column whose name starts with `>` is aligned right and never wrapped."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        if column.startswith(">"):
            made.add_column(column[1:], justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="fold")
    return made


def human_bytes(count: float) -> str:
    """`1536` -> `1.5 KB`; powers of 1000, as disks and download pages count."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def savings_table(savings: Savings) -> Table:
    """Before and after: parameters and bytes, of the whole model and of its classifier."""
    made = new_table("", ">before", ">after", ">saved")
    classifier_after = savings.parameters_after - (savings.parameters_before - savings.classifier_parameters)
    for name, before, after in (
        ("parameters", savings.parameters_before, savings.parameters_after),
        ("  classifier", savings.classifier_parameters, classifier_after),
    ):
        made.add_row(name, f"{before:,}", f"{after:,}", _saved(before, after, f"{before - after:,}"))
    for name, before, after in (
        ("weights", savings.bytes_before, savings.bytes_after),
        ("  classifier", savings.classifier_bytes_before, savings.classifier_bytes_after),
    ):
        made.add_row(name, human_bytes(before), human_bytes(after), _saved(before, after, human_bytes(before - after)))
    return made


def removed_line(savings: Savings, heads: Sequence[HeadRecord] = ()) -> str:
    """The saving in one sentence. The weights that a binary head replaces are not gone, but signs now."""
    share = f"{100 * savings.removed_share:.1f} % of {savings.parameters_before:,} parameters"
    bits = [(record.spec.bits_per_class or 0) * record.spec.num_classes for record in heads]
    if any(bits):
        return f"{savings.removed:,} classifier weights became {sum(bits):,} signs ({share})."
    return f"{savings.removed:,} classifier weights are gone ({share})."


def calibration_line(calibration: Mapping[str, Any]) -> str:
    """What the head was fitted to and how often it then answered as the original, of a `SlimInfo.calibration`."""
    images, held_out, data = (calibration.get(key) for key in ("num_images", "held_out", "data"))
    return (
        f"on {images} images of {data}; agreed with the original on {_plain(calibration.get('agreement'))} % of "
        f"{held_out} others"
    )


def models_table(rows: Iterable[ModelReport]) -> Table:
    """One row a model: how much of it is classifier, and what remains without."""
    made = new_table("model", ">N", ">C", ">parameters", ">classifier", ">share", ">fixed")
    for row in rows:
        savings = row.savings
        made.add_row(
            row.name,
            str(row.num_features),
            str(row.num_classes),
            f"{savings.parameters_before:,}",
            f"{savings.classifier_parameters:,}",
            f"{100 * savings.removed_share:.2f} %",
            f"{savings.parameters_after:,}" + ("" if row.fixed else " *"),
        )
    if not all(row.fixed for row in rows):
        made.caption = "* what fixify convert would leave; share: classifier weights of all parameters"
        made.caption_justify = "left"
    return made


def info_table(path: Path, info: SlimInfo) -> Table:
    """What a slim checkpoint says about itself, one fact a row."""
    made = new_table("", "", title=path.name)
    made.show_header = False
    made.add_row("architecture", info.architecture.ref)
    for record in info.heads:
        spec = record.spec
        made.add_row(f"head {record.path}", f"{spec.kind}, {spec.num_classes} classes x {spec.num_features} features")
        if spec.bits_per_class is not None:
            stored = -(-spec.bits_per_class // 8) + spec.gains
            made.add_row("", f"{spec.bits_per_class} bits a class ({stored} bytes{' with its length' * spec.gains})")
        made.add_row("", ", ".join(part for part in (spec.construction, f"seed {spec.seed}") if part))
        made.add_row("", short_digest(spec.digest))
    made.add_row("preprocessing", ", ".join(f"{key} {_plain(value)}" for key, value in info.preprocessing.items()))
    if info.labels:
        shown = ", ".join(info.labels[:4])
        made.add_row("labels", f"{shown}, ... ({len(info.labels)})" if len(info.labels) > 4 else shown)
    source = info.source
    if source.get("name"):
        size = f", {human_bytes(source['bytes'])}" if source.get("bytes") else ""
        made.add_row("source", f"{source['name']}{size}" + (", EMA weights" if source.get("ema") else ""))
    if source.get("sha256"):
        made.add_row("", short_digest(f"sha256:{source['sha256']}"))
    made.add_row("saved", removed_line(Savings.from_dict(info.savings), info.heads))
    if info.calibration is not None:
        made.add_row("calibrated", calibration_line(info.calibration))
    training = info.training or {}
    if training:
        epochs, before, after = (training.get(key) for key in ("epochs_done", "before", "after"))
        made.add_row("fine-tuned", f"{epochs} epochs on {training.get('data')}, from {training.get('checkpoint')}")
        if isinstance(before, dict) and isinstance(after, dict):
            what = "agreement with the teacher" if training.get("val_labels") else "top-1"
            made.add_row("", f"{what} {_plain(before.get('top1'))} % before, {_plain(after.get('val_top1'))} % after")
        teacher = training.get("teacher")
        if isinstance(teacher, dict):
            made.add_row("", f"taught by {teacher.get('name')}")
    return made


def coverage_table(rows: Sequence[Coverage]) -> Table:
    """One row an architecture: its classifier, or why there is none."""
    made = new_table("model", ">parameters", ">classifier", ">share", "kind, or why not")
    for row in rows:
        kinds = Counter(site.layer_type for site in row.sites)
        made.add_row(
            row.ref,
            f"{row.num_parameters:,}",
            f"{row.head_parameters:,}" if row.sites else "",
            f"{100 * row.head_parameters / row.num_parameters:.1f} %" if row.sites else "",
            row.reason or ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items()),
        )
    return made


def coverage_summary_table(rows: Sequence[Coverage]) -> Table:
    """How many architectures of each library can be converted: as built by default, or with a number of classes."""
    made = new_table("library", ">architectures", ">convertible", ">once built with classes", ">never")
    for library in LIBRARIES:
        own = [row for row in rows if row.ref.startswith(f"{library}/")]
        convertible = sum(row.convertible for row in own)
        encoders = sum(row.takes_classes for row in own) - convertible
        numbers = (len(own), convertible, encoders, len(own) - convertible - encoders)
        made.add_row(library, *(f"{number:,}" for number in numbers))
    return made


def kinds_table(kinds: Sequence[KindPlan]) -> Table:
    """One row a kind of head: what it saves, and how far apart its codes are, beside the bounds."""
    made = new_table("head", ">stored", ">saved", ">cosine", ">Rankin", ">|cosine|", ">Welch", ">rms")
    for kind in kinds:
        sizes = ["no" if size is None else human_bytes(size) for size in (kind.stored, kind.saved)]
        facts = kind.coherence
        numbers = (
            () if facts is None else (facts.max_cosine, facts.rankin, facts.max_abs, facts.welch, facts.rms_cosine)
        )
        made.add_row(kind.kind, *sizes, *(f"{number:.3f}" for number in numbers))
    notes = ["cosine, |cosine|: the largest between two codes; Rankin, Welch: the least possible"]
    made.caption = "\n".join(notes + [f"{kind.kind}: {kind.note}" for kind in kinds if kind.note])
    made.caption_justify = "left"
    return made


def candidates_table(found: Identification) -> Table:
    """One row an architecture that fits, with what sets it apart."""
    made = new_table("architecture", ">classes", "arguments", "what sets it apart")
    for candidate in found.candidates:
        arch = candidate.architecture
        facts = [f"{trait} {value}" for trait, value in candidate.differences.items()]
        if candidate.aliases:
            facts.append(f"same network: {', '.join(candidate.aliases)}")
        arguments = ", ".join(f"{key}={value}" for key, value in arch.kwargs.items())
        made.add_row(arch.ref, str(candidate.num_classes), arguments, "; ".join(facts))
    return made


def predictions_table(found: Sequence[Prediction]) -> Table:
    """One block an image: its classes, most probable first."""
    made = new_table("image", ">probability", ">class", "label")
    for prediction in found:
        rows = zip(prediction.probabilities, prediction.classes, prediction.labels, strict=True)
        for position, (probability, number, label) in enumerate(rows):
            name = Path(prediction.image).name if position == 0 else ""
            made.add_row(name, f"{100 * probability:.1f} %", str(number), label)
    return made


def checks_table(checks: Sequence[Check]) -> Table:
    """One row a check."""
    made = new_table("", "check", "found")
    for check in checks:
        made.add_row(Text("ok", "green") if check.passed else Text("FAILED", "red"), check.name, check.detail)
    return made


def short_digest(digest: str | None) -> str:
    """The beginning of a digest, enough to tell two apart; `--json` has all of it."""
    return "" if digest is None else digest if len(digest) <= 24 else f"{digest[:24]}..."


def _saved(before: float, after: float, difference: str) -> str:
    return f"{difference} ({100 * (before - after) / before:.1f} %)" if before else difference


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ("x" if len(value) == 3 else ", ").join(_plain(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
