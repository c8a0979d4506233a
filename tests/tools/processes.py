"""Run a file in several processes that meet."""

from __future__ import annotations

import multiprocessing
import runpy
from collections.abc import Sequence
from functools import partial


def run_together(file: str, given: Sequence[tuple[object, ...]]) -> None:
    """Start a file once for each entry, as `__main__` with the entry as GIVEN, and wait until all have ended well."""
    start = partial(multiprocessing.get_context("spawn").Process, target=runpy.run_path)
    processes = [start(args=(file, {"GIVEN": each}, "__main__")) for each in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(given)
