"""The command that is running, as it was typed."""

from __future__ import annotations

import os
import shlex
import sys

from fixify.cli.workers import OUTCOME


def as_typed() -> str:
    """A shell line that starts the same again, in the same folder; under torchrun with its processes and nodes."""
    start = ["fixify"]
    if "TORCHELASTIC_RUN_ID" in os.environ and OUTCOME not in os.environ:
        nodes, processes = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        start = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={processes}", "-m", "fixify"]
    return shlex.join([*start, *sys.argv[1:]])
