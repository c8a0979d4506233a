"""A tiny data set and a tiny network that train in a second."""

from __future__ import annotations

import multiprocessing
import pickle
import runpy
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fixify.data import OpenedData
from fixify.data.idx import ArrayImages
from fixify.heads import HeadSpec
from fixify.surgery import fix_classifier_
from fixify.training import FinetuneOptions, train_model

NUM_CLASSES = 4
PREPROCESSING = {
    "input_size": (1, 16, 16),
    "mean": (0.4,),
    "std": (0.25,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def _stripes(num_images: int, seed: int, split: str) -> OpenedData:
    """Gray 20x20 images whose class is the place of a bright stripe, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % NUM_CLASSES
    pixels = rng.integers(0, 120, (num_images, 20, 20), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[5 * label : 5 * label + 5] += 100
    names = tuple(f"stripe{i}" for i in range(NUM_CLASSES))
    images = ArrayImages(pixels, labels)
    return OpenedData(images, names, "memory", f"{num_images} stripes", "stripes", split)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def stripes() -> tuple[OpenedData, OpenedData]:
    """44 training and 20 validation images of 4 classes."""
    return _stripes(44, 0, "train"), _stripes(20, 1, "val")


@pytest.fixture(scope="session")
def preprocessing() -> dict[str, Any]:
    return PREPROCESSING


class Small(nn.Module):
    """Two convolutions with batch norm (or group norm), average pooling, dropout, a classifier."""

    def __init__(self, *, batch_norm: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else partial(nn.GroupNorm, 4)
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, bias=False),
            norm(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            norm(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d((2, 1)),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.fc = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(images))
        return logits


def make_model(*, fixed: bool = True, standardize: bool = True, **given: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small(**given)
    if fixed:
        fix_classifier_(model, HeadSpec("hadamard", 32, NUM_CLASSES, standardize=standardize))
    return model


@pytest.fixture(scope="session")
def new_model() -> Callable[..., nn.Module]:
    """Makes that network, always with the same weights."""
    return make_model


def save_weights_(model: nn.Module, path: Path, record: dict[str, Any]) -> None:
    torch.save({"weights": model.state_dict(), "record": record}, path)


@pytest.fixture(scope="session")
def save_weights() -> Callable[[nn.Module, Path, dict[str, Any]], None]:
    """Stands for `fixify.checkpoints.slim.save` where the model is no slim checkpoint."""
    return save_weights_


class Runs:
    """Starts runs of the tiny network."""

    def __init__(self, model: Any, data: Any, preprocessing: Any, save: Any) -> None:
        self.model, self.data, self.preprocessing, self.save = model, data, preprocessing, save

    def __call__(self, out: Path, options: FinetuneOptions, model: nn.Module | None = None, **given: Any) -> Any:
        train, val = self.data
        model = self.model() if model is None else model
        given = {"train": train, "val": val, "save": self.save, **given}
        return train_model(model, preprocessing=self.preprocessing, options=options, out=out, **given)


@pytest.fixture(scope="session")
def run(new_model: Any, stripes: Any, preprocessing: Any, save_weights: Any) -> Runs:
    """Starts a run in a folder: run(out, options, model=None, **what `finetune` takes)."""
    return Runs(new_model, stripes, preprocessing, save_weights)


class Several:
    """Runs of the tiny network in several processes, which one process that has imported torch forks."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "timm", "fixify.training", "numpy", "pytest"])

    def __call__(
        self, out: Path, processes: int, *, val_images: int = 20, model: Any = None, given: Any = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Each process's answer: what came of the run, the events that it was told, its weights."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            arguments = {
                "environment": {
                    **{name: str(value) for name, value in place.items()},
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                "options": {"workers": 0, "device": "cpu", **options},
                "model": model or {},
                "val_images": val_images,
                "given": given or {},
                "out": str(out),
                "answer": str(out.with_suffix(f".{rank}")),
            }
            worker = str(Path(__file__).with_name("several.py"))
            process = self.context.Process(
                target=runpy.run_path, args=(worker, {"ARGUMENTS": arguments}, "__main__"), daemon=True
            )
            process.start()
            started.append((process, Path(arguments["answer"])))
        for process, _ in started:
            process.join(120)
            assert process.exitcode == 0
        return [pickle.loads(answer.read_bytes()) for _, answer in started]


@pytest.fixture(scope="session")
def several() -> Several:
    """Starts a run in several processes: several(out, processes, **options)."""
    return Several()
