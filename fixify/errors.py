"""Every error that fixify raises on purpose.

One hierarchy, so that a caller can catch `FixifyError` and a command can turn any of them into one line and an
exit code. A message says what was given and what is allowed; `hint` says what to type next.
"""

from __future__ import annotations

from collections.abc import Mapping


class FixifyError(Exception):
    """Base of all errors that are about the input or the machine, not about a bug in fixify.

    Args:
        message: What was given and what is wrong with it, one sentence.
        hint: What to type or do next, or None if the message already says it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class UsageError(FixifyError):
    """Options that do not go together, or a value outside what is allowed."""

    exit_code = 2


class HeadSpecError(FixifyError):
    """A head spec that cannot be built: unknown kind, impossible size, no known Hadamard matrix, duplicates."""


class CodebookMismatchError(FixifyError):
    """A rebuilt codebook is not the one that the head spec was written for."""


class SourceError(FixifyError):
    """A checkpoint or model name that cannot be read."""


class UnsafeCheckpointError(SourceError):
    """A checkpoint that would run code, or lies about its contents. It was refused and nothing was run."""


class ArchitectureError(FixifyError):
    """No architecture of that name, or none that fits the checkpoint."""


class AmbiguousArchitectureError(ArchitectureError):
    """Several architectures fit the checkpoint equally well; the message lists them.

    Args:
        choices: What to give as `--arch` for each of them -> what sets it apart from the others, in words.
    """

    def __init__(self, message: str, *, hint: str | None = None, choices: Mapping[str, str] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.choices = dict(choices or {})


class NoClassifierError(FixifyError):
    """The model has no classifier that fixify can replace."""


class FormatError(FixifyError):
    """A slim checkpoint that is damaged, or of a version that this fixify does not know."""


class DataError(FixifyError):
    """A data set that is missing, unreadable, or does not fit the checkpoint."""


class OutputExistsError(FixifyError):
    """An output file exists already and `--force` was not given."""


class OutputError(FixifyError):
    """An output could not be written: full disk, no permission, missing folder."""


class TrainingError(FixifyError):
    """A run that cannot go on: loss is not finite, a checkpoint to resume from does not fit."""


class CheckFailed(FixifyError):
    """The command worked, and what it was asked to check does not hold."""

    exit_code = 3
