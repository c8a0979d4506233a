"""Going on after torchrun has started all processes again, because one was lost (`--max-restarts`)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fixify.training import distributed
from fixify.training.logging import RUN_FILE


def goes_on(out: Path) -> bool:
    """Whether this is such a restart, and the run in the folder is the one that this launch had begun.

    Another run in the folder is as it would be without the restart: refused, or replaced.
    """
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return distributed.by_first(lambda: again and _launch_of(out) == distributed.launch())


def restarts() -> str:
    """The restarts so far and the most that there may be, "1 of 3"."""
    return f"{os.environ['TORCHELASTIC_RESTART_COUNT']} of {os.environ['TORCHELASTIC_MAX_RESTARTS']}"


def _launch_of(out: Path) -> str | None:
    try:
        found = json.loads((out / RUN_FILE).read_text()).get("launch")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found)
