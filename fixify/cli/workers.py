"""Being one of several processes that torchrun started: the first one speaks, and an error is told once.

Imports no torch: it is asked by every command.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from fixify.errors import FixifyError

OUTCOME = "FIXIFY_OUTCOME"
"""Names the file in which `fixify finetune --nproc-per-node` learns from its workers which exit code an error has."""

_PATIENCE = timedelta(seconds=5)
_silenced: list[tuple[TextIO, TextIO]] = []


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "MASTER_ADDR" in os.environ


def is_first() -> bool:
    """Whether this process is to print and write what is for all of them; true without torchrun."""
    return not is_worker() or int(os.environ.get("RANK", "0")) == 0


def silence_all_but_first() -> None:
    """What every process would print is printed by the first."""
    if not is_first():
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
