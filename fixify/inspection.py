"""Identify, inspect and verify files: image models and language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixify.checkpoints import open_source
from fixify.checkpoints.learned import stated
from fixify.checkpoints.onnx_file import is_onnx, read_onnx_info
from fixify.checkpoints.remarks import remarks_on
from fixify.checkpoints.slim import SlimInfo, read_info
from fixify.checkpoints.verify import Check
from fixify.checkpoints.verify import verify as verify_slim
from fixify.errors import ArchitectureError, UsageError
from fixify.language.checkpoint import LanguageInfo, is_language, read_language_info, verify_language
from fixify.models.identify import Candidate, Identification
from fixify.models.identify import identify as identify_shapes


@dataclass(frozen=True)
class Identity:
    """Which architecture a checkpoint can be.

    Attributes:
        name: Name of the checkpoint.
        says: The architecture that the file, or a config.json beside it, names; None if there is none.
        stated: That architecture if the tensors fit it, else None.
        found: The architectures that the names and shapes of the tensors fit.
        reference_head: Path of a classifier that the paper's published code fixed, else None.
        notes: What was read of the checkpoint and what was left out, for the user.
    """

    name: str
    says: str | None
    stated: Candidate | None
    found: Identification
    reference_head: str | None
    notes: tuple[str, ...] = ()

    @property
    def is_settled(self) -> bool:
        """Whether `fixify.convert` needs no `arch`."""
        return self.stated is not None or (len(self.found.candidates) == 1 and self.says is None)

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify identify --json` prints."""
        return {
            "file": self.name,
            "says": self.says,
            "fits": self.stated is not None if self.says else None,
            "by": self.found.by,
            "candidates": [
                {
                    "architecture": candidate.architecture.to_dict(),
                    "num_classes": candidate.num_classes,
                    "aliases": list(candidate.aliases),
                    "differences": dict(candidate.differences),
                }
                for candidate in self.found.candidates
            ],
            "reference_code_head": self.reference_head,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Verification:
    """The checks of a file.

    Attributes:
        name: Name of the file.
        checks: In the order in which they were made.
    """

    name: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify verify --json` prints."""
        return {"file": self.name, "passed": self.passed, "checks": [vars(check) for check in self.checks]}


def identify(source: str | Path, *, on_progress: Callable[[int, int], object] | None = None) -> Identity:
    """Find the architectures that a checkpoint fits, by the names and shapes of its tensors.

    What the file says of itself (timm's arch, config.json, metadata) settles the choice if the tensors fit it.

    Args:
        source: A checkpoint. Only names and shapes are read.
        on_progress: Called with how many architectures of how many were built.

    Raises:
        SourceError: it cannot be read.
        ArchitectureError: nothing fits.
    """
    opened = open_source(source, meta=True)
    said, head = stated(opened), opened.reference_code_head
    try:
        found = identify_shapes(opened.shapes, on_progress=on_progress)
    except ArchitectureError:
        if said is None:
            raise
        found = Identification((said,), "name")  # with arguments that no list of architectures has
    classes = {candidate.num_classes for candidate in ((said,) if said is not None else found.candidates)}
    return Identity(
        name=opened.name,
        says=opened.facts.architecture,
        stated=said,
        found=found,
        reference_head=None if head is None else head.path,
        notes=remarks_on(opened, classes.pop() if len(classes) == 1 else None),
    )


def inspect(file: str | Path) -> SlimInfo | LanguageInfo:
    """Read what a slim checkpoint, an ONNX file of `fixify.export` or a language model says about itself.

    Raises:
        FormatError: it is none of these, is damaged, or was written by a newer version.
        UsageError: it is an ONNX file, and onnxruntime is not installed.
    """
    if is_onnx(file):
        return read_onnx_info(file)[0]
    return read_language_info(file) if is_language(file) else read_info(file)


def verify(file: str | Path, *, source: str | Path | None = None) -> Verification:
    """Rebuild the codebook of a slim checkpoint or a language model, reload the weights, run the model.

    Args:
        file: The file.
        source: The original; the backbone of a slim checkpoint is compared with it bit for bit.

    Raises:
        FormatError: the file is neither, or so damaged that there is nothing to check.
        SourceError: `source` cannot be read.
        UsageError: `source` was given for a language model.
    """
    if not is_language(file):
        checks = verify_slim(file, source=source)
    elif source is None:
        checks = verify_language(file)
    else:
        raise UsageError(f"{file} is a language model; it was not made from another file.", hint="Drop --source.")
    return Verification(Path(file).name, tuple(checks))
