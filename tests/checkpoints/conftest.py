"""A small state dict, and a payload that proves that a pickle ran code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch


@pytest.fixture(scope="session")
def resnet_state() -> dict[str, torch.Tensor]:
    """The state dict of timm's test_resnet with 10 classes; values from a generator of its own."""
    model = timm.create_model("test_resnet", num_classes=10)
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value.clone()
        for key, value in model.state_dict().items()
    }


class Payload:
    """An object whose unpickling creates a file, as proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.fixture
def payload(tmp_path: Path) -> Any:
    """An object whose unpickling runs a command. After the test, the command must not have run."""
    bomb = Payload(tmp_path / "code-ran")
    yield bomb
    assert not bomb.proof.exists(), "a pickle ran code"
