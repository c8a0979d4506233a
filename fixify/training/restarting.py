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
    return distributed.by_first(lambda: is_restart() and _launch_of(out) == distributed.launch())


def is_restart() -> bool:
    """Whether torchrun has started these processes before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _launch_of(out: Path) -> str | None:
    try:
        found = json.loads((out / RUN_FILE).read_text()).get("launch")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found)
