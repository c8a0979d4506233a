"""Every architecture, by the scripts in tests/benchmarks: some of them here, all of them if asked for slow tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Some kinds of classifier: a 1x1 convolution, BatchNorm + Linear twice, a list, a pair of lists; and one that is loaded
# in its own way.
SAMPLE = [
    *("timm/dla46_c", "timm/levit_128s", "timm/crossvit_9_240", "timm/efficientvim_m1_dist"),
    *("torchvision/squeezenet1_1", "torchvision/mnasnet0_5"),
]


def _run(script: str, log: Path, *arguments: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--log", str(log), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


def _check(rows: list[dict]) -> None:
    assert all(row["ok"] and row["exact"] for row in rows), [row["arch"] for row in rows if not row.get("exact")]


def test_sample_converts_and_loads_in_another_process(tmp_path: Path) -> None:
    rows = _run("roundtrip_all.py", tmp_path / "log", "--only", *SAMPLE)
    assert {row["arch"].partition(",")[0] for row in rows} == set(SAMPLE)
    _check(rows)


@pytest.mark.slow
def test_all_convert_and_load_in_another_process(tmp_path: Path) -> None:
    """Over an hour on one core."""
    rows = _run("roundtrip_all.py", tmp_path / "log")
    _check(rows)
    names = {row["arch"].partition(",")[0] for row in rows if not row["encoder"]}
    assert len(names) >= 1229 - 3 + 80


@pytest.mark.slow
def test_all_are_identified(tmp_path: Path) -> None:
    """With 37 and with 5,000 classes, by names and by shapes: a quarter of an hour."""
    rows = _run("identify_all.py", tmp_path / "log")
    assert {row["outcome"] for row in rows} == {"unique", "tie"}
    assert max(row["seconds"] for row in rows) < 2
