"""What a tracker that cannot take back a step has to remember: the run's identity, and its last step."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from fixify._io import write_atomic


class Mark:
    """A small file in the run's folder: which run of the tracker this is, and up to where it was logged.

    A run that crashed repeats the steps since its last state exactly, so that what was logged of them stays right, and
    is not logged again.

    Args:
        path: The file.
        resumed: Whether to go on with the run that is in it.
    """

    def __init__(self, path: Path, *, resumed: bool) -> None:
        self.path = path
        stored = _read(path) if resumed else None
        self.is_known = stored is not None
        self.identity, self._last = stored or (secrets.token_hex(4), -1)
        self._logged_before = self._last

    def is_new(self, step: int) -> bool:
        """Whether this step is to be logged; if so it counts as logged."""
        if step <= self._logged_before:
            return False
        if step > self._last:
            self._last = step
            write_atomic(self.path, json.dumps({"id": self.identity, "step": step}) + "\n")
        return True


def _read(path: Path) -> tuple[str, int] | None:
    try:
        stored = json.loads(path.read_text())
        return str(stored["id"]), int(stored["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the run was not tracked before
