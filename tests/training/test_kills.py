"""kill -9 at any moment, --resume, and the weights are those of a run that was never killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_that_is_resumed_ends_bit_for_bit_as_if_it_had_not_been(
    processes: Any, tmp_path: Path, kills: int
) -> None:
    process = processes.start("killed_runs.py", folder=tmp_path, kills=kills, seed=kills)
    process.join()
    assert process.exitcode == 0
    runs = [json.loads(line) for line in (tmp_path / "answer.jsonl").read_text().splitlines()]
    assert len(runs) == kills
    assert [run for run in runs if not run["same"]] == []
    inside = [run for run in runs if run["kind"] == "byte"]
    assert inside and all(run["half_written"] for run in inside)
