"""Recognise what the machine does to a run: a loader process is killed, memory or file handles run out.

torch raises `RuntimeError` for each. Its handler of SIGCHLD raises it wherever the program happens to be, so a run has
to expect it anywhere.
"""

from __future__ import annotations

import errno
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))?:? ?([0-9, ]+)\)(?: is killed by signal: ([\w ]+))?")
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")
_NO_HANDLES = ("Too many open files", "received 0 items of ancdata")


@dataclass(frozen=True)
class Failure:
    """What the machine did.

    Attributes:
        what: "a loader process was killed"; how a sentence begins or ends.
        hint: What may help, as a sentence.
    """

    what: str
    hint: str


def machine_failure(error: BaseException) -> Failure | None:
    """Recognise a failure of the machine in an error or in what caused it; None for any other error."""
    seen: BaseException | None = error
    while seen is not None:
        found = _failure(seen)
        if found is not None:
            return found
        seen = seen.__cause__
    return None


def _failure(error: BaseException) -> Failure | None:
    text = str(error)
    if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and _was_received(error):
        return _worker_failure("ended unexpectedly")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return _OUT_OF_MEMORY
    if isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            return _OUT_OF_MEMORY
        return _OUT_OF_HANDLES if error.errno in (errno.EMFILE, errno.ENFILE) else None
    if not isinstance(error, RuntimeError):
        return None
    if worker := _WORKER.search(text):
        signal = worker[2]
        how = "ended unexpectedly" if signal is None else f"was ended by a signal ({signal.strip()})"
        return _worker_failure(how)
    if any(words in text for words in _NO_MEMORY):
        return _OUT_OF_MEMORY
    return _OUT_OF_HANDLES if any(words in text for words in _NO_HANDLES) else None


def _was_received(error: BaseException) -> bool:
    """Check whether an error arose while a tensor was received from another process, which must have ended."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(Path(frame.f_code.co_filename).parts[-3:] == _RECEIVER for frame, _ in frames)


def _worker_failure(how: str) -> Failure:
    return Failure(
        f"A loader process {how}",
        "A kill often means that memory ran out: try fewer --workers or a smaller --batch-size.",
    )


_RECEIVER = ("torch", "multiprocessing", "reductions.py")
_OUT_OF_MEMORY = Failure("Memory ran out", "Try a smaller --batch-size or fewer --workers.")
_OUT_OF_HANDLES = Failure("Too many files are open", "Allow more with `ulimit -n 65536`, or try fewer --workers.")
