"""States with a valid seal and other content than fixify writes."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.errors import FixifyError, TrainingError
from fixify.training import FinetuneOptions, FinetuneResult, TrainOptions
from fixify.training.run_folder import write_sealed

Run = Callable[..., FinetuneResult]
PLAIN = FinetuneOptions.create(epochs=1, batch_size=22, lr=0.05, no_aug=True, workers=0, device="cpu", ema_decay=0.9)
ODD: list[Any] = [None, True, -1, 2.5, 10**30, float("nan"), "x", [], [[]], {}, {"a": 1}, {1: 2}, torch.zeros(2)]
ENTRIES = [
    ("version",), ("model",), ("optimiser",), ("scaler",), ("ema",), ("progress",), ("recipe",), ("facts",),
    ("machine",), ("progress", "epoch"), ("progress", "batch"), ("progress", "history"), ("progress", "history", 0),
    ("progress", "history", 0, "val_top1"), ("progress", "before"), ("progress", "unreadable"), ("progress", "steps"),
    ("progress", "start"), ("progress", "start", "step"), ("progress", "start_right"),
    ("progress", "steps", 0, "loss"), ("recipe", "batch_size"), ("facts", "train_images"), ("facts", "class_names"),
    ("machine", "processes"), ("machine", "torch"), ("model", "fc.bias"), ("optimiser", "state"),
    ("optimiser", "param_groups"), ("optimiser", "param_groups", 0, "lr"),
]  # fmt: skip


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, run: Run) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("run")
    run(out, PLAIN)
    content: dict[str, Any] = torch.load(io.BytesIO((out / "state.pt").read_bytes()), weights_only=True)
    return content


def changed(state: dict[str, Any], entry: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found: Any = copy.deepcopy(state)
    inner = found
    for key in entry[:-1]:
        inner = inner[key]
    inner[entry[-1]] = value
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: ".".join(map(str, entry)))
def test_one_is_refused_by_name_or_resumed(run: Run, tmp_path: Path, state: dict[str, Any], entry: Any) -> None:
    for value in random.Random(str(entry)).sample(ODD, 4):
        write_sealed(tmp_path, changed(state, entry, value))
        try:
            run(tmp_path, PLAIN, resume=True)
        except FixifyError as error:
            assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    ("entry", "value", "named"),
    [
        (("progress", "epoch"), "x", r"progress\.epoch"),
        (("progress", "epoch"), -1, r"progress\.epoch"),
        (("progress", "history", 0, "val_top1"), [], r"progress\.history\.0\.val_top1"),
        (("progress", "unreadable"), {"test": []}, r"progress\.unreadable"),
        (("progress", "start", "val_top1"), "x", r"progress\.start\.val_top1"),
        (("progress", "start_right"), {"num_images": 9, "parts": 1, "packed": "!"}, r"progress\.start_right\.packed"),
        (("progress", "start_right"), {"num_images": 9, "parts": 1, "packed": "oA=="}, r"progress\.start_right"),
        (("progress", "start_right"), {"num_images": -1, "parts": 1, "packed": ""}, r"start_right\.num_images"),
        (("progress", "new"), 1, "'new'"),
        (("recipe",), None, "recipe"),
        (("machine",), [], "machine"),
    ],
)
def test_the_entry_is_named(run: Run, tmp_path: Path, state: Any, entry: Any, value: Any, named: str) -> None:
    write_sealed(tmp_path, changed(state, entry, value))
    with pytest.raises(TrainingError, match=named):
        run(tmp_path, PLAIN, resume=True)


CONVERTS = TrainOptions.create(
    model="tiny", head="binary", epochs=2, batch_size=22, lr=0.05, no_aug=True, workers=0, device="cpu"
)
HEADS = [
    ("heads",), ("heads", 0), ("heads", 0, "path"), ("heads", 0, "spec"), ("heads", 0, "spec", "num_classes"),
    ("heads", 0, "spec", "digest"), ("heads", 0, "channel_dim"), ("model", "fc.codes"), ("model", "fc.scale"),
]  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, run: Run, new_model: Any) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("converted")
    run(out, CONVERTS, new_model(fixed=False))
    content: dict[str, Any] = torch.load(io.BytesIO((out / "state.pt").read_bytes()), weights_only=True)
    return content


@pytest.mark.parametrize("entry", HEADS, ids=lambda entry: ".".join(map(str, entry)))
def test_heads_of_a_converted_classifier(
    run: Run, new_model: Any, tmp_path: Path, converted: dict[str, Any], entry: Any
) -> None:
    for value in ODD[:-1]:
        write_sealed(tmp_path, changed(converted, entry, value))
        try:
            run(tmp_path, CONVERTS, new_model(fixed=False), resume=True)
        except FixifyError as error:
            assert str(tmp_path) in str(error)
        else:  # as it was, or a digest that was not recorded
            assert entry[-1] in ("channel_dim", "digest") and value in (-1, None)
