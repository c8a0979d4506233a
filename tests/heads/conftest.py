"""Helpers that the tests of several modules share, as fixtures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tensor]:
    """Seeded standard normal numbers of a shape; the same ones every time."""

    def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    return drawn


@pytest.fixture(scope="session")
def timm_widths() -> list[int]:
    """All feature widths of timm's models."""
    widths: list[int] = json.loads((HERE / "timm_widths.json").read_text())["widths"]
    return widths
