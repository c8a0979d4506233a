"""The files of a run, and what its folder says about how far it came."""

from __future__ import annotations

from pathlib import Path

from fixify.errors import OutputError, OutputExistsError
from fixify.training.logging import LOG_FILES, METRICS_FILE, RUN_FILE
from fixify.training.state import PREVIOUS_STATE_FILE, STATE_FILE

BEST_FILE, LAST_FILE = "best.fixed.safetensors", "last.fixed.safetensors"
_CHECKPOINTS = (BEST_FILE, LAST_FILE, "best.safetensors", "last.safetensors")
_FILES = (*_CHECKPOINTS, STATE_FILE, PREVIOUS_STATE_FILE, *LOG_FILES)


def claim_folder(out: Path, *, force: bool) -> None:
    """Make the folder, or clear what an earlier run left in it: a stale best would pass for this run's.

    Raises:
        OutputExistsError: there is a run, and `force` is not set.
        OutputError: the folder cannot be made or changed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        present = [out / name for name in _FILES if (out / name).exists()]
        if present and not force:
            raise OutputExistsError(
                f"There is a run in {out} already ({present[0].name}).",
                hint="Go on with --resume, choose another folder with -o, or replace it with --force.",
            )
        for path in present:
            path.unlink()
        tidy(out)
    except OSError as error:
        raise OutputError(f"Cannot use the folder {out}: {error.strerror}.") from error


def stored_nothing(out: Path) -> bool:
    """Whether a run was begun in the folder and ended before it stored a state.

    Its options are the first that is written, its metrics come after the first state.
    """
    later = (STATE_FILE, PREVIOUS_STATE_FILE, METRICS_FILE)
    return (out / RUN_FILE).exists() and not any((out / name).exists() for name in later)


def tidy(out: Path) -> None:
    """Remove what a run that was killed while it wrote left half-written.

    Raises:
        OutputError: the folder cannot be changed.
    """
    try:
        for name in _FILES:
            for half_written in out.glob(f".{name}.*.tmp"):
                half_written.unlink()
    except OSError as error:
        raise OutputError(f"Cannot use the folder {out}: {error.strerror}.") from error
