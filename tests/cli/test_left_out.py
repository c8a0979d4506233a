"""Every command that opens a file says what it read besides the weights, and what it left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Run = Callable[..., tuple[int, str, str]]
NAMES = ["class0", "class2", "class3", "class1"]


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network inside a wrapper with a temperature and a metric, class names, and other weights."""
    state = torch.load(tiny / "learned.pth", weights_only=True)["state_dict"]
    inner = {f"model.{key}": value for key, value in state.items()}
    inner |= {"temperature": torch.tensor(2.0), "val_acc.correct": torch.tensor(3)}
    path = tmp_path_factory.mktemp("left") / "w.pth"
    torch.save({"state_dict": inner, "class_to_idx": {n: i for i, n in enumerate(NAMES)}, "swa_model": state}, path)
    return path


@pytest.mark.parametrize("command", ["convert", "eval", "predict", "plan", "report", "identify"])
def test_every_command(run: Run, tiny: Path, checkpoint: Path, command: str) -> None:
    more: dict[str, list[object]] = {
        "eval": ["--data", tiny / "data", "--workers", 0, "--device", "cpu"],
        "predict": [tiny / "data/val/class1/0.png"],
    }
    code, _, err = run(command, checkpoint, *more.get(command, []), "--json")
    assert code == 0
    line = next(line for line in err.splitlines() if "Besides the weights" in line)
    assert all(word in line for word in ("class_to_idx", "temperature", "val_acc.correct", "swa_model"))


def test_inspect_and_verify(run: Run, checkpoint: Path) -> None:
    assert run("convert", checkpoint, "-o", "x.fixed.safetensors")[0] == 0
    code, out, _ = run("inspect", "x.fixed.safetensors")
    assert code == 0 and "temperature" in out and "val_acc.correct" in out and "class2" in out
    source = json.loads(run("inspect", "x.fixed.safetensors", "--json")[1])["source"]
    assert "val_acc.correct" in source["left_out"] and len(source["applied"]) == 1
    assert run("verify", "x.fixed.safetensors", "--source", checkpoint)[0] == 0


def test_a_file_of_weights_alone_gets_no_such_line(run: Run, tiny: Path) -> None:
    code, _, err = run("convert", tiny / "learned.pth", "-o", "y.fixed.safetensors")
    assert code == 0 and "Besides" not in err
    source = json.loads(run("inspect", "y.fixed.safetensors", "--json")[1])["source"]
    assert source.keys() == {"name", "sha256", "bytes", "ema"}
