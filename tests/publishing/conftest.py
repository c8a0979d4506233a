"""A stand-in for the Hugging Face hub, and a slim checkpoint to publish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import torch
from tools.stand_in_hub import WRITER, StandInHub, running_hub

import fixify


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A hub of our own, an empty cache, and a token that may write."""
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server


@pytest.fixture(scope="session")
def slim(small_pth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slim checkpoint of timm's test_efficientnet, 300 classes with labels; read-only."""
    folder = tmp_path_factory.mktemp("slim")
    (folder / "labels.txt").write_text("".join(f"thing {number}\n" for number in range(300)))
    out = folder / "net.fixed.safetensors"
    return fixify.convert(small_pth, out, arch="test_efficientnet", labels=str(folder / "labels.txt")).path


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Four random images for the checkpoint."""
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
