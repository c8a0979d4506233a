"""The files of a run."""

from __future__ import annotations

from pathlib import Path

from fixify.errors import OutputError, OutputExistsError
from fixify.training.logging import LOG_FILES
from fixify.training.resume import STATE_FILE

BEST_FILE, LAST_FILE = "best.fixed.safetensors", "last.fixed.safetensors"


def claim_folder(out: Path, *, force: bool) -> None:
    """Make the folder, or clear what an earlier run left in it: a stale best would pass for this run's.

    Raises:
        OutputExistsError: there is a run, and `force` is not set.
        OutputError: the folder cannot be made or changed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        present = [out / name for name in (BEST_FILE, LAST_FILE, STATE_FILE, *LOG_FILES) if (out / name).exists()]
        if present and not force:
            raise OutputExistsError(
                f"There is a run in {out} already ({present[0].name}).",
                hint="Go on with --resume, choose another folder with -o, or replace it with --force.",
            )
        for path in present:
            path.unlink()
    except OSError as error:
        raise OutputError(f"Cannot use the folder {out}: {error.strerror}.") from error
