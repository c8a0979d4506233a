"""Data of a single image, and a class of a single image, in every command that takes data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

Run = Callable[..., tuple[int, str, str]]
HERE = ("--device", "cpu", "-j", 0)
TRAIN = {"model": "test_resnet", "img_size": 32, "epochs": 1, "batch_size": 4, "no_aug": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make `single` (one class, one image), `uneven` (classes of one image and of three), model.pth of two classes."""
    rng = np.random.default_rng(0)
    for name, counts in (("single", {"a": 1}), ("uneven", {"a": 1, "b": 3})):
        for split in ("train", "val"):
            for label, count in counts.items():
                place = tmp_path / name / split / label
                place.mkdir(parents=True)
                for number in range(count):
                    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": name, "train": TRAIN}))
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "model.pth")
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_a_class_of_one_image(run: Run) -> None:
    code, _, err = run("convert", "model.pth", "--head", "binary")
    assert code == 0, err
    slim = "model.fixed.safetensors"
    for command in (
        ("eval", "model.pth", "--data", "uneven", "-j", 0),
        ("finetune", slim, "--data", "uneven", "--epochs", 1, "-o", "run", *HERE),
        ("finetune", slim, "--data", "uneven", "--epochs", 1, "-b", 1, "-o", "alone", *HERE),
        ("train", "uneven.yaml", *HERE),
        ("predict", slim, "uneven/val/a/0.png"),
    ):
        code, _, err = run(*command)
        assert code == 0, (command, err)
    # At 32 pixels the last batch norm of test_resnet sees one value per channel and image.
    code, _, err = run("train", "uneven.yaml", "--set", "train.batch_size=1", "-o", "batches-of-one", *HERE)
    assert code == 2 and "train.batch_size=8" in err
    code, _, err = run("convert", "model.pth", "--calibrate", "uneven", "--force")
    assert code == 1 and "4 images" in err and "at least 8" in err


@pytest.mark.usefixtures("folder")
def test_one_class_of_one_image(run: Run) -> None:
    code, _, err = run("convert", "model.pth")
    assert code == 0, err
    slim = "model.fixed.safetensors"
    for command, said in (
        (("eval", "model.pth", "--data", "single", "-j", 0), "2 classes"),
        (("finetune", slim, "--data", "single", "--epochs", 1, *HERE), "2 classes"),
        (("convert", "model.pth", "--calibrate", "single", "--force"), "1 image;"),
        (("convert", "model.pth", "--calibrate", "single/train", "--force"), "1 image;"),
        (("train", "single.yaml", *HERE), "one class, 'a'"),
        (("train", "single.yaml", "--set", "train.head=learned", *HERE), "one class, 'a'"),
    ):
        code, _, err = run(*command)
        assert code == 1 and said in " ".join(err.split()), (command, err)
        assert "--num-classes 1" not in err
    code, _, err = run("predict", slim, "single/val/a/0.png")
    assert code == 0, err
