"""Helpers for torchrun workers: only rank 0 prints, an error is reported once, `--nproc-per-node` starts workers.

Importing this module needs no torch, because every command imports it, and little else, for a quick `fixify --help`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import typer

from fixify.errors import FixifyError, TrainingError, UsageError

OUTCOME = "FIXIFY_OUTCOME"
"""Environment variable with the file in which a worker tells the launcher the exit code of an error."""

_PATIENCE = 5.0  # seconds
_silenced: list[tuple[TextIO, TextIO]] = []


def is_worker() -> bool:
    """Return whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "MASTER_ADDR" in os.environ


def is_rank_zero() -> bool:
    """Return whether this process prints and writes for all workers; true without torchrun."""
    return not is_worker() or int(os.environ.get("RANK", "0")) == 0


def silence_all_but_first() -> None:
    """Let only rank 0 print."""
    if not is_rank_zero():
        _silenced[:] = [(sys.stdout, sys.stderr)]
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def speak() -> None:
    """Let this process print again, for what only it knows."""
    if _silenced:
        sys.stdout, sys.stderr = _silenced.pop()


def leave_if_told() -> None:
    """Exit if torchrun restarts the workers after an error that was reported: it would happen again."""
    outcome = os.environ.get(OUTCOME)
    if is_worker() and outcome is not None and Path(outcome).exists():
        sys.exit(0)


def may_tell(error: FixifyError) -> bool:
    """Return whether this process reports an error: not if another has, or if the error is that another ended."""
    if not is_worker():
        return True
    # When one process has ended, torchrun terminates the others, which must not happen while this one reports.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    outcome = os.environ.get(OUTCOME)
    if outcome is None:
        return _is_first_to_tell()
    from fixify.training.distributed import ConnectionLost

    if isinstance(error, ConnectionLost):
        return False  # the launcher knows which process ended, and how
    try:
        with open(outcome, "x") as file:
            file.write(str(error.exit_code))
    except FileExistsError:
        return False
    return True


def _is_first_to_tell() -> bool:
    """Ask the store of torchrun, which outlives its workers; if it is gone too, no other process has reported."""
    from datetime import timedelta

    from torch.distributed import DistError, TCPStore

    patience = timedelta(seconds=_PATIENCE)
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return int(store.add(f"fixify/told/{attempt}", 1)) == 1
    except DistError:
        return True


def hand_over(processes: int | None, max_restarts: int | None) -> None:
    """Start workers for this command line if it asks for them, and exit with their exit code.

    Returns in the process that has to do the work: in a worker, or in the only process.

    Args:
        processes: `--nproc-per-node`.
        max_restarts: `--max-restarts`.

    Raises:
        UsageError: `--max-restarts` was given without `--nproc-per-node`.
        TrainingError: see `launch`.
    """
    if processes is None and max_restarts is not None:
        raise UsageError("--max-restarts needs --nproc-per-node.", hint="Add --nproc-per-node N.")
    if processes is not None and not is_worker():
        raise typer.Exit(launch(processes, max_restarts or 0, sys.argv[1:]))


def launch(processes: int, max_restarts: int, arguments: Sequence[str]) -> int:
    """Run `fixify` with these arguments in N processes on this machine, and return its exit code.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on, and the processes get half a minute to save their state.

    Args:
        processes: Number of processes.
        max_restarts: How often all of them are restarted after one is lost.
        arguments: The command line without the program.

    Raises:
        TrainingError: a process ended without reporting an error, in the last restart too.
    """
    import logging
    import tempfile
    import uuid

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # torchrun's own report of what is one sentence here
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        # Slurm's warning; torch's launcher would leave the workers behind.
        signal.signal(signal.SIGUSR1, lambda _number, _frame: os.kill(os.getpid(), signal.SIGTERM))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    with tempfile.TemporaryDirectory(prefix="fixify-") as folder:
        outcome = Path(folder) / "outcome"
        os.environ[OUTCOME] = str(outcome)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "fixify", *arguments)
        except ChildFailedError as failed:
            if not outcome.exists():
                raise _lost(failed, processes, max_restarts) from None
        except SignalException as stopped:
            if not outcome.exists():
                return 128 + int(stopped.sigval)
        return int(outcome.read_text() or 1) if outcome.exists() else 0


def _lost(failed: Exception, processes: int, max_restarts: int) -> TrainingError:
    rank, failure = failed.get_first_failure()  # type: ignore[attr-defined]
    code = failure.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    again = f", also after {max_restarts} restarts" if max_restarts else ""
    return TrainingError(
        f"Process {rank + 1} of {processes} {how}{again}.",
        hint="A kill often means that memory ran out. Continue with the same command and --resume"
        + ("." if max_restarts else "; --max-restarts 3 does that by itself."),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
