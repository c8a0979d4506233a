"""What follows from where a run starts: defaults of its options, and the teacher that it has if nobody names one.

A learned classifier, and a head that stores at least one sign per weight of it, start near the original. The rates that
other heads need would first destroy what such a head knows. So it trains gently, and learns from the original's answers
where the original is at hand. tests/benchmarks/gentle.py measured both.
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
from fixify.training.options import GENTLE_RATE, USUAL_RATE, FinetuneOptions
from fixify.training.run_folder import begins_anew, stored_options
from fixify.training.run_records import StartedRun, read_run_file


def starts_near(specs: Iterable[HeadSpec]) -> bool:
    """Check that every head stores at least one sign per weight of the old classifier; no head is a learned one."""
    return all(kind_of(spec).num_stored_signs(spec) >= spec.num_classes * spec.num_features for spec in specs)


def resolved_options(options: FinetuneOptions, model: nn.Module, folder: Path, *, resume: bool) -> FinetuneOptions:
    """Return the options with a learning rate.

    Args:
        options: `lr` may be None.
        model: The model that is trained.
        folder: Folder of the run.
        resume: Whether the run in the folder goes on, with its rate.

    Raises:
        UsageError: the rate and another option exclude each other.
        TrainingError, FormatError: the run in the folder cannot be read.
    """
    if options.lr is not None:
        return options
    stored = distributed.on_rank_zero(lambda: stored_options(folder, type(options))) if resume else None
    if stored is not None and stored.lr is not None:
        return options.replace(lr=stored.lr)
    heads = (module.spec for module in model.modules() if isinstance(module, FixedClassifier))
    return options.replace(lr=GENTLE_RATE if starts_near(heads) else USUAL_RATE)


def default_teacher(
    slim: Path, info: SlimInfo, against: Path | str | None, options: FinetuneOptions
) -> Path | str | None:
    """Return the original of a head that starts near it; None for other heads, and where a teacher does not fit.

    Args:
        slim: The slim checkpoint.
        info: What it says about itself.
        against: The original, if it was named.
        options: A teacher needs labels, the cross-entropy, and memory for the logits of all classes.
    """
    if options.unlabelled or options.loss != "cross-entropy" or not starts_near(head.spec for head in info.heads):
        return None
    if options.batch_size * info.num_classes >= BLOCKED_FROM:
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
