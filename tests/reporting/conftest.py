"""Folders of runs, written as training writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixify.metrics import Metrics, count_confusions
from fixify.training import EpochRecord, FinetuneOptions
from fixify.training.run_folder import StepRecord, is_logged, write_confusions, write_logs, write_run

HOSTILE = "<script>hacked = 1</script>\"'&amp;"
CLASSES = [HOSTILE, "x" * 200, "Ζεβρα", *(f"class {number}" for number in range(9))]
STEPS_AN_EPOCH = 200
SAVINGS = {
    "parameters_before": 1_000_000,
    "parameters_after": 488_013,
    "classifier_parameters": 512_012,
    "removed": 512_000,
    "bytes_before": 4_000_000,
    "bytes_after": 1_952_052,
    "classifier_bytes_before": 2_048_048,
    "classifier_bytes_after": 100,
}


def write_folder(
    folder: Path, *, fixed: bool, epochs: int = 3, done: int | None = None, num_classes: int = 12, **started: Any
) -> Path:
    """A run whose accuracy rises from 50 % towards 90 % (fixed) or 91 % (learned)."""
    folder.mkdir(parents=True)
    options = FinetuneOptions.create(epochs=epochs, lr=0.05 if fixed else 0.02)
    names = CLASSES[:num_classes] + [f"class {number}" for number in range(9, 9 + num_classes - len(CLASSES))]
    facts = {"data": "stripes", "class_names": names, "train_images": 12_800, "val_images": 600}
    model = {
        "architecture": "timm/resnet18",
        "head": "hadamard" if fixed else "learned",
        "num_features": 512,
        "num_classes": num_classes,
        "parameters": 488_013 if fixed else 1_000_000,
        "bytes": 1_952_052 if fixed else 4_000_000,
        "classifier_parameters": 13 if fixed else 512_012,
        "classifier_bytes": 100 if fixed else 2_048_048,
        **({"savings": SAVINGS} if fixed else {}),
    }
    before = Metrics(50.0 if fixed else 88.0, 80.0, 2.0, 5.0, 600, 1.0).to_dict()
    command = "fixify finetune net.fixed.safetensors --data 'my data' --epochs 3"
    write_run(
        folder, options, facts, {"command": command, "model": model, "before": before, "device": "cpu", **started}, {}
    )
    history, steps = [], []
    for epoch in range(epochs if done is None else done):
        top1 = (90.0 if fixed else 91.0) - 20 / 2**epoch
        values = {"val_top1": top1, "val_top5": 97.0, "val_loss": 1 / (epoch + 1), "val_ece": 2.0, "lr": 0.01}
        values |= {"train_loss": 1.5 / (epoch + 1), "train_top1": 60.0, "images_per_second": 1000.0, "seconds": 10.0}
        step = (epoch + 1) * STEPS_AN_EPOCH
        history.append(EpochRecord(epoch=epoch, step=step, scale=10.0 + epoch if fixed else None, **values))
        steps += [
            StepRecord(s, s / STEPS_AN_EPOCH, 3 / (1 + math.log10(s)), 0.05, 10 + math.log10(s) if fixed else None)
            for s in range(epoch * STEPS_AN_EPOCH + 1, step + 1)
            if is_logged(s)
        ]
    write_logs(folder, history, steps)
    if history:
        rng = np.random.default_rng(fixed)
        labels = np.arange(50 * num_classes) % num_classes
        wrong = rng.random(len(labels)) < (labels % 12 + 1) / 20
        guesses = np.where(wrong, (labels + rng.integers(1, 4, len(labels))) % num_classes, labels)
        write_confusions(folder, history[-1].step, count_confusions(np.stack([labels, guesses]), num_classes))
    return folder


@pytest.fixture(scope="session")
def write_run_folder() -> Callable[..., Path]:
    """Writes a run: write_run_folder(folder, fixed=True, epochs=3, done=None, num_classes=12, **more of run.json)."""
    return write_folder


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    """A folder with a run of a fixed head and one of a learned one."""
    write_folder(tmp_path / "runs" / "fixed", fixed=True)
    write_folder(tmp_path / "runs" / "learned", fixed=False)
    return tmp_path / "runs"
