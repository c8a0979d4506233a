"""Find the architectures that a checkpoint fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixify.catalogue.matches import Candidate, Identification
from fixify.checkpoints import open_source
from fixify.checkpoints.recognition import explaining_parts, stated
from fixify.checkpoints.remarks import remarks_on
from fixify.errors import ArchitectureError
from fixify.lookup import identify as identify_shapes


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
        with explaining_parts(opened):
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
