"""`fixify train` as a person sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from fixify.recipes.schema import SECTIONS
from fixify.recipes.shipped import SECTION_NAMES

Run = Callable[..., tuple[int, str, str]]
TRAIN = {"model": "test_resnet", "in_chans": 1, "img_size": 32, "epochs": 1, "batch_size": 24, "no_aug": True}
HERE = ("--device", "cpu", "-j", 0)


def test_train_resume_eval_convert_and_repeat(run: Run, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": str(digits), "train": TRAIN}))
    code, out, err = run("train", "mine.yaml", "--set", "train.head=learned", "--json", *HERE)
    assert code == 0, err
    assert json.loads(out)["best"] == "mine/best.safetensors"
    assert "epoch 1/1: loss" in err and "fixify eval mine/best.safetensors" in err
    code, out, err = run("eval", "mine/best.safetensors", "--data", digits, "--json", *HERE)
    assert code == 0, err
    code, _, err = run("convert", "mine/best.safetensors")
    assert code == 0 and "Recognised" not in err, err

    code, _, err = run("train", "mine.yaml", *HERE)
    assert code == 1 and "There is a run in mine already" in err
    code, out, err = run("train", "mine.yaml", "--resume", *HERE)  # as it was started, not as the recipe is now
    assert code == 0 and "the run goes on as it was started" in err and "head auto (not learned)" in err

    code, out, err = run("train", "mine/recipe.yaml", "--json", *HERE)
    assert code == 0, err
    assert json.loads(out)["best"] == "mine-again/best.safetensors"
    metrics = [json.loads(Path(folder, "metrics.jsonl").read_text()) for folder in ("mine", "mine-again")]
    assert metrics[0]["val_loss"] == metrics[1]["val_loss"]


def test_mistakes_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"train": TRAIN}))
    code, _, err = run("train", "mine.yaml")
    assert code == 2 and "names no data" in err
    code, _, err = run("train", "mine.yaml", "--set", "train.lrr=1")
    assert code == 2 and "train.lrr is not an option" in err
    code, _, err = run("train", "mine.yaml", "--set", "finetune.lr=1")
    assert code == 2 and "does not concern `fixify train`" in err


def test_the_light_list_of_sections_is_that_of_the_schema() -> None:
    assert tuple(SECTIONS) == SECTION_NAMES
