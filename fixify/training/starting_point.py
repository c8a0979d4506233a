"""What follows from where a run starts: defaults of its options, and the teacher that it has if nobody names one.

A learned classifier, and a head that stores at least one sign per weight of it, start near the original. The rates that
other heads need would first destroy what such a head knows, so it trains gently. Where the original is at hand, these
heads and those with matched codes learn from its answers. tests/benchmarks/gentle.py measured both.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from fixify._files import sha256_of
from fixify.checkpoints.header import SlimInfo
from fixify.heads import FixedClassifier, HeadSpec, kind_of
from fixify.training import distributed
from fixify.training.losses import BLOCKED_FROM
from fixify.training.options import (
    GENTLE_RATE,
    GENTLE_TEACHING,
    USUAL_RATE,
    USUAL_TEACHING,
    FinetuneOptions,
)
from fixify.training.run_folder import RUN_FILE, begins_anew, stored_options
from fixify.training.run_records import StartedRun, read_run_file


def starts_near(specs: Iterable[HeadSpec]) -> bool:
    """Check that every head stores at least one sign per weight of the old classifier; no head is a learned one."""
    return all(kind_of(spec).num_stored_signs(spec) >= spec.num_classes * spec.num_features for spec in specs)


def resolved_options(options: FinetuneOptions, model: nn.Module, folder: Path, *, resume: bool) -> FinetuneOptions:
    """Return the options with those that follow from the head: `lr` and `distill_weight`.

    Args:
        options: Where these are None, they follow from the head.
        model: The model that is trained.
        folder: Folder of the run.
        resume: Whether the run in the folder goes on, with its own.

    Raises:
        UsageError: the learning rate and another option exclude each other.
        TrainingError, FormatError: the run in the folder cannot be read.
    """
    missing = [name for name in ("lr", "distill_weight") if getattr(options, name) is None]
    if not missing:
        return options

    def read() -> FinetuneOptions | None:
        return stored_options(folder, type(options)) if (folder / RUN_FILE).exists() else None

    stored = distributed.on_rank_zero(read) if resume else None
    heads = (module.spec for module in model.modules() if isinstance(module, FixedClassifier))
    # A run of an older version may lack an option, which then had the usual value.
    near = stored is None and starts_near(heads)
    usual = {
        "lr": GENTLE_RATE if near else USUAL_RATE,
        "distill_weight": GENTLE_TEACHING if near else USUAL_TEACHING,
    }
    was = {} if stored is None else {name: getattr(stored, name) for name in missing}
    return options.replace(**{name: usual[name] if was.get(name) is None else was[name] for name in missing})


def default_teacher(
    slim: Path, info: SlimInfo, against: Path | str | None, options: FinetuneOptions
) -> Path | str | None:
    """Return the original of a head that knows its classes; None for other heads, and where a teacher does not fit.

    These heads start near the original, or their codes were matched to its class vectors.

    Args:
        slim: The slim checkpoint.
        info: What it says about itself.
        against: The original, if it was named.
        options: A teacher needs labels, the cross-entropy, and memory for the logits of all classes.
    """
    knows_classes = all(head.spec.matched or starts_near([head.spec]) for head in info.heads)
    if options.unlabelled or options.loss != "cross-entropy" or not knows_classes:
        return None
    if options.share_classes or options.batch_size * info.num_classes >= BLOCKED_FROM:
        return None
    return recorded_original(slim, info) if against is None else against


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
