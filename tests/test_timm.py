"""timm knows slim checkpoints after `import fixify`, in either order, and its own scripts run on one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import fixify
from fixify.checkpoints.in_timm import ARCHITECTURE

CHECKS = """
import sys
{first}
assert ("timm" in sys.modules) is {imported}
{second}
import timm, timm.models
from importlib.machinery import SourceFileLoader
assert timm.is_model("fixify_slim")
assert type(timm.models.__loader__) is SourceFileLoader and "exec_module" not in vars(timm.models.__loader__)
assert not [finder for finder in sys.meta_path if "fixify" in type(finder).__module__]
import importlib
import warnings
warnings.simplefilter("error")
importlib.reload(fixify)
assert "torchvision" in sys.modules or "fixify.models" not in sys.modules
"""


@pytest.mark.parametrize(
    ("first", "imported", "second"),
    [
        ("import fixify", False, "import importlib.util; importlib.util.find_spec('timm.models')"),
        ("import timm", True, "import fixify"),
        pytest.param(
            "import fixify, fixify.errors", False, "from timm.models import create_model", marks=pytest.mark.slow
        ),
    ],
)
def test_either_order_of_imports(first: str, imported: bool, second: str) -> None:
    """Real processes: an import happens once in each."""
    program = CHECKS.format(first=first, imported=imported, second=second)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_no_architecture_of_fixify() -> None:
    from fixify.models import list_architectures

    assert ARCHITECTURE in timm.list_models()
    assert not [name for name in list_architectures() if "fixify_slim" in name]
    with pytest.raises(fixify.FixifyError):
        timm.create_model("fixify_slim")


def scripts() -> Path:
    """The folder with timm's scripts, which its wheel leaves out: TIMM_SCRIPTS, or a clone beside this one."""
    for folder in filter(None, [os.environ.get("TIMM_SCRIPTS"), Path(__file__).parents[2] / "pytorch-image-models"]):
        if (Path(folder) / "validate.py").exists() and (Path(folder) / "inference.py").exists():
            return Path(folder)
    pytest.skip(
        "timm's validate.py and inference.py are not here: git clone https://github.com/huggingface/"
        "pytorch-image-models, and set TIMM_SCRIPTS to that folder"
    )


# The script as it is, after `import fixify`. Its own folder is not put on the path: it holds another timm.
RUNNER = "import fixify, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run_script(name: str, *arguments: object, cwd: Path) -> None:
    command = [sys.executable, "-c", RUNNER, str(scripts() / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.network
def test_timms_own_scripts(digits: Path, tmp_path: Path) -> None:
    """validate.py and inference.py of timm's repository say what `fixify eval` and `fixify predict` say."""
    scripts()
    pytest.importorskip("pandas")  # inference.py imports it
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10, pretrained=False)
    fixify.fix_classifier_(model, "binary")
    fixify.save(model, tmp_path / "net.fixed.safetensors", labels=[f"digit {digit}" for digit in range(10)])
    name = fixify.push(f"local-dir:{tmp_path / 'net'}", tmp_path / "net.fixed.safetensors").name
    common = ("--model", name, "--pretrained", "--device", "cpu", "--workers", "1", "--batch-size", "16")
    out = ("--results-file", tmp_path / "validated.json", "--results-format", "json")
    run_script("validate.py", "--data-dir", digits / "val", *common, *out, cwd=tmp_path)
    found = json.loads((tmp_path / "validated.json").read_text())
    ours = fixify.evaluate(tmp_path / "net.fixed.safetensors", str(digits), workers=0, device="cpu").metrics
    assert 0 < ours.top1 < 100
    assert (found["top1"], found["top5"]) == (pytest.approx(ours.top1, abs=1e-3), pytest.approx(ours.top5, abs=1e-3))

    out = ("--results-dir", tmp_path, "--results-file", "answers.csv", "--label-type", "name", "--fullname")
    run_script("inference.py", "--data-dir", digits / "val", *common, *out, cwd=tmp_path)
    with open(tmp_path / "answers.csv") as rows:
        answers = [(row["label"], Path(row["filename"]).parent.name) for row in csv.DictReader(rows)]
    assert len(answers) == 60
    right = sum(label == f"digit {folder}" for label, folder in answers)
    assert 100 * right / len(answers) == pytest.approx(ours.top1, abs=1e-3)
