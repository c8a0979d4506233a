"""Streams that cannot be written: a full disk, a terminal that is gone, closed streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["recipes", "ls"]])
def test_a_full_disk_is_one_sentence(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fixify", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_without_any_stream_the_exit_code_tells() -> None:
    command = f"{sys.executable} -m fixify"
    for arguments, code in (("recipes ls >/dev/full 2>/dev/full", 1), ("recipes show no-such 2>/dev/full", 2)):
        assert subprocess.run(["sh", "-c", f"{command} {arguments}"]).returncode in (code, 1)
    assert subprocess.run(["sh", "-c", f"{command} --version >&-"]).returncode == 0
