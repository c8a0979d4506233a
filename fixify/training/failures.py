"""Recognise what the machine does to a run: a loader process is killed, memory or file handles run out.

torch raises `RuntimeError` for each. Its handler of SIGCHLD raises it wherever the program happens to be, so a run has
to expect it anywhere.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from fixify.errors import resource_problem

_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))?:? ?([0-9, ]+)\)(?: is killed by signal: ([\w ]+))?")


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
    if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) and _was_received(error):
        return _worker_failure("ended unexpectedly")
    if isinstance(error, RuntimeError) and (worker := _WORKER.search(str(error))):
        signal = worker[2]
        how = "ended unexpectedly" if signal is None else f"was ended by a signal ({signal.strip()})"
        return _worker_failure(how)
    problem = resource_problem(error)
    return None if problem is None else Failure(problem.what[0].upper() + problem.what[1:], problem.hint)


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
