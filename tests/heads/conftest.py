"""Helpers that the tests of several modules share, as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fixify.heads import kinds


@pytest.fixture(autouse=True)
def _whole_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search as many codes as `convert` does."""
    monkeypatch.setattr(kinds, "SEARCH_BLOCKS", 4096)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tensor]:
    """Seeded standard normal numbers of a shape; the same ones every time."""

    def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn_in = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=drawn_in).to(dtype)

    return drawn
