"""Being one of several processes that torchrun started: the first one speaks, and an error is told once.

Imports no torch: it is asked by every command.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import typer

from fixify.errors import FixifyError, TrainingError, UsageError

OUTCOME = "FIXIFY_OUTCOME"
"""Names the file in which `fixify finetune --nproc-per-node` learns from its workers which exit code an error has."""

_PATIENCE = timedelta(seconds=5)
_silenced: list[tuple[TextIO, TextIO]] = []


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "MASTER_ADDR" in os.environ


def is_rank_zero() -> bool:
    """Whether this process is to print and write what is for all of them; true without torchrun."""
    return not is_worker() or int(os.environ.get("RANK", "0")) == 0


def silence_all_but_first() -> None:
    """What every process would print is printed by the first."""
    if not is_rank_zero():
        _silenced[:] = [(sys.stdout, sys.stderr)]
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def speak() -> None:
    """Undo that, for what only this process knows."""
    if _silenced:
        sys.stdout, sys.stderr = _silenced.pop()


def leave_if_told() -> None:
    """End at once if torchrun restarts the workers because of an error that was told: it would happen again."""
    outcome = os.environ.get(OUTCOME)
    if is_worker() and outcome is not None and Path(outcome).exists():
        sys.exit(0)


def may_tell(error: FixifyError) -> bool:
    """Whether this process is to print an error: not if another one has, or if it is that another one ended."""
    if not is_worker():
        return True
    # As soon as one process has ended torchrun ends the others: not in the middle of telling why.
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
    """By the store of torchrun, which outlives its workers; if that is gone too, nobody else can have told."""
    from torch.distributed import DistError, TCPStore

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return int(store.add(f"fixify/told/{attempt}", 1)) == 1
    except DistError:
        return True


# Starting several processes with torchrun's own launcher.


def hand_over(processes: int | None, max_restarts: int | None) -> None:
    """Let several processes do what the command line says, if it asks for that, and end with their exit code.

    Comes back where it is this process that has to do it: one of them, or the only one.

    Args:
        processes: `--nproc-per-node`.
        max_restarts: `--max-restarts`.

    Raises:
        UsageError: restarts without processes.
        TrainingError: see `launch`.
    """
    if processes is None and max_restarts is not None:
        raise UsageError("--max-restarts is for several processes.", hint="Add --nproc-per-node N.")
    if processes is not None and not is_worker():
        raise typer.Exit(launch(processes, max_restarts or 0, sys.argv[1:]))


def launch(processes: int, max_restarts: int, arguments: Sequence[str]) -> int:
    """Run `fixify` with these arguments in so many processes on this machine, and give back its exit code.

    SIGINT and SIGTERM are passed on, and the processes get half a minute to save their state.

    Args:
        processes: How many.
        max_restarts: How often all of them are started again after one was lost.
        arguments: Of the command line, its program left out.

    Raises:
        TrainingError: a process ended without a word, and so did the restarts.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # torchrun's own account of what is told here in a sentence
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
    again = f", and so it did after {max_restarts} restarts" if max_restarts else ""
    return TrainingError(
        f"Process {rank + 1} of {processes} {how}{again}.",
        hint="A kill often means that memory ran out. Go on with the same command and --resume"
        + ("." if max_restarts else "; with --max-restarts 3 that happens by itself."),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
