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
from fixify.training import Event, FinetuneOptions, OpenedInputs, ReferenceModel, RunOutput, Step, train_model

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


def make_model(
    *, fixed: bool = True, standardize: bool = True, kind: str = "hadamard", signs: int = 0, **given: Any
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small(**given)
    if signs:
        fix_classifier_(model, "binary", bits_per_class=signs)
    elif fixed:
        fix_classifier_(model, HeadSpec(kind, 32, NUM_CLASSES, standardize=standardize))
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


class Stop(Exception):
    """Stands for a crash."""


@pytest.fixture(scope="session")
def crash_at() -> Callable[..., Any]:
    """Makes a listener that crashes at a step: crash_at(epoch, batch)."""

    def make(epoch: int, batch: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, Step) and (event.epoch, event.batch) == (epoch, batch):
                raise Stop

        return listen

    make.error = Stop  # type: ignore[attr-defined]
    return make


class Runs:
    """Starts runs of the tiny network."""

    def __init__(self, model: Any, data: Any, preprocessing: Any, save: Any) -> None:
        self.model, self.data, self.preprocessing, self.save = model, data, preprocessing, save

    def __call__(
        self, out: Path, options: FinetuneOptions, model: nn.Module | None = None, *, on_event: Any = None, **given: Any
    ) -> Any:
        train, val = given.pop("train", self.data[0]), given.pop("val", self.data[1])
        references = {name: given.pop(name, None) for name in ("original", "teacher")}
        return train_model(
            self.model() if model is None else model,
            OpenedInputs(train, val, self.preprocessing, **references),
            options,
            RunOutput(out, **{"save": self.save, **given}),
            on_event=on_event,
        )


@pytest.fixture(scope="session")
def run(new_model: Any, stripes: Any, preprocessing: Any, save_weights: Any) -> Runs:
    """Start a run: run(out, options, model=None, **fields of OpenedInputs and RunOutput)."""
    return Runs(new_model, stripes, preprocessing, save_weights)


class Processes:
    """Forks processes of one that has imported torch, and runs programs in them."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "timm", "fixify.training", "numpy", "pytest"])

    def start(self, program: str, **given: Any) -> Any:
        """Start a program of this folder; it finds `given` as GIVEN."""
        path = str(Path(__file__).with_name(program))
        process = self.context.Process(target=runpy.run_path, args=(path, {"GIVEN": given}, "__main__"))
        process.start()
        return process

    def together(self, folder: Path, runs: dict[str, dict[str, Any]], *, count: int = 2) -> dict[str, list[Any]]:
        """Do runs one after the other, each in `count` processes that train together.

        Args:
            folder: For the folders of the runs.
            runs: What `together.py` takes for each, by name.

        Returns:
            What each process tells of each run: its result, the events that it got, its weights.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            environment = {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
            environment["MASTER_ADDR"] = "127.0.0.1"
            answer = folder / f"answer.{rank}"
            process = self.start("together.py", environment=environment, runs=runs, folder=folder, answer=answer)
            started.append((process, answer))
        for process, _ in started:
            process.join(300)
            assert process.exitcode == 0
        told = [pickle.loads(answer.read_bytes()) for _, answer in started]
        return {name: [each[name] for each in told] for name in runs}


@pytest.fixture(scope="session")
def processes() -> Processes:
    """Starts programs in processes of their own."""
    return Processes()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, run: Runs) -> ReferenceModel:
    """The tiny network with its learned classifier, trained; over 80 % right."""
    model = make_model(fixed=False)
    options = FinetuneOptions.create(epochs=16, batch_size=8, lr=0.05, no_aug=True, workers=0, device="cpu")
    run(tmp_path_factory.mktemp("teacher"), options, model)
    return ReferenceModel("learned.pth", "0" * 64, model.eval(), PREPROCESSING)
