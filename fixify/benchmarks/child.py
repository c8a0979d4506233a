"""Run one measurement in a process of its own, whose memory nothing else has used."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixify._memory import STATUS, peak_bytes, resident_bytes
from fixify.errors import FixifyError, ResourceError, resource_problem

_ANSWER = "fixify-answer:"


@dataclass(frozen=True)
class Failure:
    """Why a measurement has no result.

    Attributes:
        reason: In words, to be shown in a table.
    """

    reason: str


def run_in_child(
    function: Callable[..., Mapping[str, Any]],
    arguments: Mapping[str, Any],
    *,
    num_threads: int,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any] | Failure:
    """Call a function of a module in a new process, and return its result.

    Args:
        function: A function at the top level of a module of fixify; returns plain values.
        arguments: Its arguments, plain values.
        num_threads: Threads of torch in the process.
        timeout: Seconds after which the process is stopped.
        environment: More environment variables.

    Returns:
        The result, or why there is none: the time was up, or memory ran out.

    Raises:
        ResourceError: the process ended for another reason.
    """
    return run_in_children(
        function, [arguments], num_threads=num_threads, timeout=timeout, environments=[environment or {}]
    )[0]


def run_in_children(
    function: Callable[..., Mapping[str, Any]],
    arguments: Sequence[Mapping[str, Any]],
    *,
    num_threads: int,
    timeout: float | None = None,
    environments: Sequence[Mapping[str, str]] | None = None,
) -> list[dict[str, Any] | Failure]:
    """Call a function in several processes at once; see `run_in_child`.

    Args:
        function: See `run_in_child`, like `num_threads` and `timeout`.
        arguments: Those of each process.
        num_threads: Threads of torch in each process.
        timeout: Seconds for all of them together.
        environments: More environment variables of each process.
    """
    started = [
        _start(function, each, num_threads, extra)
        for each, extra in zip(arguments, environments or [{}] * len(arguments), strict=True)
    ]
    until = None if timeout is None else time.monotonic() + timeout
    try:
        return [_answer(process, timeout, until) for process in started]
    finally:
        for process in started:
            _end(process)


@contextlib.contextmanager
def child(
    function: Callable[..., Mapping[str, Any]], arguments: Mapping[str, Any], *, num_threads: int
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Call a function in a new process while the block runs; arguments as for `run_in_child`.

    The block gets a function that waits for the result and returns it, or raises a ResourceError that says why there is
    none. The process ends with the block, finished or not.
    """
    process = _start(function, arguments, num_threads, {})

    def result() -> dict[str, Any]:
        found = _answer(process, None, None)
        if isinstance(found, Failure):
            raise ResourceError(f"A process that ran beside this one has no result: {found.reason}")
        return found

    try:
        yield result
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()  # which closes the pipes


def _start(
    function: Callable[..., Mapping[str, Any]], arguments: Mapping[str, Any], num_threads: int, extra: Mapping[str, str]
) -> subprocess.Popen[str]:
    task = {
        "module": function.__module__,
        "function": function.__name__,
        "arguments": dict(arguments),
        "parent": os.getpid(),
    }
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)} | dict(extra)
    command = [sys.executable, "-c", "from fixify.benchmarks.child import main; main()", json.dumps(task)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _answer(process: subprocess.Popen[str], timeout: float | None, until: float | None) -> dict[str, Any] | Failure:
    try:
        out, err = process.communicate(timeout=None if until is None else max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return Failure(f"over {timeout:,.0f} s")
    answers = [line.removeprefix(_ANSWER) for line in out.splitlines() if line.startswith(_ANSWER)]
    if answers:
        found: dict[str, Any] = json.loads(answers[-1])
        return Failure(found["failure"]) if "failure" in found else found["result"]
    if process.returncode == -9:
        return Failure("out of memory")
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "no message")
    raise ResourceError(f"A process of the benchmark ended with exit code {process.returncode}: {last}")


def main() -> None:
    """Do the task that the command line holds, and print the answer for `run_in_child`."""
    task = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(task["parent"],), daemon=True).start()
    print(_ANSWER + json.dumps(_done(task)), flush=True)


def _done(task: Mapping[str, Any]) -> dict[str, Any]:
    function = getattr(importlib.import_module(task["module"]), task["function"])
    try:
        return {"result": function(**task["arguments"])}
    except (FixifyError, RuntimeError, MemoryError) as error:
        problem = resource_problem(error)
        if isinstance(error, FixifyError):
            return {"failure": error.message}
        if problem is not None or isinstance(error, MemoryError):
            return {"failure": "out of memory"}
        raise


def _end_with(parent: int) -> None:
    """End this process soon after its parent, also if that was killed and could not end it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class PeakMemory:
    """The memory of this process above what it had at the start of a block, in bytes.

    On Linux it is the resident memory, whose peak is reset at the start. Elsewhere it is the peak of the whole life of
    the process, so measure in a process that has done nothing else.
    """

    def __enter__(self) -> PeakMemory:
        """Note the memory so far."""
        if STATUS.exists():
            with contextlib.suppress(OSError):  # not allowed here: the peak counts from the start of the process
                Path("/proc/self/clear_refs").write_text("5")
        self._before = resident_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the peak."""
        self.bytes = max(peak_bytes() - self._before, 0)
