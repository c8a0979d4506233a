"""Slim checkpoints to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fixify
from fixify._packages import require_onnx
from fixify.errors import UsageError
from fixify.exporting.job import Exported

try:
    require_onnx("This test")
except UsageError:
    collect_ignore = ["test_heads.py", "test_onnx_export.py"]  # test_packages.py says so


@pytest.fixture(scope="session")
def slims(small_pth: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Options of convert -> a slim checkpoint of timm's test_efficientnet, 300 classes; made once for each."""
    folder = tmp_path_factory.mktemp("slims")
    made: dict[str, Path] = {}

    def slim(**options: Any) -> Path:
        name = str(sorted(options.items()))
        if name not in made:
            out = folder / f"net{len(made)}.fixed.safetensors"
            labels = folder / "labels.txt"
            labels.write_text("".join(f"thing {number}\n" for number in range(300)))
            options = {"arch": "test_efficientnet", "labels": str(labels), **options}
            made[name] = fixify.convert(small_pth, out, **options).path
        return made[name]

    return slim


@pytest.fixture(scope="session")
def exported(slims: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """A kind of head and options of export -> the ONNX file of `slims`, to be read only; made once for each."""
    folder = tmp_path_factory.mktemp("exported")
    made: dict[str, Exported] = {}

    def export(head: str, **options: Any) -> Exported:
        name = str((head, sorted(options.items())))
        if name not in made:
            made[name] = fixify.export(slims(head=head), folder / f"net{len(made)}.onnx", **options)
        return made[name]

    return export


@pytest.fixture(scope="session")
def save_slim(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The name of a timm architecture -> a slim checkpoint of it, with random weights."""
    folder = tmp_path_factory.mktemp("saved")

    def save(name: str, head: str = "auto", num_classes: int = 12, **arguments: Any) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=num_classes, **arguments).eval()
        fixify.fix_classifier_(model, head)
        spelled = ",".join([name, *(f"{key}={value}" for key, value in arguments.items())])
        return fixify.save(model, folder / f"{name}.{head}.fixed.safetensors", arch=spelled, force=True)

    return save


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 6 images of various sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (50 + 20 * number, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((120, 100)).save(folder / f"{number}.png")
    return folder
