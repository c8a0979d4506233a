"""Tables for the terminal. They fit 80 columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fixify.description import LIBRARIES
from fixify.reporting.costs import KindPlan, ModelReport
from fixify.reporting.layout import human_bytes, new_table, short_digest
from fixify.savings import Savings

if TYPE_CHECKING:  # torch, timm, matplotlib and data sets take seconds to import; whoever made a result has them
    from fixify.agreement import Choice
    from fixify.catalogue.matches import Identification
    from fixify.checkpoints.verify import Check
    from fixify.demo.run import DemoResult
    from fixify.evaluation import Evaluation
    from fixify.exporting.job import Exported
    from fixify.language.checkpoint import LanguageInfo
    from fixify.language.run import LanguageRun
    from fixify.metrics import Metrics
    from fixify.models.classifiers import Coverage
    from fixify.prediction import Prediction
    from fixify.reporting.run_report import Report
    from fixify.training.run import FinetuneResult

_PAPERS_RATIO = 81.2 / 74.1
"""Perplexity with fixed words over that with learned ones, in Table 2 of the paper."""


# Parameters and bytes.


def savings_table(savings: Savings) -> Table:
    """Show parameters and bytes before and after, for the whole model and for its classifier."""
    made = new_table("", ">before", ">after", ">saved")
    classifier_after = savings.parameters_after - (savings.parameters_before - savings.classifier_parameters)
    for name, before, after in (
        ("parameters", savings.parameters_before, savings.parameters_after),
        ("  classifier", savings.classifier_parameters, classifier_after),
    ):
        made.add_row(name, f"{before:,}", f"{after:,}", _saved(before, after, "{:,}".format))
    for name, before, after in (
        ("weights", savings.bytes_before, savings.bytes_after),
        ("  classifier", savings.classifier_bytes_before, savings.classifier_bytes_after),
    ):
        made.add_row(name, human_bytes(before), human_bytes(after), _saved(before, after, human_bytes))
    return made


def agreement_table(choice: Choice) -> Table:
    """Show the heads that `convert --agree` tried, largest first, and which one was chosen."""
    made = new_table("tried", ">bytes per class", ">agreement", ">at least", "")
    for tried in choice.walked:
        mark = "chosen" if tried is choice.chosen else "" if tried.reached else f"below {choice.target:g} %"
        made.add_row(
            tried.flags,
            f"{tried.bytes_per_class:,}",
            f"{tried.agreement:.2f} % of {tried.held_out:,}",
            f"{tried.bound:.2f} %",
            mark,
        )
    return made


def models_table(rows: Iterable[ModelReport]) -> Table:
    """Show one row per model: the share of its classifier, and what remains without it."""
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
        made.caption = "* what fixify convert would leave; share: classifier weights, percent of all parameters"
        made.caption_justify = "left"
    return made


def kinds_table(kinds: Sequence[KindPlan]) -> Table:
    """Show one row per kind of head: what it saves, and how far apart its codes are, beside the bounds."""
    made = new_table("head", ">stored", ">saved", ">cosine", ">Rankin", ">|cosine|", ">Welch", ">rms")
    for kind in kinds:
        stored = "no" if kind.stored is None else human_bytes(kind.stored)
        saved = "no" if kind.saved is None else f"{human_bytes(-kind.saved)} more" if kind.saved < 0 else None
        sizes = [stored, saved or human_bytes(kind.saved or 0)]
        facts = kind.coherence
        numbers = (
            () if facts is None else (facts.max_cosine, facts.rankin, facts.max_abs, facts.welch, facts.rms_cosine)
        )
        made.add_row(kind.kind, *sizes, *(f"{number:.3f}" for number in numbers))
    notes = ["cosine, |cosine|: the largest between two codes; Rankin, Welch: the least possible"]
    made.caption = "\n".join(notes + [f"{kind.kind}: {kind.note}" for kind in kinds if kind.note])
    made.caption_justify = "left"
    return made


def coverage_table(rows: Sequence[Coverage]) -> Table:
    """Show one row per architecture: its classifier, or why there is none."""
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
    """Count the architectures per library that can be converted, as built by default or with a number of classes."""
    made = new_table("library", ">architectures", ">convertible", ">once built with classes", ">never")
    for library in LIBRARIES:
        own = [row for row in rows if row.ref.startswith(f"{library}/")]
        convertible = sum(row.convertible for row in own)
        encoders = sum(row.takes_classes for row in own) - convertible
        numbers = (len(own), convertible, encoders, len(own) - convertible - encoders)
        made.add_row(library, *(f"{number:,}" for number in numbers))
    return made


# Files.


def language_info_table(path: Path, info: LanguageInfo) -> Table:
    """Show what the file of a language model says about itself, one fact per row."""
    made = new_table("", "", title=path.name)
    made.show_header = False
    options, size, training = info.options, info.size, info.training
    made.add_row("network", f"{options.num_layers}-layer LSTM (h={options.num_features})")
    made.add_row("words", f"{options.label}; {len(info.words):,} of them: {' '.join(info.words[:6])} ...")
    if info.codebook is not None:
        made.add_row(
            "", f"{info.codebook.construction}, seed {info.codebook.seed}, {short_digest(info.codebook.digest)}"
        )
    made.add_row("learned", f"{size.learned:,} of {size.parameters:,} parameters; {size.share:.2f} % are fixed")
    made.add_row("file", human_bytes(path.stat().st_size))
    from fixify.language.run import DIVERGED

    loss, epoch = training.get("val_loss"), training.get("epoch")
    if isinstance(loss, float) and loss < DIVERGED and isinstance(epoch, int):
        made.add_row("trained", f"on {training.get('text')}")
        made.add_row("", f"validation perplexity {math.exp(loss):.1f} after epoch {epoch + 1} of {options.epochs}")
    return made


def candidates_table(found: Identification) -> Table:
    """Show one row per architecture that fits, with what sets it apart."""
    made = new_table("architecture", ">classes", "arguments", "what sets it apart")
    for candidate in found.candidates:
        arch = candidate.architecture
        facts = [f"{trait} {value}" for trait, value in candidate.differences.items()]
        if candidate.aliases:
            facts.append(f"same network: {', '.join(candidate.aliases)}")
        arguments = ", ".join(f"{key}={value}" for key, value in arch.kwargs.items())
        made.add_row(arch.ref, str(candidate.num_classes), arguments, "; ".join(facts))
    return made


def checks_table(checks: Sequence[Check]) -> Table:
    """Show one row per check."""
    made = new_table("", "check", "found")
    for check in checks:
        made.add_row(Text("ok", "green") if check.passed else Text("FAILED", "red"), check.name, check.detail)
    return made


# Results.


def metrics_table(found: Evaluation) -> Table:
    """Show one row per model; below it, how often two models agree."""
    made = new_table("model", ">top-1 %", ">top-5 %", ">loss", ">ECE %", ">images", ">seconds")
    for name, metrics in found.models:
        made.add_row(name, *_numbers(metrics), f"{metrics.num_images:,}", f"{metrics.seconds:.1f}")
    agreement = found.agreement
    if agreement is not None:
        lines = [f"same class on {agreement.same:.2f} % of the images"]
        if agreement.confident_same is not None:
            lines.append(
                f"and on {agreement.confident_same:.2f} % of the {agreement.confident_images:,} "
                f"on which {found.against_name} is more than 50 % sure"
            )
        lines.append(
            f"only {found.name} right: {agreement.only_second_right:,}; "
            f"only {found.against_name} right: {agreement.only_first_right:,}"
        )
        made.caption = "\n".join(lines)
        made.caption_justify = "left"
    return made


def predictions_table(found: Sequence[Prediction]) -> Table:
    """Show one block per image: its classes, most probable first."""
    from fixify.prediction import short_names

    made = new_table("image", ">probability", ">class", "label")
    names = short_names([prediction.image for prediction in found])
    for short, prediction in zip(names, found, strict=True):
        rows = zip(prediction.probabilities, prediction.classes, prediction.labels, strict=True)
        for position, (probability, number, label) in enumerate(rows):
            name = short if position == 0 else ""
            made.add_row(name, f"{100 * probability:.1f} %", str(number), label)
    return made


def export_table(done: Exported) -> Table:
    """Show what was written, and how it agrees with PyTorch."""
    made = new_table("", "")
    made.add_row("written", human_bytes(done.num_bytes))
    made.add_row("of it the head", human_bytes(done.head_bytes))
    for check in done.checks:
        same = f"same first class on {check.same} of {check.count} {check.images}"
        made.add_row("against PyTorch", f"{same}; logits differ by {check.difference:.1g} std at most")
    return made


def finetune_table(result: FinetuneResult) -> Table:
    """Show the model before training beside its best validation."""
    made = new_table("", ">top-1 %", ">top-5 %", ">loss", ">ECE %", title=str(result.best_path))
    if result.original_top1 is not None:
        made.add_row("original", f"{result.original_top1:.2f}")
    made.add_row("before training", *_numbers(result.before))
    after = result.after
    best = (after.val_top1, after.val_top5, after.val_loss, after.val_ece)
    epochs = round(after.epochs, 2)
    when = f"after {epochs:g} epoch{'' if epochs == 1 else 's'}"
    if result.best_is_start:
        when = "best: the start" + (", calibrated" if after.val_loss != result.before.loss else "")
    made.add_row(when, *_formatted(*best))
    sent = next((record for record in reversed(result.history) if record.gradient_bytes is not None), None)
    if sent is not None:
        made.caption = (
            f"summed over the processes per update: {human_bytes(sent.gradient_bytes or 0)} of gradients (counted), "
            f"{human_bytes(sent.statistics_bytes or 0)} of statistics"
        )
        made.caption_justify = "left"
    return made


def runs_table(report: Report) -> Table:
    """Show one row per run with its best validation, and the verdict below."""
    made = new_table("run", "classifier", ">top-1 %", ">top-5 %", ">loss", ">before", ">epochs")
    for run in report.runs:
        best = run.best
        numbers = (
            ("", "", "") if best is None else (f"{best.val_top1:.2f}", f"{best.val_top5:.2f}", f"{best.val_loss:.4f}")
        )
        before = "" if run.start_top1 is None else f"{run.start_top1:.2f}"
        made.add_row(run.label, run.head, *numbers, before, f"{run.epochs_done:g}/{run.epochs}")
    made.caption = "\n".join(report.verdict)
    made.caption_justify = "left"
    return made


def language_table(runs: Sequence[LanguageRun]) -> Table:
    """Show one row per run of a language model, in the columns of the paper's Table 2.

    Beside each perplexity is its ratio to that of learned words, if there is exactly one such run.
    """
    base = reference(runs)
    first = runs[0]
    made = new_table(
        "words", ">validation", ">/ learned", ">test", "># params", ">fixed", ">learned here",
        title=f"{first.num_layers}-layer LSTM (h={first.num_features}), perplexity: {first.text}",
    )  # fmt: skip
    for run in runs:
        made.add_row(
            run.words,
            f"{run.perplexity:.1f}",
            "" if base is None else f"{run.perplexity / base.perplexity:.3f}",
            "" if run.test_perplexity is None else f"{run.test_perplexity:.1f}",
            f"{run.size.parameters:,}",
            f"{run.size.share:.2f} %",
            f"{run.size.learned:,}",
        )
    if base is not None:
        made.caption = f"the paper's ratio, word2vec on WikiText-2: 81.2 / 74.1 = {_PAPERS_RATIO:.3f}"
        made.caption_justify = "left"
    return made


def reference(runs: Sequence[LanguageRun]) -> LanguageRun | None:
    """Return the run with learned words; None if there are none or several."""
    learned = [run for run in runs if run.is_learned]
    return learned[0] if len(learned) == 1 else None


def demo_table(result: DemoResult) -> Table:
    """Show one row per model: its accuracy on the held-out typefaces."""
    images = result.original_metrics.num_images
    made = new_table(
        "accuracy", ">epochs", ">top-1", ">top-5", title=f"{images:,} images of {result.data.num_classes:,} characters"
    )
    tuned, first, last = result.finetuned_metrics, result.original_metrics, result.converted_metrics
    epochs = f"{result.history[-1].epochs:g}"
    made.add_row("original, learned classifier", "0", _percent(first.top1), _percent(first.top5))
    signs = result.one_shot_metrics
    made.add_row("one sign per weight (--head binary)", "0", _percent(signs.top1), _percent(signs.top5))
    made.add_row("Hadamard codes, converted only", "0", _percent(last.top1), _percent(last.top5))
    made.add_row("Hadamard codes, fine-tuned", epochs, _percent(tuned.top1), _percent(tuned.top5))
    if result.control is not None:
        control = result.control
        made.add_row("control: original, trained too", epochs, _percent(control.val_top1), _percent(control.val_top5))
    notes = ["typefaces that no training has seen; the best epoch of each"]
    notes += [] if result.control else ["no control was run"]
    if result.many is not None:
        many = result.many
        notes.append(
            f"{many.num_classes} characters on the same features (C = 2 N): {_percent(many.top1)} of "
            f"{_percent(many.original_top1)} after {many.epochs} epochs of the last blocks"
        )
    made.caption = "\n".join(notes)
    made.caption_justify = "left"
    return made


def _saved(before: float, after: float, write: Callable[[float], str]) -> str:
    """Say how much less there is: "12 (4.0 %)", "nothing", or "3 more" where a head is larger than the classifier."""
    if after >= before:
        return f"{write(after - before)} more" if after > before else "nothing"
    share = 100 * (before - after) / before
    return f"{write(before - after)} ({f'{share:.1f}' if share >= 0.05 else 'less than 0.1'} %)"


def _numbers(metrics: Metrics) -> tuple[str, ...]:
    return _formatted(metrics.top1, metrics.top5, metrics.loss, metrics.ece)


def _formatted(top1: float, top5: float, loss: float, ece: float) -> tuple[str, ...]:
    return f"{top1:.2f}", f"{top5:.2f}", f"{loss:.4f}", f"{ece:.2f}"


def _percent(value: float) -> str:
    return f"{value:.2f} %"
