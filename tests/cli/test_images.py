"""Commands whose images or loader processes fail: a sentence, an exit code, and nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import get_worker_info

from fixify.data.folder import FolderImages

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(make_stripes: Callable[[int, int], Path], tmp_path: Path) -> Path:
    """data/ with 16 training and 8 validation images, learned.pth, net.fixed.safetensors and mine.yaml, in the
    current folder."""
    shutil.copytree(make_stripes(16, 8), tmp_path, dirs_exist_ok=True)
    options = {"model": "test_resnet", "in_chans": 1, "img_size": 32, "epochs": 1, "batch_size": 4, "no_aug": True}
    (tmp_path / "mine.yaml").write_text(json.dumps({"train": options}))
    return tmp_path


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def trap(monkeypatch: pytest.MonkeyPatch, name: str, action: Callable[[], object]) -> None:
    """Make loader processes do something when they load an image whose path ends so."""
    load = FolderImages.load

    def loaded(self: Any, index: int) -> Any:
        if get_worker_info() is not None and str(self.path(index)).endswith(name):
            action()
        return load(self, index)

    monkeypatch.setattr(FolderImages, "load", loaded)


TRAIN = ("--epochs", 1, "--batch-size", 4, "--img-size", 32, "--device", "cpu", "--out", "run")
COMMANDS = {
    "eval": ("eval", "net.fixed.safetensors", "--data", "data", "--img-size", 32, "--device", "cpu"),
    "finetune": ("finetune", "net.fixed.safetensors", "--data", "data", *TRAIN),
    "train": ("train", "mine.yaml", "--data", "data", "--device", "cpu", "--out", "run"),
}


SOME_SLOW = [pytest.param(name, marks=[] if name == "finetune" else pytest.mark.slow) for name in COMMANDS]


@pytest.mark.parametrize("command", SOME_SLOW)
def test_a_killed_process_ends_the_command(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    image = "val/stripe1/5.png" if command == "eval" else "train/stripe1/5.png"
    trap(monkeypatch, image, lambda: os.kill(os.getpid(), signal.SIGKILL))
    code, _, err = run(*COMMANDS[command], "--workers", 2)
    assert code == 1 and image in err and "SIGKILL" in err and "Traceback" not in err
    assert ("--resume" in err) is (command != "eval")


@pytest.mark.parametrize("command", SOME_SLOW)
def test_a_hanging_process_ends_the_command(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("FIXIFY_IMAGE_SECONDS", "0.2")
    image = "val/stripe1/5.png"
    trap(monkeypatch, image, lambda: time.sleep(600))
    code, _, err = run(*COMMANDS[command], "--workers", 2)
    assert code == 1 and image in err and "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_defect_in_a_process_ends_the_command(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a defect")

    trap(monkeypatch, "val/stripe1/5.png", fail)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run(*COMMANDS[command], "--workers", 2)


def test_a_run_resumes_after_a_killed_process(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        trap(patched, "train/stripe1/5.png", lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert run(*COMMANDS["finetune"], "--workers", 2)[0] == 1
    assert run(*COMMANDS["finetune"], "--resume", "--workers", 0)[0] == 0
    assert run(*COMMANDS["finetune"][:-1], "whole", "--workers", 0)[0] == 0
    runs = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "whole")]
    losses = [[json.loads(line).get("val_loss") for line in lines] for lines in runs]
    assert losses[0] == losses[1] != [None]


def damage(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / "data" / split / "stripe1" / "1.png").write_bytes(b"no image")
        os.mkfifo(folder / "data" / split / "stripe2" / "pipe.png")
        Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(folder / "data" / split / "stripe3" / "3.png")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("command", ["eval", "finetune"])
def test_unreadable_images_are_named_and_left_out(run: Run, folder: Path, command: str, workers: int) -> None:
    damage(folder)
    code, _, err = run(*COMMANDS[command], "--workers", workers)
    assert code == 1 and "--max-unreadable" in err
    code, out, err = run(
        *COMMANDS[command],
        *("--workers", workers, "--max-unreadable", 0.3),
        *(["--json"] if command == "eval" else ["--force"]),
    )
    assert code == 0 and "Traceback" not in err
    said = " ".join(err.split())
    assert all(f"data/val/{name}" in said for name in ("stripe1/1.png", "stripe2/pipe.png", "stripe3/3.png has 16"))
    if command == "eval":
        assert json.loads(out)["models"][0]["num_images"] == 7 and len(json.loads(out)["unreadable"]) == 2


def test_predict(run: Run, folder: Path) -> None:
    damage(folder)
    images = sorted(str(path.relative_to(folder)) for path in (folder / "data" / "val").rglob("*.png"))
    assert len(images) == 9
    code, out, err = run("predict", "net.fixed.safetensors", *images, "--top", 1)
    assert code == 1 and "stripe1/1.png" in err and "--max-unreadable" in err and not out
    code, out, err = run("predict", "net.fixed.safetensors", *images, "--top", 1, "--max-unreadable", 0.3, "--json")
    assert code == 0 and "2 of 9 images" in err
    found = json.loads(out)["predictions"]
    assert [each["image"] for each in found] == [
        name for name in images if "1/1.png" not in name and "pipe" not in name
    ]


def test_predict_tells_files_of_one_name_apart(run: Run, folder: Path) -> None:
    for label in (0, 1):
        (folder / f"set{label}").mkdir()
        shutil.copy(folder / "data" / "val" / "stripe0" / "0.png", folder / f"set{label}" / "same.png")
    _, out, _ = run("predict", "net.fixed.safetensors", "set0/same.png", "set1/same.png", "--top", 1)
    assert "set0/same.png" in out and "set1/same.png" in out


def test_calibrate(run: Run, folder: Path) -> None:
    for number in range(200):
        shutil.copy(folder / "data" / "train" / "stripe0" / "0.png", folder / "data" / "train" / f"more{number}.png")
    images = folder / "data" / "train"
    (images / "stripe1" / "1.png").write_bytes(b"no image")
    os.mkfifo(images / "stripe2" / "pipe.png")
    (images / "a.gif").touch()
    code, out, err = run("convert", "learned.pth", "-o", "new.safetensors", "--calibrate", images, "--json")
    assert code == 0, err
    calibration = json.loads(out)["calibration"]
    assert calibration["num_images"] + calibration["held_out"] == 215
    said = " ".join(json.loads(out)["notes"])
    assert all(words in said for words in ("stripe1/1.png", "pipe.png", "2 of 217 images", "1 .gif"))
    (images / "stripe1" / "5.png").write_bytes(b"no image")
    code, _, err = run("convert", "learned.pth", "--force", "--calibrate", images)
    assert code == 1 and "3 of 217" in err
