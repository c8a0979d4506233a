"""Starting several processes with torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import typer

from fixify.cli.workers import OUTCOME, is_worker
from fixify.errors import TrainingError, UsageError


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
