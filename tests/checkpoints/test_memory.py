"""Memory while opening, checking and converting a file of 200 MB, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixify.models import build, parse_architecture

# Peak resident memory above what is resident before, as a multiple of the file; one line of JSON for all cases.
PROGRAM = """
import json
import sys
from pathlib import Path
from fixify.conversion import convert
from fixify.checkpoints import check_finite, open_source

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def read(path, mode):
    if mode == "convert":
        convert(path, folder / "out.fixed.safetensors", arch=ARCHITECTURES[path.name.startswith("large")], force=True)
        return
    meta = mode == "meta"
    source = open_source(path, meta=meta)
    if not meta:
        check_finite(source.tensors)

folder, *ARCHITECTURES = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
cases = [(name, mode) for mode in ("meta", "data", "convert") for name in (".safetensors", ".pth")]
cases += [("-legacy.pth", "data"), ("-legacy.pth", "convert")]
peaks = {}
for name, mode in cases:
    path = folder / f"large{name}"
    read(folder / f"small{name}", mode)  # imports, caches
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    read(path, mode)
    peaks[f"{name} {mode}"] = (resident("VmHWM") - before) / path.stat().st_size
print(json.dumps(peaks))
"""


SMALL, LARGE = "timm/resnet10t", "timm/wide_resnet50_2"  # 4.9 and 66.9 M parameters with ten classes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    for name, stem in ((SMALL, "small"), (LARGE, "large")):
        shapes = build(parse_architecture(name), num_classes=10, meta=True).state_dict()
        state = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in shapes.items()}
        safetensors.torch.save_file(state, folder / f"{stem}.safetensors")
        torch.save(state, folder / f"{stem}.pth")
        torch.save(state, folder / f"{stem}-legacy.pth", _use_new_zipfile_serialization=False)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the kernel's count of resident memory")
def test_peak(files: Path) -> None:
    """At most 1.3 times a safetensors file, whose pages are mapped and never copied; 2.2 times a pickle."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(files), SMALL, LARGE],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    peaks = json.loads(done.stdout)
    print(peaks)
    assert peaks[".safetensors meta"] < 0.1 and peaks[".pth meta"] < 0.1
    assert 0.9 < peaks[".safetensors data"] <= 1.3  # every page was looked at, and nothing was copied
    assert 0.9 < peaks[".pth data"] <= 1.3
    assert 0.9 < peaks["-legacy.pth data"] <= 2.2
    assert 0.9 < peaks[".safetensors convert"] <= 1.3
    assert 0.9 < peaks[".pth convert"] <= 1.3
    assert peaks["-legacy.pth convert"] <= 2.2  # it may find the memory of the case before
