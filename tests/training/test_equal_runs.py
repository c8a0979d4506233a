"""Equal commands leave equal bytes, and a recipe holds after its checkpoint was converted again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixify import convert, train
from fixify.errors import TrainingError
from fixify.training import FinetuneOptions, TrainOptions, finetune, train_from_scratch

QUICK = {"epochs": 1, "batch_size": 4, "no_aug": True, "workers": 0, "device": "cpu", "warmup_epochs": 0}


@pytest.fixture
def slim(tiny: Path, tmp_path: Path) -> Path:
    """The converted tiny network."""
    return converted(tiny, tmp_path)


def converted(tiny: Path, folder: Path, **options: Any) -> Path:
    path = folder / "tiny.fixed.safetensors"
    convert(tiny / "learned.pth", path, force=True, **options)
    return path


def in_child(do: Callable[[], object]) -> None:
    child = os.fork()
    if not child:
        do()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("head", ["fixed", "learned"])
def test_two_equal_runs_write_equal_checkpoints(tiny: Path, slim: Path, tmp_path: Path, head: str) -> None:
    def start(out: Path) -> None:
        if head == "fixed":
            finetune(slim, str(tiny / "data"), out, FinetuneOptions.create(img_size=32, **QUICK))
        else:
            options = TrainOptions.create(model="timm/test_efficientnet", head="learned", img_size=32, **QUICK)
            train_from_scratch(str(tiny / "data"), out, options)

    start(tmp_path / "first")
    in_child(lambda: start(tmp_path / "second"))
    checkpoints = sorted((tmp_path / "first").glob("*.safetensors"))
    assert len(checkpoints) == 2
    for path in checkpoints:
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert not [path for path in (tmp_path / "first").iterdir() if path.name.startswith(".")]


def test_a_recipe_holds_after_its_checkpoint_was_converted_again(tiny: Path, slim: Path, tmp_path: Path) -> None:
    finetune(slim, str(tiny / "data"), tmp_path / "run", FinetuneOptions.create(img_size=32, **QUICK))
    slim.unlink()
    converted(tiny, tmp_path)
    again = train(tmp_path / "run" / "recipe.yaml", tmp_path / "again")
    for name in ("best.fixed.safetensors", "last.fixed.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert len(again.history) == 1
    converted(tiny, tmp_path, seed=5)
    with pytest.raises(TrainingError, match="checkpoint"):
        train(tmp_path / "run" / "recipe.yaml", tmp_path / "third")
