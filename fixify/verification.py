"""Verify files that fixify wrote: image models and language models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixify.checkpoints.locate import short_name
from fixify.checkpoints.verify import Check
from fixify.checkpoints.verify import verify as verify_slim
from fixify.errors import UsageError
from fixify.language.checkpoint import is_language, verify_language


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


def verify(file: str | Path, *, source: str | Path | None = None) -> Verification:
    """Rebuild the codebook of a slim checkpoint or a language model, reload the weights, run the model.

    Args:
        file: The file; for a slim checkpoint also what `fixify.load` takes.
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
    return Verification(short_name(file), tuple(checks))
