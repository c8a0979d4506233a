"""Run inputs in processes of their own, and judge each by its outcome, its processor time and its memory.

A process that dies (of SIGSEGV, of the limit of its processor time) is one finding, and the next process goes on behind
the input that killed it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fixify.errors import FixifyError
from fuzzing.kinds import Kind

SECONDS, MEGABYTES = 2.0, 1024
"""What one input may take. The tests ask for less haste: how fast a machine is does not make a file hostile."""

KILL_SECONDS = 20  # of processor time; the kernel then ends the process, also inside of C code
_STUCK_SECONDS = 300  # without using processor time
_ADDRESS_SPACE = 6 << 30  # more than the process has: what asks for more gets a MemoryError
_PAGE = 4096


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
        kind, number: The input.
        verdict: "read", "refused" (a FixifyError), or what it was that should not happen.
        seconds: Processor time of reading.
        megabytes: Memory that reading took at most, beyond what the process had before.
    """

    kind: str
    number: int
    verdict: str
    seconds: float
    megabytes: float

    @property
    def fell(self) -> bool:
        """Whether it was neither read nor refused."""
        return self.verdict not in ("read", "refused")

    def __str__(self) -> str:
        return f"{self.kind} {self.number}: {self.verdict} ({self.seconds:.2f} s, {self.megabytes:,.0f} MB)"


@dataclass
class Summary:
    """The outcomes of one kind."""

    read: int = 0
    refused: int = 0
    fell: list[Outcome] = field(default_factory=list)
    slow: list[Outcome] = field(default_factory=list)
    large: list[Outcome] = field(default_factory=list)
    slowest: Outcome | None = None
    largest: Outcome | None = None
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        """How many there were."""
        return self.read + self.refused + len(self.fell)

    def add(self, outcome: Outcome) -> None:
        """Count an outcome."""
        if outcome.fell:
            self.fell.append(outcome)
        elif outcome.verdict == "read":
            self.read += 1
        else:
            self.refused += 1
        if outcome.seconds > SECONDS:
            self.slow.append(outcome)
        if outcome.megabytes > MEGABYTES:
            self.large.append(outcome)
        self.seconds += outcome.seconds
        if self.slowest is None or outcome.seconds > self.slowest.seconds:
            self.slowest = outcome
        if self.largest is None or outcome.megabytes > self.largest.megabytes:
            self.largest = outcome


def run(kind: Kind, numbers: range, folder: Path) -> Iterator[Outcome]:
    """Judge the inputs of one kind.

    Args:
        kind: What to make and read.
        numbers: The numbers of the inputs.
        folder: An empty folder for their files.
    """
    start = numbers.start
    while start < numbers.stop:
        context = multiprocessing.get_context("fork")  # the process has imported everything
        ours, theirs = context.Pipe(duplex=False)
        process: Any = context.Process(target=_work, args=(kind, range(start, numbers.stop), folder, theirs))
        process.start()
        theirs.close()
        try:
            yield from _received(kind, process, ours)
        except EOFError:
            pass
        finally:
            process.kill()
            process.join()
        start = process.next_number


def _received(kind: Kind, process: Any, ours: Connection) -> Iterator[Outcome]:
    """Give the outcomes that a process sends, and one for its own end where it did not come to the end."""
    process.next_number = 0
    while True:
        is_stuck = not ours.poll(_STUCK_SECONDS)
        message = None
        if not is_stuck:
            try:
                message = ours.recv()
            except EOFError:
                process.join()
        if isinstance(message, Outcome):
            process.next_number = message.number + 1
            yield message
        elif isinstance(message, int):  # the number of the input that comes next, or of the end
            process.next_number = message
        elif message == "end":
            return
        else:
            number, code = process.next_number, process.exitcode
            if code is not None and code >= 0:
                raise RuntimeError(f"the harness failed at {kind.name} {number}; the traceback is above")
            if is_stuck:
                how = f"it waits for ever ({_STUCK_SECONDS} s)"
            elif code == -signal.SIGXCPU:
                how = f"over {KILL_SECONDS} s of processor time, deaf to exceptions"
            else:
                how = f"the process died: {signal.Signals(-code).name}"
            process.next_number = number + 1
            yield Outcome(kind.name, number, how, KILL_SECONDS if code == -signal.SIGXCPU else 0.0, 0.0)
            return


def _work(kind: Kind, numbers: range, folder: Path, results: Connection) -> None:
    """Judge inputs one after the other; what kills this process is the input whose number was sent last."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory()
    for number in numbers:
        results.send(number)
        results.send(judge(kind, number, folder, kill=True))
    results.send("end")
    results.close()
    os._exit(0)  # without the handlers of the process that was forked


def judge(kind: Kind, number: int, folder: Path, *, kill: bool = False) -> Outcome:
    """Make one input, read it, and say what became of it.

    Args:
        kind: Its kind.
        number: Its number.
        folder: Where its files are written.
        kill: Let the kernel end this process after `KILL_SECONDS` of processor time.
    """
    kind.make(random.Random(f"{kind.name} {number}"), folder)
    if kill:
        limit = math.ceil(time.process_time()) + KILL_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    before = _reset_peak()
    started = time.process_time()
    try:
        verdict = "read" if _was_read(kind, folder) else "refused"
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = next(
            (
                f"{Path(f.filename).name}:{f.lineno}"
                for f in traceback.extract_tb(error.__traceback__)[::-1]
                if "/fixify/" in f.filename
            ),
            "?",
        )
        verdict = f"{type(error).__name__}: {str(error)[:200]!r} at {Path(at.filename).name}:{at.lineno}, from {where}"
    seconds = time.process_time() - started
    return Outcome(kind.name, number, verdict, seconds, max(0.0, (_peak() - before) / 2**20))


def _was_read(kind: Kind, folder: Path) -> bool:
    try:
        kind.read(folder)
    except FixifyError as error:
        if not error.message:
            raise ValueError("an error without a message") from error
        return False
    finally:
        if (folder / "code-ran").exists():
            raise AssertionError("a file ran code")
    return True


def _limit_memory() -> None:
    status = _status("VmSize")
    if status is not None:
        resource.setrlimit(resource.RLIMIT_AS, (status + _ADDRESS_SPACE, resource.RLIM_INFINITY))


def _reset_peak() -> int:
    """Make the peak of the memory what is in use now, and return it; 0 where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _status("VmRSS") or 0


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(entry: str) -> int | None:
    """Return an entry of /proc/self/status, bytes; None on systems without it."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(entry))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
