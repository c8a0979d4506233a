"""The errors that fixify raises.

They form one hierarchy: a caller can catch `FixifyError`, and a command turns any of them into one line and an exit
code. A message says what was given and what is allowed; `hint` says what to type next.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


class FixifyError(Exception):
    """The base class of all errors that are caused by the input or the machine, not by a bug in fixify.

    Args:
        message: What was given and what is wrong with it, in one sentence.
        hint: What to type or do next; None if the message already says it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class UsageError(FixifyError):
    """Options that cannot be combined, or a value that is not allowed."""

    exit_code = 2


class HeadSpecError(FixifyError):
    """A head spec cannot be built: unknown kind, impossible size, no known Hadamard matrix, duplicate codes."""


class CodebookMismatchError(FixifyError):
    """A rebuilt codebook differs from the one that the head spec was written for."""


class SourceError(FixifyError):
    """A checkpoint cannot be read, or a model name is unknown."""


class UnsafeCheckpointError(SourceError):
    """A checkpoint would run code, or lies about its contents. It was refused, and nothing was run."""


class ArchitectureError(FixifyError):
    """No architecture has the given name, or none fits the checkpoint."""


class AmbiguousArchitectureError(ArchitectureError):
    """Several architectures fit the checkpoint equally well; the message lists them.

    Args:
        message, hint: See `FixifyError`.
        choices: What to give as `--arch` for each architecture -> what sets it apart from the others, in words.
    """

    def __init__(self, message: str, *, hint: str | None = None, choices: Mapping[str, str] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.choices = dict(choices or {})


class NoClassifierError(FixifyError):
    """The model has no classifier that fixify can replace."""


class FormatError(FixifyError):
    """A slim checkpoint is damaged, or has a version that this fixify does not know."""


class DataError(FixifyError):
    """A data set is missing, cannot be read, or does not fit the checkpoint."""


class LoaderError(DataError):
    """Images cannot be loaded because of the machine: a loader process ended, or memory or file handles ran out."""


class ResourceError(FixifyError):
    """The machine has too little memory, shared memory or file handles for what was asked."""


class OutputExistsError(FixifyError):
    """An output file already exists, and `--force` was not given."""


class OutputError(FixifyError):
    """An output cannot be written: the disk is full, permission is missing, or the folder does not exist."""


class TrainingError(FixifyError):
    """A training run cannot continue: the loss is not finite, or the checkpoint to resume from does not fit."""


class ExportError(FixifyError):
    """A model cannot be written in another format: its operations, its size or its library do not allow it."""


class CheckFailed(FixifyError):
    """The command worked, but a check that it was asked to make failed."""

    exit_code = 3


@dataclass(frozen=True)
class ResourceProblem:
    """What the machine lacks.

    Attributes:
        what: It in words, to be continued or followed by a full stop.
        hint: What to type next.
    """

    what: str
    hint: str


_LESS_MEMORY = "Try a smaller --batch-size, fewer --workers, or a smaller --img-size."
_MEMORY = ResourceProblem("there is not enough memory", _LESS_MEMORY)
_HANDLES = ResourceProblem("too many files are open", "Allow more (ulimit -n 65536), or use fewer --workers.")
_SHARED = ResourceProblem(
    "the shared memory (/dev/shm) is full",
    "Use fewer --workers or a smaller --batch-size, or make it larger (docker run --shm-size 8g).",
)
_BY_NUMBER = {errno.EMFILE: _HANDLES, errno.ENFILE: _HANDLES, errno.ENOMEM: _MEMORY}
# Torch raises RuntimeError for all of these, so only its words tell.
_BY_WORDS = {
    "too many open files": _HANDLES,
    "ancdata": _HANDLES,
    "no space left on device": _SHARED,
    "bus error": _SHARED,
    "unable to mmap": _SHARED,
    "out of memory": _MEMORY,
    "not enough memory": _MEMORY,
    "can't allocate memory": _MEMORY,
    "cannot allocate memory": _MEMORY,
    "resource temporarily unavailable": _MEMORY,
}


def resource_problem(error: BaseException) -> ResourceProblem | None:
    """Say what the machine lacks, if that is why an error was raised; otherwise return None.

    >>> resource_problem(OSError(errno.EMFILE, "Too many open files")).what
    'too many files are open'
    >>> resource_problem(ValueError("wrong size")) is None
    True
    """
    if isinstance(error, MemoryError):
        return _MEMORY
    if isinstance(error, OSError):
        return _BY_NUMBER.get(error.errno or 0)
    if isinstance(error, RuntimeError):
        words = str(error).lower()
        return next((problem for text, problem in _BY_WORDS.items() if text in words), None)
    return None


@contextmanager
def resources_explained(doing: str) -> Iterator[None]:
    """Turn errors within the block that come from a lack of memory or file handles into a `ResourceError`.

    Args:
        doing: What the block does, after "Cannot".
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        problem = resource_problem(error)
        if problem is None:
            raise
        raise ResourceError(f"Cannot {doing}: {problem.what}.", hint=problem.hint) from error
