"""The same command writes the same bytes, in whichever process, and however many threads it has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fixify
from fixify._files import sha256_of
from fixify.training import FinetuneOptions

_CONVERT = """
import sys
import fixify
for number, head in enumerate(("hadamard", "orthogonal")):
    fixify.convert(sys.argv[1], f"{sys.argv[2]}/{number}.fixed.safetensors", head=head, seed=3)
"""


@pytest.mark.slow
def test_converting_in_other_processes(tiny: Path, tmp_path: Path) -> None:
    found = []
    for number, threads in ((1, 1), (2, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", _CONVERT, str(tiny / "learned.pth"), str(folder)]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        found.append([sha256_of(path) for path in sorted(folder.iterdir())])
    assert found[0] == found[1] and len(set(found[0])) == 2


def test_saving_what_was_loaded(tiny: Path, tmp_path: Path) -> None:
    first = fixify.convert(tiny / "learned.pth", tmp_path / "a.fixed.safetensors").path
    again = fixify.save(fixify.load(first), tmp_path / "b.fixed.safetensors")
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", ["best", "last"])
def test_equal_runs(tiny: Path, tmp_path: Path, name: str) -> None:
    slim = fixify.convert(tiny / "learned.pth", tmp_path / "a.fixed.safetensors").path
    options = FinetuneOptions(epochs=1, workers=0, batch_size=4, device="cpu", seed=1)
    digests = set()
    for number in range(2):
        out = tmp_path / f"run{number}"
        fixify.finetune(slim, str(tiny / "data"), out, options)
        digests.add(sha256_of(out / f"{name}.fixed.safetensors"))
    assert len(digests) == 1
