from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from fixify.checkpoints.open import open_model
from fixify.data import OpenedData
from fixify.errors import DataError, UsageError
from fixify.training import FinetuneOptions
from fixify.training.teacher import open_reference, reference_digest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of a small network for gray images."""

    def write(name: str = "net.pth", num_classes: int = 4, arch: str = "test_efficientnet", **given: Any) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(arch, in_chans=1, num_classes=num_classes)
        torch.save({"arch": arch, "state_dict": model.state_dict(), **given}, tmp_path / name)
        return tmp_path / name

    return write


def test_a_file_is_known_by_its_bytes_and_a_name_by_its_weights(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint()
    opened = open_model(path)
    assert reference_digest(path, opened) == hashlib.sha256(path.read_bytes()).hexdigest()
    by_name = reference_digest("some_model", opened)
    assert len(by_name) == 64 and by_name == reference_digest(
        "another_name", open_model(checkpoint("copy.pth", epoch=3))
    )
    with torch.no_grad():
        next(opened.model.parameters()).view(-1)[0] += 1e-6
    assert reference_digest("some_model", opened) != by_name


def test_it_is_opened_for_the_images_of_the_run(
    checkpoint: Callable[..., Path], stripes: tuple[OpenedData, OpenedData]
) -> None:
    options = FinetuneOptions.create(img_size=48, crop_pct=0.9)
    other = open_reference(checkpoint(), stripes[1], options)
    assert other.name == "net.pth"
    assert (list(other.preprocessing["input_size"]), other.preprocessing["crop_pct"]) == ([1, 48, 48], 0.9)
    with pytest.raises(DataError, match=r"five\.pth .*5 .*4"):
        open_reference(checkpoint("five.pth", num_classes=5), stripes[1], options)
    with pytest.raises(UsageError, match="50 x 50"):
        open_reference(checkpoint("vit.pth", arch="test_vit"), stripes[1], options.replace(img_size=50))
