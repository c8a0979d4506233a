"""kill -9 at any moment, --resume, and the weights are those of a run that was never killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("killed_runs.py")


def killed_runs(folder: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    arguments = [sys.executable, str(PROGRAM), str(folder), str(kills), str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_that_is_resumed_ends_bit_for_bit_as_if_it_had_not_been(tmp_path: Path, kills: int) -> None:
    runs = killed_runs(tmp_path, kills, seed=kills)
    assert len(runs) == kills
    assert [run for run in runs if not run["same"]] == []
    inside = [run for run in runs if run["kind"] == "byte"]
    assert all(run["half_written"] for run in inside)
