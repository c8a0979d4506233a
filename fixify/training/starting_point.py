"""What follows from where a run starts: defaults of its options, and the teacher that it has if nobody names one.

A learned classifier, and a head that stores at least one sign per weight of it, start near the original. The rates that
other heads need would first destroy what such a head knows, so it trains gently: at a low rate, with the running
statistics that the network has, and with a teacher. The teacher is the original where it is at hand, else the start
itself. Its start stays the best checkpoint unless a validation is above it by more than chance. Heads with matched
codes learn from the original too, and train the last blocks first. tests/benchmarks/gentle.py measured all of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify._files import sha256_of
from fixify.checkpoints.header import SlimInfo
from fixify.errors import UsageError
from fixify.heads import FixedClassifier, HeadSpec, kind_of
from fixify.training import distributed
from fixify.training.events import Listener
from fixify.training.facts import OpenedInputs
from fixify.training.last_block import max_images, split_model
from fixify.training.losses import BLOCKED_FROM
from fixify.training.options import (
    GENTLE_RATE,
    GENTLE_TEACHING,
    LAST_BLOCK_EPOCHS,
    USUAL_TEACHING,
    FinetuneOptions,
)
from fixify.training.rate_search import find_rate
from fixify.training.run_folder import RUN_FILE, begins_anew, stored_options
from fixify.training.run_records import StartedRun, read_run_file


def starts_near(specs: Iterable[HeadSpec]) -> bool:
    """Check that every head stores at least one sign per weight of the old classifier; no head is a learned one."""
    return all(kind_of(spec).num_stored_signs(spec) >= spec.num_classes * spec.num_features for spec in specs)


def defends_start(model: nn.Module, options: FinetuneOptions) -> bool:
    """Check that only a validation above the start by more than chance replaces it as the best.

    That holds for a model that starts near the original, where the gains of training are about as large as chance;
    see `fixify.training.events.is_above_start`. With `max_drop` the run stops at the first validation that is good
    enough, and that one is the best.
    """
    return options.max_drop is None and not options.from_scratch and starts_near(_head_specs(model))


def _head_specs(model: nn.Module) -> list[HeadSpec]:
    return [module.spec for module in model.modules() if isinstance(module, FixedClassifier)]


def resolved_options(
    options: FinetuneOptions,
    model: nn.Module,
    opened: OpenedInputs,
    folder: Path,
    *,
    resume: bool,
    on_event: Listener = lambda _event: None,
) -> FinetuneOptions:
    """Return the options with those that follow from the start (`FinetuneOptions.follow_from_start`).

    Args:
        options: Where these are None, they follow from the head and the teacher. An `lr` of "auto" is found by a test.
        model: The model that is trained.
        opened: The training images, and the teacher.
        folder: Folder of the run.
        resume: Whether the run in the folder goes on, with its own.
        on_event: Called with the rate that was found.

    Raises:
        UsageError: the learning rate and another option exclude each other, or "auto" is not possible here.
        DataError: "auto", and there are too few images, or too many cannot be read.
        TrainingError, FormatError: the run in the folder cannot be read.
    """
    missing = [name for name in FinetuneOptions.follow_from_start if getattr(options, name) in (None, "auto")]
    if not missing:
        return options

    def read() -> FinetuneOptions | None:
        return stored_options(folder, type(options)) if (folder / RUN_FILE).exists() else None

    stored = distributed.on_rank_zero(read) if resume else None
    usual = {**options.usual_values(), "lr": options.peak_rate}
    if stored is None:
        heads = _head_specs(model)
        if not options.from_scratch and starts_near(heads):
            # The start alone would teach a model to stay what it is.
            weight = USUAL_TEACHING if opened.taught_by_start else GENTLE_TEACHING
            # With kept statistics a high rate diverges, so they are kept at the default rate alone.
            usual |= {"lr": GENTLE_RATE, "distill_weight": weight, "freeze_bn": "lr" in missing}
        elif "last_block_epochs" in missing and _gains_from_last_blocks(heads, model, opened, options):
            usual["last_block_epochs"] = LAST_BLOCK_EPOCHS
    # A run of an older version may lack an option, which then had the usual value.
    was = {} if stored is None else {name: getattr(stored, name) for name in missing}
    resolved = options.replace(**{name: usual[name] if was.get(name) is None else was[name] for name in missing})
    if options.lr == "auto" and was.get("lr") is None:
        return resolved.replace(lr=find_rate(model, opened, resolved, on_event))
    return resolved


def _gains_from_last_blocks(
    heads: Sequence[HeadSpec], model: nn.Module, opened: OpenedInputs, options: FinetuneOptions
) -> bool:
    """Check that all heads are matched and have a teacher, and that the last blocks can learn from all images."""
    measured = bool(heads) and all(head.matched for head in heads) and opened.teacher is not None
    num_logits = options.batch_size * max((head.num_classes for head in heads), default=0)
    unfit = options.shard or options.share_classes or options.compile or num_logits >= BLOCKED_FROM
    unlike = options.unlabelled or options.loss != "cross-entropy"  # the runs that were measured
    if not measured or unfit or unlike:
        return False
    device = next(model.parameters()).device
    few = torch.zeros(2, *opened.preprocessing["input_size"], device=device)
    try:
        split = split_model(model, few)
    except UsageError:
        return False
    return max_images(split, few) >= len(opened.train)


def default_teacher(
    slim: Path, info: SlimInfo, against: Path | str | None, options: FinetuneOptions, *, calibrated: bool = True
) -> Path | str | None:
    """Return the teacher of a head that knows its classes; None for other heads, and where a teacher does not fit.

    It is the original. A head that starts near it learns from its own start if the original is not known.

    Args:
        slim: The slim checkpoint.
        info: What it says about itself.
        against: The original, if it was named.
        options: A teacher needs labels, the cross-entropy, and memory for the logits of all classes.
        calibrated: Whether the heads have statistics; without them the start's own answers are worth less.
    """
    near = starts_near(head.spec for head in info.heads)
    knows_classes = all(head.spec.matched or starts_near([head.spec]) for head in info.heads)
    if options.unlabelled or options.loss != "cross-entropy" or not knows_classes:
        return None
    if options.share_classes or options.batch_size * info.num_classes >= BLOCKED_FROM:
        return None
    original = recorded_original(slim, info) if against is None else against
    return slim if original is None and near and calibrated else original


def recorded_original(slim: Path, info: SlimInfo) -> Path | None:
    """Return the file that a slim checkpoint was made from, if it lies beside it unchanged.

    Nothing else is looked for: the checkpoint records the file's name, size and SHA-256, and no path.
    """
    source = info.source
    name, num_bytes, digest = source.get("name"), source.get("bytes"), source.get("sha256")
    if not isinstance(name, str) or not name.isprintable() or Path(name).name != name or source.get("ema"):
        return None
    found = slim.parent / name
    if not found.is_file() or found.stat().st_size != num_bytes:
        return None
    return found if sha256_of(found) == digest else None


class _TaughtRun(StartedRun):
    """What run.json says of the teacher."""

    teacher: dict[str, Any] | None = None


def may_have_teacher(folder: Path, *, resume: bool) -> bool:
    """Check that a run is new, or goes on as one that has a teacher.

    Raises:
        FormatError: the run in the folder cannot be read.
    """
    if not resume or begins_anew(folder) is not None:
        return True
    return read_run_file(folder, _TaughtRun).teacher is not None
