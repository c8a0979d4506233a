"""Running fixify as a person does, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fixify
from fixify._packages import require_onnx
from fixify.cli.app import main
from fixify.errors import UsageError

try:
    require_onnx("This test")
except UsageError:
    collect_ignore = ["test_export.py"]  # tests/exporting/test_packages.py says so


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run fixify in an empty folder, 80 columns wide: arguments -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FIXIFY_DATA", raising=False)

    def run_once(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fixify", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_once


@pytest.fixture(scope="session")
def make_stripes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Numbers of training and validation images -> a folder with data/train/ and data/val/ of 4 classes, learned.pth
    and net.fixed.safetensors, a network for them.
    """

    def make(num_train: int, num_val: int) -> Path:
        folder = tmp_path_factory.mktemp("stripes")
        rng = np.random.default_rng(0)
        for split, images in (("train", num_train), ("val", num_val)):
            for number in range(images):
                label = number % 4
                pixels = rng.integers(0, 120, (32, 32), dtype=np.uint8)
                pixels[8 * label : 8 * label + 8] += 100
                path = folder / "data" / split / f"stripe{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model("test_efficientnet", in_chans=1, num_classes=4)
        torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, folder / "learned.pth")
        fixify.convert(folder / "learned.pth", folder / "net.fixed.safetensors")
        return folder

    return make
