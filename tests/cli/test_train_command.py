"""`fixify train` as a person sees it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

Run = Callable[..., tuple[int, str, str]]
TRAIN = {"model": "test_resnet", "in_chans": 1, "img_size": 32, "epochs": 1, "batch_size": 4, "no_aug": True}
HERE = ("--device", "cpu", "-j", 0)


def test_train_resume_eval_convert_and_repeat(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": str(tiny / "data"), "train": TRAIN}))
    code, out, err = run("train", "mine.yaml", "--set", "train.head=learned", "--json", *HERE)
    assert code == 0, err
    assert json.loads(out)["best"] == "mine/best.safetensors"
    assert "epoch 1/1: loss" in err and "fixify eval mine/best.safetensors" in err
    code, out, err = run("eval", "mine/best.safetensors", "--data", tiny / "data", "--json", *HERE)
    assert code == 0, err
    code, _, err = run("convert", "mine/best.safetensors")
    assert code == 0 and "Recognised" not in err, err

    code, _, err = run("train", "mine.yaml", *HERE)
    assert code == 1 and "--resume" in err and "--force" in err
    code, out, err = run("train", "mine.yaml", "--resume", *HERE)  # as it was started, not as the recipe is now
    assert code == 0 and "warning: " in err and "head auto (not learned)" in err

    code, out, err = run("train", "mine/recipe.yaml", "--json", *HERE)
    assert code == 0, err
    assert json.loads(out)["best"] == "mine-again/best.safetensors"
    metrics = [json.loads(Path(folder, "metrics.jsonl").read_text()) for folder in ("mine", "mine-again")]
    assert metrics[0]["val_loss"] == metrics[1]["val_loss"]


def test_learned_against_fixed(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": str(tiny / "data"), "train": TRAIN}))
    command = ("train", "mine.yaml", "--compare", "--compare-scales", "1", *HERE)
    code, out, err = run(*command, "--json")
    assert code == 0, err
    said = json.loads(out)
    learned, fixed, held = said["runs"]
    assert [row["name"] for row in said["runs"]] == ["learned", "fixed", "scale-1"]
    assert learned["parameters"] - fixed["parameters"] == learned["classifier_parameters"] - 5
    assert held["parameters"] == fixed["parameters"] - 1 and held["scale"] == 1
    assert held["difference"] == held["top1"] - learned["top1"]
    assert all(Path(path).is_file() for path in (said["page"], *said["figures"])) and len(said["figures"]) == 3
    assert "fixed, 1 of 3 runs" in err and "epoch 1/1" in err
    assert "scale-1" in Path("mine/report.html").read_text()
    options = [json.loads(Path("mine", name, "run.json").read_text())["options"] for name in ("learned", "fixed")]
    assert {key for key in options[0] if options[0][key] != options[1][key]} == {"head"}

    code, _, err = run(*command)
    assert code == 1 and "mine/fixed" in err and "--force" in err
    code, out, err = run(*command, "--resume", "--set", "train.head=orthogonal")
    assert code == 1 and "'auto'" in err and "'orthogonal'" in err
    code, out, err = run(*command, "--resume")
    assert code == 0, err
    assert "difference" in out and max(map(len, out.splitlines())) <= 80
    assert "epoch 1/1" not in err  # nothing was trained again


def test_unreadable_images_of_a_training(run: Run, tiny: Path, tmp_path: Path) -> None:
    """What the message says to type works."""
    shutil.copytree(tiny / "data", tmp_path / "data")
    min((tmp_path / "data" / "train").rglob("*.png")).write_bytes(b"no image")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": "data", "train": TRAIN}))
    code, _, err = run("train", "mine.yaml", *HERE)
    assert code == 1
    share = re.search(r"--max-unreadable (\d\.\d+)", err)
    assert share is not None, err
    code, _, err = run("train", "mine.yaml", "--resume", "--max-unreadable", share[1], *HERE)
    assert code == 0, err


def test_mistakes_of_a_comparison(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": "d", "train": TRAIN}))
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({"data": "d", "checkpoint": "c", "finetune": {}}))
    for arguments, words in (
        (("mine.yaml", "--compare-scales", "1"), "Add --compare."),
        (("mine.yaml", "--compare", "--compare-scales", "1,ten"), "'1,ten'"),
        (("mine.yaml", "--compare", "--set", "train.head=learned"), "--set train.head=auto"),
        (("tune.yaml", "--compare"), "Drop --compare."),
        (("mine.yaml", "--max-restarts", "1"), "Add --nproc-per-node N."),
        (("mine.yaml", "--nproc-per-node", "0"), "--nproc-per-node"),
    ):
        code, _, err = run("train", *arguments)
        assert code == 2 and words in err, err


def test_mistakes_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"train": TRAIN}))
    code, _, err = run("train", "mine.yaml")
    assert code == 2 and "mine.yaml" in err and "--data" in err
    code, _, err = run("train", "mine.yaml", "--set", "train.lrr=1")
    assert code == 2 and "train.lrr" in err and "'lr'" in err
    code, _, err = run("train", "mine.yaml", "--set", "finetune.lr=1")
    assert code == 2 and "finetune.lr" in err and "`fixify train`" in err


def test_a_shipped_recipe_tells_how_to_get_its_data(run: Run) -> None:
    for name in ("digits-resnet20", "kjv-lstm"):
        code, _, err = run("train", name, *HERE[:2])
        assert code == 1 and f"fixify recipes show {name}" in " ".join(err.split())
    code, _, err = run("train", "digits-resnet20", "--data", "digts", *HERE)
    assert code == 1 and "recipes show" not in err
