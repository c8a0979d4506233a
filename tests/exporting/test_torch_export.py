"""Files for torch.export.load: they need nothing of fixify, and hold packed codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tools.some_heads import SPECS, a_head, difference, features_for

import fixify
from fixify.exporting.parts import HeadParts
from fixify.exporting.torch_export import METADATA, PackedHead


@pytest.mark.parametrize("maps", [False, True], ids=["features", "maps"])
@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_head(name: str, maps: bool) -> None:
    head = a_head(SPECS[name], channel_dim=1 if maps else -1)
    features = features_for(SPECS[name], *((2, 3) if maps else ()))
    with torch.no_grad():
        got = PackedHead(HeadParts.of(head))(features).numpy()
        assert difference(got, head(features).numpy()) < 1e-5


def test_a_process_without_fixify_runs_it(slims: Callable[..., Path], tmp_path: Path) -> None:
    slim = slims(head="binary")
    done = fixify.export(slim, tmp_path / "net.pt2", to="torch-export")
    assert done.checks[0].difference < 1e-4
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[1]).module()\n"
        "images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(5))\n"
        "torch.save(program(images).detach(), sys.argv[2]); assert 'fixify' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(done.paths[0]), str(tmp_path / "logits.pt")], check=True)
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = fixify.load(slim)(images)
    got = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert float((got - expected).abs().max() / expected.std()) < 1e-4


def test_the_codes_are_packed_and_the_labels_are_in_the_file(slims: Callable[..., Path], tmp_path: Path) -> None:
    done = fixify.export(slims(head="binary"), tmp_path / "net.pt2", to="torch-export")
    files = {METADATA: ""}
    program = torch.export.load(done.paths[0], extra_files=files)
    assert json.loads(files[METADATA])["fixify"]["labels"][7] == "thing 7"
    codes = [tensor for tensor in program.state_dict.values() if tensor.dtype == torch.uint8 and tensor.dim() == 2]
    assert [tuple(tensor.shape) for tensor in codes] == [(300, 32)]
    assert all(tuple(tensor.shape) != (300, 256) for tensor in program.state_dict.values())
