"""Several processes against one: real ones, connected by gloo."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.training import FinetuneOptions

# Without batch norm and dropout several processes compute what one does.
PLAIN = {"batch_norm": False, "dropout": 0.0}
SAME = {
    "epochs": 2,
    "lr": 0.02,
    "opt": "adamw",
    "ema_decay": 0.9,
    "reprob": 0.5,
    "mixup": 0.2,
    "cutmix": 0.2,
    "clip_grad": 1.0,
    "auto_augment": "rand-m3",
    "val_every": 1,
}


def load(path: Path) -> dict[str, Any]:
    return torch.load(io.BytesIO(path.read_bytes()), weights_only=True)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(ours: Path, theirs: Path) -> None:
    for left, right in zip(metrics(ours), metrics(theirs), strict=True):
        for name in (
            "epoch",
            "step",
            "lr",
            "train_loss",
            "train_top1",
            "val_loss",
            "val_top1",
            "val_top5",
            "val_ece",
            "scale",
        ):
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), name
    left, right = (load(out / "last.fixed.safetensors")["weights"] for out in (ours, theirs))
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-3, atol=1e-5)


def test_two_processes_do_what_one_with_twice_the_batch_does(
    run: Any, several: Any, new_model: Any, tmp_path: Path
) -> None:
    options = FinetuneOptions.create(**SAME, batch_size=16, workers=0, device="cpu")
    run(tmp_path / "one", options, model=new_model(**PLAIN))
    first, second = several(tmp_path / "two", 2, model=PLAIN, batch_size=8, **SAME)
    assert first["result"] == second["result"] == "done"
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    assert second["events"] == [] and "EpochEnded" in first["events"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


def test_shards_do_what_copies_do_and_validate_fewer_images_than_processes(several: Any, tmp_path: Path) -> None:
    options = {**SAME, "ema_decay": None, "batch_size": 8}
    for kind, shard in (("copies", False), ("shards", True)):
        done = several(tmp_path / kind, 2, val_images=1, model=PLAIN, shard=shard, **options)
        assert [each["result"] for each in done] == ["done", "done"]
    assert_same_curve(tmp_path / "shards", tmp_path / "copies")
    assert metrics(tmp_path / "copies")[0]["val_top1"] in (0.0, 100.0)
