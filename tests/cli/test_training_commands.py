"""`fixify finetune` and `fixify eval` as a person sees them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--img-size", 32, "--crop-pct", 1.0, "--no-aug", "--workers", 0, "--device", "cpu", "-b", 10)


@pytest.fixture(scope="module")
def stripes(make_stripes: Callable[[int, int], Path]) -> Path:
    return make_stripes(40, 20)


def test_finetune_then_eval(run: Run, stripes: Path, tmp_path: Path) -> None:
    slim = tmp_path / "net.fixed.safetensors"
    slim.write_bytes((stripes / "net.fixed.safetensors").read_bytes())
    data = stripes / "data"
    code, out, err = run("finetune", "--data", data, "--epochs", 2, *QUICK, "--json")  # the only slim file here
    assert code == 0, err
    said = json.loads(out)
    assert said["best"] == "net-finetuned/best.fixed.safetensors"
    assert [record["epoch"] for record in said["history"]] == [0, 1]
    assert said["peak_memory_bytes"] > 50 << 20 and "peak memory of this process: " in err
    assert "epoch 2/2: loss " in err
    assert f"next: fixify eval {said['best']} --data {data}" in err
    assert "20 images of 4 classes" in err

    code, out, err = run("eval", said["best"], "--data", data, "--json", "--workers", 0)
    (measured,) = json.loads(out)["models"]
    assert code == 0, err
    assert measured["top1"] == said["after"]["val_top1"]
    assert measured["num_images"] == 20

    code, out, err = run("report", "net-finetuned")
    assert code == 0 and "page: net-finetuned/report.html" in err
    page = json.loads(run("report", "net-finetuned", "--json")[1])
    assert page["runs"][0]["best"] == said["after"]
    assert page["runs"][0]["command"].startswith(f"fixify finetune --data {data} --epochs 2 --img-size 32")
    code, _, err = run("finetune", slim, "--data", data, "--track", "tensorbord")
    assert code == 2 and "'tensorboard'" in err

    # Done already; and again only when told to.
    assert "--force" in run("finetune", slim, "--data", data, *QUICK)[2]
    code, out, err = run("finetune", slim, "--data", data, "--resume")
    assert code == 0, err
    assert "before training" in out and ("best: the start" in out) == said["best_is_start"]
    code, _, err = run("finetune", slim, "--data", data, "--resume", "--lr", 0.7)
    assert code == 1 and "0.05" in err and "0.7" in err


def test_a_drop_that_is_allowed_stops_the_run_and_one_that_is_not_met_is_code_3(run: Run, stripes: Path) -> None:
    given = (stripes / "net.fixed.safetensors", "--data", stripes / "data", *QUICK)
    original = stripes / "learned.pth"
    code, out, err = run("finetune", *given, "-o", "met", "--against", original, "--max-drop", 99, "--json")
    assert code == 0, err
    said = json.loads(out)
    top1 = json.loads(run("eval", original, "--data", stripes / "data", *QUICK[:4], "--workers", 0, "--json")[1])[
        "models"
    ][0]["top1"]
    assert said["reached"] is True and said["original_top1"] == top1
    assert "learned.pth" in err and f"{top1:.2f} %" in err
    assert f"{said['after']['val_top1']:.2f} % is within 99 points" in err
    slim_info = json.loads(run("inspect", said["best"], "--json")[1])
    assert slim_info["training"]["original"]["name"] == "learned.pth"
    assert str(stripes) not in json.dumps(slim_info)

    goal = ("--max-drop", 0, "--original-top1", 100, "--epochs", 1, "--lr", 1e-6, "--val-every", 2)
    code, out, err = run("finetune", *given, "-o", "missed", *goal)
    assert code == 3
    assert "original" in out and re.search(r"after (0\.5|1) epoch|best: the start", out) and "step 2: loss " in err
    assert re.search(r"error: .*1 epoch .* 0 points .*100\.00 %", err)
    code, _, err = run("finetune", *given, "-o", "missed", "--resume")  # it is as it was
    assert code == 3 and "step 2" not in err
    code, _, err = run("finetune", *given, "-o", "third", "--max-drop", 0.5, "--no-distill")
    assert code == 2 and "--against ORIGINAL" in err


def test_a_folder_of_unlabelled_images_is_enough_with_a_teacher(run: Run, stripes: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for image in (stripes / "data" / "train").glob("*/*.png"):
        (photos / f"{image.parent.name}-{image.name}").write_bytes(image.read_bytes())
    given = (stripes / "net.fixed.safetensors", "--data", photos, "--unlabelled", "--epochs", 1, *QUICK, "--json")
    original = stripes / "learned.pth"
    code, out, err = run("finetune", *given, "-o", "run", "--distill", original, "--max-drop", 100)
    assert code == 2 and "max_drop" in err
    code, out, err = run("finetune", *given, "-o", "run", "--distill", original, "--max-drop", 99.5)
    assert code in (0, 3), err
    said = json.loads(out)
    assert said["original_top1"] == 100  # the teacher is the original, and agrees with itself
    assert "photos/" in err and "agreement with the teacher" in err
    info = json.loads(run("inspect", said["last"], "--json")[1])
    assert info["training"]["teacher"]["name"] == "learned.pth"
    assert info["training"]["class_names"] is None and info["labels"] is None  # nobody said what they are called
    assert str(tmp_path) not in json.dumps(info)
    text = run("inspect", said["last"])[1]
    assert "agreement with the teacher" in text and "teacher_logits by learned.pth" in text
    # Validation with labels, where there are some.
    (stripes / "data" / "val").rename(photos / "val")
    (photos / "train").mkdir()
    for image in photos.glob("*.png"):
        image.rename(photos / "train" / image.name)
    try:
        code, out, err = run("finetune", *given, "-o", "labelled", "--distill", original)
    finally:
        (photos / "val").rename(stripes / "data" / "val")
    assert code == 0, err
    assert "20 images of 4 classes from val/" in err
    info = json.loads(run("inspect", json.loads(out)["last"], "--json")[1])
    assert info["labels"] == [f"stripe{label}" for label in range(4)]

    assert "--distill ORIGINAL" in run("finetune", *given, "-o", "third")[2]
    code, _, err = run("finetune", *given, "-o", "third", "--distill-weight", 0.3)
    assert code == 2 and "--distill-weight" in err and "--distill ORIGINAL" in err


def test_a_head_that_starts_near_the_original_learns_from_it_unless_told_not_to(
    run: Run, stripes: Path, tmp_path: Path
) -> None:
    original, slim = tmp_path / "learned.pth", tmp_path / "signs.fixed.safetensors"
    original.write_bytes((stripes / "learned.pth").read_bytes())
    assert run("convert", original, "--head", "binary", "-o", slim)[0] == 0
    given = (slim, "--data", stripes / "data", "--epochs", 1, *QUICK)

    def facts(out: str) -> dict[str, object]:
        return json.loads((tmp_path / out / "run.json").read_text())

    code, _, err = run("finetune", *given, "-o", "taught")
    assert code == 0 and "learning from the original's answers: learned.pth (--no-distill" in err
    assert facts("taught")["teacher"]["name"] == "learned.pth"  # type: ignore[index]
    assert f"distill: {original}" in (tmp_path / "taught" / "recipe.yaml").read_text()
    code, _, err = run("finetune", *given, "-o", "taught", "--resume")
    assert code == 0, err
    code, _, err = run("train", "taught/recipe.yaml", "-o", "repeated", "--workers", 0, "--device", "cpu")
    assert code == 0, err
    assert facts("repeated")["teacher"] == facts("taught")["teacher"]

    code, _, err = run("finetune", *given, "-o", "alone", "--no-distill")
    assert code == 0 and "learning from" not in err and "teacher" not in facts("alone")
    # Neither resuming such a run nor repeating it adds a teacher.
    code, _, err = run("finetune", slim, "--data", stripes / "data", "-o", "alone", "--resume")
    assert code == 0, err
    code, _, err = run("train", "alone/recipe.yaml", "-o", "again", "--workers", 0, "--device", "cpu")
    assert code == 0 and "teacher" not in facts("again"), err
    code, _, err = run("finetune", *given, "-o", "third", "--recipe", "alone/recipe.yaml")
    assert code == 0 and "teacher" not in facts("third"), err
    code, _, err = run("finetune", *given, "-o", "fourth", "--no-distill", "--distill", original)
    assert code == 2 and "--no-distill" in err

    original.unlink()
    code, _, err = run("finetune", *given, "-o", "fifth")
    assert code == 0 and "the original is not known" in err
    assert facts("fifth")["teacher"]["name"] == slim.name  # type: ignore[index]


def test_a_teacher_of_other_classes_is_refused(run: Run, stripes: Path) -> None:
    given = (stripes / "net.fixed.safetensors", "--data", stripes / "data", *QUICK)
    model = timm.create_model("test_efficientnet", in_chans=1, num_classes=5)
    torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict()}, "five.pth")
    code, _, err = run("finetune", *given, "--distill", "five.pth")
    assert code == 1 and "five.pth" in err and "5 classes" in err


def test_eval_compares_an_original_with_its_conversion(run: Run, stripes: Path) -> None:
    slim, original = stripes / "net.fixed.safetensors", stripes / "learned.pth"
    given = ("--data", stripes / "data", "--split", "train", "--img-size", 32, "--workers", 0)
    code, out, err = run("eval", slim, "--against", original, *given, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert [model["name"] for model in said["models"]] == ["net.fixed.safetensors", "learned.pth"]
    alone = json.loads(run("eval", original, *given, "--json")[1])["models"][0]
    assert {**alone, "seconds": 0} == {**said["models"][1], "seconds": 0}
    assert 0 <= said["agreement"]["same"] <= 100
    code, out, err = run("eval", slim, "--against", slim, *given)
    assert "same class on 100.00 % of the images" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_mistakes_are_one_line_and_what_to_do(run: Run, stripes: Path, tmp_path: Path) -> None:
    slim, data = stripes / "net.fixed.safetensors", stripes / "data"
    for arguments, expected, words in (
        (("finetune", "--data", data), 2, "*.fixed.safetensors"),
        (("finetune", slim, "--data", "imagnet"), 1, "'imagenet'"),
        (("finetune", slim, "--data", data, "--opt", "sgdd"), 2, "'sgdd'"),
        (("finetune", slim, "--data", data / "train"), 1, "data/train"),
        (("finetune", stripes / "learned.pth", "--data", data), 1, "fixify convert"),
        (("eval", slim, "--data", data, "--split", "training"), 2, "'training'"),
        (("eval", slim, "--data", data, "--device", "gpu"), 2, "'gpu'"),
        (("eval", slim), 2, "--data"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (expected, ""), err
        assert words in err
        assert "Traceback" not in err
    for name in ("a", "b"):
        (tmp_path / f"{name}.fixed.safetensors").write_bytes(slim.read_bytes())
    code, _, err = run("finetune", "--data", data)
    assert code == 2 and "a.fixed.safetensors, b.fixed.safetensors" in err


def test_ctrl_c_saves_and_says_how_to_go_on(stripes: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fixify", "finetune", str(stripes / "net.fixed.safetensors"), "-o", "run"]
    command += ["--data", str(stripes / "data"), "--workers", "1", *map(str, QUICK[:5]), "-b", "10"]
    with subprocess.Popen(
        [*command, "--epochs", "100000"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        deadline = time.monotonic() + 120
        while (
            not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").stat().st_size
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers as well
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "--resume" in err
    assert "Traceback" not in err
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    progress = state["progress"]
    assert f"epoch {progress['epoch'] + 1} of 100000 after {progress['batch']} of 4" in err
