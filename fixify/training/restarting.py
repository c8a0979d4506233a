"""Going on after torchrun has started all processes again, because one was lost (`--max-restarts`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fixify.training import distributed
from fixify.training.events import Listener, Warned
from fixify.training.logging import RUN_FILE
from fixify.training.options import FinetuneOptions


@contextmanager
def joined(options: FinetuneOptions, out: Path, on_event: Listener | None) -> Iterator[bool]:
    """Within the block the processes that torchrun started are connected; gives whether the run in `out` goes on after
    such a restart, and says so.
    """
    with distributed.process_group(options.resolved_device()):
        again = goes_on(out)
        if again and on_event is not None:
            count, most = (os.environ[f"TORCHELASTIC_{name}"] for name in ("RESTART_COUNT", "MAX_RESTARTS"))
            on_event(Warned(f"A process was lost; all were started again ({count} of {most} times)."))
        yield again


def goes_on(out: Path) -> bool:
    """Whether this is such a restart, and the run in the folder is the one that this launch had begun.

    Another run in the folder is as it would be without the restart: refused, or replaced.
    """
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return distributed.by_first(lambda: again and _launch_of(out) == distributed.launch())


def _launch_of(out: Path) -> str | None:
    try:
        found = json.loads((out / RUN_FILE).read_text()).get("launch")
    except (OSError, ValueError, AttributeError):
        return None
    return str(found)
