"""verify runs the model and judges its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from fixify.checkpoints.verify import verify
from fixify.conversion import convert

Tensors = dict[str, torch.Tensor]


def changed(tiny: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """Convert a checkpoint, and change tensors of the slim file."""
    slim = convert(tiny / "learned.pth", folder / "slim.fixed.safetensors").path
    with safetensors.safe_open(slim, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(slim)
    change(tensors)
    safetensors.torch.save_file(tensors, slim, metadata=metadata)
    return slim


def last_of(tensors: Tensors, ending: str) -> torch.Tensor:
    return tensors[[key for key in tensors if key.endswith(ending)][-1]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: last_of(tensors, "scale").fill_(1e9), "float32 cannot tell"),
        (lambda tensors: last_of(tensors, "scale").zero_(), "the same for every image"),
        (lambda tensors: [t.zero_() for k, t in tensors.items() if "conv" in k], "the same for every image"),
        (lambda tensors: last_of(tensors, "scale").fill_(3e38), "not all finite|float32 cannot tell"),
    ],
    ids=["huge", "no scale", "no backbone", "overflow"],
)
def test_logits_that_are_no_answers(tiny: Path, tmp_path: Path, change: Callable[[Tensors], object], said: str) -> None:
    checks = {check.name: check for check in verify(changed(tiny, tmp_path, change))}
    assert not checks["forward"].passed
    assert any(part in checks["forward"].detail for part in said.split("|"))


def test_logits_that_are_answers(tiny: Path, tmp_path: Path) -> None:
    checks = verify(changed(tiny, tmp_path, lambda tensors: None))
    assert all(check.passed for check in checks)
