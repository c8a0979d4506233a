"""Finding the slim checkpoint that a command means when none is named."""

from __future__ import annotations

from pathlib import Path

from fixify.errors import UsageError

_PATTERN = "*.fixed.safetensors"


def slim_files_here(command: str) -> list[str]:
    """Names of the slim checkpoints in the current folder, sorted.

    Raises:
        UsageError: there is none.
    """
    found = sorted(str(path) for path in Path().glob(_PATTERN))
    if not found:
        raise UsageError(
            f"No file was named, and there is no {_PATTERN} in {Path.cwd()}.",
            hint=f"fixify {command} FILE, or make one: fixify convert model.pth",
        )
    return found


def the_slim_file_here(command: str) -> str:
    """The one slim checkpoint in the current folder.

    Raises:
        UsageError: there is none, or there are several; the message lists them.
    """
    found = slim_files_here(command)
    if len(found) > 1:
        raise UsageError(
            f"There are {len(found)} slim checkpoints here: {', '.join(found)}.",
            hint=f"Say which: fixify {command} {found[0]}",
        )
    return found[0]
