"""Training in several processes as a person starts it: torchrun's launcher, signals, lost processes, two nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

pytestmark = pytest.mark.slow
FIXIFY = ["-m", "fixify"]
TORCHRUN = ["-m", "torch.distributed.run"]
TWO = ("--nproc-per-node", "2")
QUICK = ("--img-size", "32", "--crop-pct", "1", "--workers", "0", "--device", "cpu", "-b", "5")


@pytest.fixture(scope="module")
def stripes(make_stripes: Callable[[int, int], Path]) -> Path:
    return make_stripes(40, 9)


class Started:
    """A command that is running."""

    def __init__(self, arguments: Sequence[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait(self) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=300)
        finally:
            self.process.kill()
        return self.process.returncode, out, err

    def wait_for_epochs(self, out: Path, epochs: int) -> None:
        deadline = time.monotonic() + 200
        while len(losses(out)) < epochs:
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if b"\0fixify\0" in Path(f"/proc/{child}/cmdline").read_bytes()]


def finetune(stripes: Path, out: Path, *more: str) -> list[str]:
    checkpoint, data = str(stripes / "net.fixed.safetensors"), str(stripes / "data")
    return [*FIXIFY, "finetune", checkpoint, "--data", data, "-o", str(out), *QUICK, *more]


def losses(out: Path) -> list[float]:
    file = out / "metrics.jsonl"
    return [json.loads(line)["val_loss"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def whole(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six epochs in two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said, err = Started(finetune(stripes, out, *TWO, "--epochs", "6")).wait()
    assert code == 0, err
    assert "Traceback" not in err and "Warning" not in err and err.count("epoch 6/6") == 1
    assert "gradients (counted)" in said
    described = json.loads((out / "run.json").read_text())
    assert described["processes"] == 2
    assert described["command"].startswith("fixify finetune ") and "--nproc-per-node 2" in described["command"]
    return out


def test_a_process_that_is_killed_is_started_again_and_the_run_goes_on(
    stripes: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    started = Started(finetune(stripes, out, *TWO, "--epochs", "6", "--max-restarts", "2"))
    started.wait_for_epochs(out, 2)
    os.kill(started.workers()[1], signal.SIGKILL)
    code, said, err = started.wait()
    assert code == 0, err
    assert "after " in said  # the row of the best validation
    assert err.count("1 of 2 times") == 1
    assert "Traceback" not in err and "error:" not in err
    assert losses(out) == losses(whole)  # bit for bit, and no epoch twice


def test_without_restarts_it_is_one_sentence(stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    started = Started(finetune(stripes, out, *TWO, "--epochs", "1000"))
    started.wait_for_epochs(out, 1)
    os.kill(started.workers()[1], signal.SIGKILL)
    code, _, err = started.wait()
    assert code == 1
    assert err.count("error: Process 2 of 2 ") == 1 and "SIGKILL" in err
    assert "--max-restarts" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_in_one_process(stripes: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    started = Started(finetune(stripes, out, *TWO, "--epochs", "1000"))
    started.wait_for_epochs(out, 1)
    started.process.send_signal(number)
    code, _, err = started.wait()
    assert code == 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)  # torchrun passes no SIGUSR1 on
    (told,) = re.findall(r"error: .*epoch (\d+) of 1000 after (\d) of 4 ", err)
    assert "Traceback" not in err
    progress = torch.load(out / "state.pt", weights_only=True)["progress"]
    assert (progress["epoch"] + 1, progress["batch"]) == tuple(map(int, told))
    code, _, err = Started(finetune(stripes, out, "--resume")).wait()
    assert code == 1
    assert "2 x 5 images" in err and "--batch-size 10" in err


def test_an_error_of_all_processes_is_told_once_and_keeps_its_code(stripes: Path, whole: Path, tmp_path: Path) -> None:
    code, _, err = Started(finetune(stripes, whole, *TWO, "--epochs", "6", "--max-restarts", "1")).wait()
    assert code == 1
    assert err.count("error: ") == 1 and str(whole) in err and "Traceback" not in err
    goal = ("--max-drop", "0.1", "--original-top1", "100", "--epochs", "1")
    code, _, err = Started(finetune(stripes, tmp_path / "run", *TWO, *goal)).wait()
    assert code == 3
    assert err.count("error: ") == 1 and "100.00 %" in err


def test_torchrun_on_two_nodes(stripes: Path, whole: Path, tmp_path: Path) -> None:
    """Two launchers that meet at one end stand for two nodes, with one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def node(number: int) -> Started:
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        rendezvous = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1", *meeting]
        return Started([*TORCHRUN, *rendezvous, *finetune(stripes, tmp_path / "run", "--epochs", "6")])

    nodes = [node(0), node(1)]
    results = [each.wait() for each in nodes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sum("epoch 6/6" in err for _, _, err in results) == 1
    assert losses(tmp_path / "run") == losses(whole)
    assert (
        "torchrun --nnodes=2 --nproc-per-node=1 -m fixify"
        in json.loads((tmp_path / "run/run.json").read_text())["command"]
    )


def test_torchrun_tells_an_error_once(stripes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split in ("train", "val"):
        for image in (stripes / "data" / split).rglob("*.png"):
            copy = data / split / image.parent.name / image.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(image.read_bytes())
    next((data / "val").rglob("*.png")).write_text("not an image")  # in the share of one of them
    arguments = finetune(stripes, tmp_path / "run", "--epochs", "1")
    arguments[arguments.index("--data") + 1] = str(data)
    code, _, err = Started([*TORCHRUN, *TWO, *arguments]).wait()
    assert code == 1
    assert err.count("error: ") == 1 and ".png" in err.split("error: ")[1].splitlines()[0]


def compare(stripes: Path, out: Path, *more: str) -> list[str]:
    recipe = out.with_suffix(".yaml")
    network = {"model": "test_efficientnet", "in_chans": 1, "img_size": 32}
    train = {**network, "epochs": 4, "batch_size": 5, "no_aug": True}
    recipe.write_text(yaml.safe_dump({"data": str(stripes / "data"), "train": train}))
    return [*FIXIFY, "train", str(recipe), "-o", str(out), "--workers", "0", "--device", "cpu", *TWO, *more]


@pytest.fixture(scope="module")
def compared(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "runs"
    code, said, err = Started(compare(stripes, out, "--compare")).wait()
    assert code == 0, err
    assert "Traceback" not in err and "Warning" not in err
    assert said.count("difference") == 2 and err.count("fixed, 1 of 2 runs") == err.count("learned, 2 of 2 runs") == 1
    return out


def test_a_comparison_is_of_the_runs_that_each_would_be_alone(stripes: Path, compared: Path, tmp_path: Path) -> None:
    for name in ("fixed", "learned"):
        described = json.loads((compared / name / "run.json").read_text())
        assert described["processes"] == 2
        assert described["command"].startswith("fixify train ") and "--nproc-per-node 2" in described["command"]
    figures = [compared / f"figure{name}.png" for name in ("1-scale", "2-learned-fixed")]
    assert all(path.is_file() for path in (compared / "report.html", *figures))
    code, _, err = Started(compare(stripes, tmp_path / "alone", "--set", "train.head=learned")).wait()
    assert code == 0, err
    assert losses(tmp_path / "alone") == losses(compared / "learned")


def test_a_comparison_goes_on_after_a_lost_process(stripes: Path, compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    started = Started(compare(stripes, out, "--compare", "--max-restarts", "1"))
    started.wait_for_epochs(out / "learned", 1)
    os.kill(started.workers()[0], signal.SIGKILL)
    code, _, err = started.wait()
    assert code == 0, err
    assert err.count("1 of 1 times") >= 1 and "error:" not in err
    assert [losses(out / name) for name in ("fixed", "learned")] == [
        losses(compared / name) for name in ("fixed", "learned")
    ]


def test_processes_meet_as_often_as_there_are_runs(tmp_path: Path) -> None:
    """Late or early: the store of torchrun still has the addresses that each had in the run before."""
    (tmp_path / "meet.py").write_text(
        "import os, time, torch\n"
        "from fixify.training import distributed\n"
        "for run in range(20):\n"
        "    time.sleep(0.1 * ((run + int(os.environ['RANK'])) % 2))\n"
        "    with distributed.process_group(torch.device('cpu')):\n"
        "        assert distributed.sum_(torch.ones(())) == 2\n"
        "print('met', flush=True)\n"
    )
    code, out, err = Started([*TORCHRUN, *TWO, str(tmp_path / "meet.py")]).wait()
    assert code == 0, err
    assert out.count("met") == 2


def test_a_language_model_is_trained_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text("data: text\nlanguage: {words: learned}\n")
    for start in ([*FIXIFY, "train"], [*TORCHRUN, "--nproc-per-node", "1", *FIXIFY, "train"]):
        more = [] if "torch.distributed.run" in start else TWO
        code, _, err = Started([*start, str(tmp_path / "words.yaml"), *more]).wait()
        assert code in (1, 2) and "language model" in err
