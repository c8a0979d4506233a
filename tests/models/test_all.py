"""Every architecture, with the scripts in tests/benchmarks: a sample by default, all of them among the slow tests."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fixify

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# One architecture for each kind of classifier (a 1x1 convolution, BatchNorm + Linear twice, a list, a pair of lists),
# and one whose state dict needs its module versions.
SAMPLE = [
    *("timm/dla46_c", "timm/levit_128s", "timm/crossvit_9_240", "timm/efficientvim_m1_dist"),
    *("torchvision/squeezenet1_1", "torchvision/mnasnet0_5"),
]


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The modules of tests/benchmarks, which import each other by their bare names."""
    names = ("architecture_variants", "second_process", "roundtrip_all")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in names:
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore")  # the builders' advice about their own arguments
@pytest.mark.parametrize("ref", SAMPLE)
def test_a_converted_file_gives_the_features_and_logits_of_the_model(scripts: Any, ref: str, tmp_path: Path) -> None:
    def read(slim: Path, pixels: int, seed: int) -> dict[str, Any]:
        model: Any = fixify.load(slim)
        with torch.inference_mode():
            seen = scripts.second_process.observe(
                model, scripts.architecture_variants.images(model.fixify_info.architecture, pixels, seed)
            )
        return {**seen, "seconds": 0}

    ((_, arch),) = scripts.architecture_variants.wanted([ref])
    row = scripts.roundtrip_all.round_trip(arch, tmp_path, SimpleNamespace(read=read))
    assert row["exact"] and row["removed"] > 0 and row["spread"] > 0


def _run(script: str, log: Path) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--log", str(log)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_all_convert_and_load_in_another_process(tmp_path: Path) -> None:
    """Over an hour on one core."""
    rows = _run("roundtrip_all.py", tmp_path / "log")
    assert all(row["ok"] and row["exact"] for row in rows), [row["arch"] for row in rows if not row.get("exact")]
    names = {row["arch"].partition(",")[0] for row in rows if not row["encoder"]}
    assert len(names) >= 1229 - 3 + 80


@pytest.mark.slow
def test_all_are_identified(tmp_path: Path) -> None:
    """With 37 and with 5,000 classes, by names and by shapes: a quarter of an hour."""
    rows = _run("identify_all.py", tmp_path / "log")
    assert {row["outcome"] for row in rows} == {"unique", "tie"}
