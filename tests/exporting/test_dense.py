"""Folders for stock timm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fixify
from fixify.errors import ExportError, OutputExistsError

LOAD = """
import sys, timm, torch
from pathlib import Path
folder = Path(sys.argv[1])
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    logits = model(images)
    if (folder / "head.py").exists():
        sys.path.insert(0, str(folder))
        from head import Head
        logits = Head(folder / "head.npz")(logits)
torch.save(logits, sys.argv[2])
assert "fixify" not in sys.modules
"""


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        pytest.param({"head": "binary"}, True, marks=pytest.mark.slow),
        pytest.param({"head": "binary", "bits_per_weight": 2}, True, marks=pytest.mark.slow),
        ({"head": "hadamard"}, False),
    ],
)
def test_timm_alone_loads_it(slims: Callable[..., Path], tmp_path: Path, options: dict, exact: bool) -> None:
    slim = slims(**options)
    (folder,) = fixify.export(slim, tmp_path / "net", to="dense").paths
    assert (folder / "head.py").exists() is not exact
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == (300 if exact else 0)
    assert config["label_names"][7] == "thing 7"
    subprocess.run([sys.executable, "-I", "-c", LOAD, str(folder), str(tmp_path / "logits.pt")], check=True)
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = fixify.load(slim)(images)
    got = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert float((got - expected).abs().max() / expected.std()) < 1e-4


def test_an_exact_copy_opens_as_an_ordinary_checkpoint(slims: Callable[..., Path], tmp_path: Path) -> None:
    (folder,) = fixify.export(slims(head="binary"), tmp_path / "net", to="dense").paths
    again = fixify.convert(folder, tmp_path / "again.fixed.safetensors", head="binary")
    assert again.info.num_classes == 300
    assert again.info.labels is not None


def test_existing_folders_are_kept(slims: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        fixify.export(slims(head="binary"), tmp_path / "net", to="dense")
    fixify.export(slims(head="binary"), tmp_path / "net", to="dense", force=True)
    assert (tmp_path / "net" / "mine").read_text() == "mine"


def test_several_normalising_heads_are_refused(save_slim: Callable[..., Path], tmp_path: Path) -> None:
    slim = save_slim("deit_tiny_distilled_patch16_224", "hadamard", depth=1)
    with pytest.raises(ExportError):
        fixify.export(slim, tmp_path / "net", to="dense")
    assert list(tmp_path.iterdir()) == []
