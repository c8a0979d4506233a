"""What only a real process shows: its streams and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def fixify(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fixify", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_results_on_stdout_and_the_rest_on_stderr(small_pth: Path, tmp_path: Path) -> None:
    done = fixify(
        tmp_path,
        "convert",
        small_pth,
        "--arch",
        "test_efficientnet",
        "--head",
        "binary",
        "--bits-per-class",
        44,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "small.fixed.safetensors"
    assert "44" in done.stderr and "small.fixed.safetensors" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_an_error_is_on_stderr_and_in_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("convert:\n  hed: auto\n")
    done = fixify(tmp_path, "convert", "any.pth", "--recipe", "wrong.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "line 2" in done.stderr and "'head'" in done.stderr
