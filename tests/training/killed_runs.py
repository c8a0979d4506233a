"""Kill runs at random moments, resume them, and compare them with one that was never killed.

It runs in a process of its own, which `Processes.start` in conftest.py starts and which never trains itself: every run
is a fork of it. It writes one JSON object per killed run. There are three kinds of moments, in turn: SIGKILL after a
random part of a run's time; in the middle of writing a file, at a random byte (the kernel kills at RLIMIT_FSIZE); and
before a random one of the calls that open, rename or remove a file in the folder.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fixify.checkpoints.slim import write_safetensors
from fixify.training import Event, FinetuneOptions, Step

CONFTEST = runpy.run_path(str(Path(__file__).with_name("conftest.py")))  # the tiny network and its images

# Every source of randomness: augmentation of both stages, dropout; and every kind of state: moments, averages.
OPTIONS = FinetuneOptions.create(
    epochs=2,
    batch_size=8,
    lr=0.02,
    opt="adamw",
    ema_decay=0.9,
    reprob=0.3,
    mixup=0.2,
    auto_augment="rand-m3",
    grad_accum=2,
    val_every=2,
    workers=0,
    device="cpu",
    save_minutes=1e-9,
)
DATA = CONFTEST["_stripes"](44, 0, "train"), CONFTEST["_stripes"](20, 1, "val")

ANSWER = "answer.jsonl"
CALLS, CALLS_FILE = [0], "calls"  # how many a run made, and where it leaves the number

Prepare = Callable[[Path], Callable[[Event], object]]


def save(model: torch.nn.Module, path: Path, record: dict[str, Any]) -> None:
    write_safetensors(path, model.state_dict(), {"format": "pt"})


def start(out: Path, prepare: Prepare, *, resume: bool) -> int:
    """Fork a run; its process id. Its exit code is 0 when it is done."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        runs = CONFTEST["Runs"](CONFTEST["make_model"], DATA, CONFTEST["PREPROCESSING"], save)
        runs(out, OPTIONS, resume=resume, on_event=prepare(out))
        (out.parent / CALLS_FILE).write_text(str(CALLS[0]))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def never(_out: Path) -> Callable[[Event], object]:
    return lambda _event: None


def at_byte(step: int, size: int) -> Prepare:
    """Die at that byte of a file that is written after that many steps."""

    def prepare(_out: Path) -> Callable[[Event], object]:
        def on_event(event: Event) -> None:
            if isinstance(event, Step) and event.step >= step:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return on_event

    return prepare


def at_call(number: int) -> Prepare:
    """Die before that many openings, renamings and removals of files in the folder; 0 only counts them."""

    def prepare(out: Path) -> Callable[[Event], object]:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.chmod") and str(out) in str(arguments[0]):
                CALLS[0] += 1
                if CALLS[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        return lambda _event: None

    return prepare


def wait(child: int, seconds: float | None = None) -> str:
    """How the run ended: "done", or "killed" after at most so many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.0005)
    if os.WIFSIGNALED(status):
        return "killed"
    if os.WEXITSTATUS(status):
        raise SystemExit("A run failed.")
    return "done"


def contents(out: Path) -> dict[str, Any]:
    """Everything a run leaves that has weights in it."""
    state = torch.load(out / "state.pt", weights_only=True)
    return {"state": state, **{name: load_file(out / f"{name}.fixed.safetensors") for name in ("best", "last")}}


def same(ours: Any, theirs: Any) -> bool:
    """Bit for bit; times aside, and what the times are part of."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(
            same(ours[key], theirs[key]) for key in ours if not str(key).endswith(("seconds", "images_per_second"))
        )
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return ours == theirs


def main(folder: Path, kills: int, seed: int) -> None:
    rng, lines = random.Random(seed), list[str]()
    whole = folder / "whole"
    began = time.monotonic()
    wait(start(whole, at_call(0), resume=False))
    seconds, calls = time.monotonic() - began, int((folder / CALLS_FILE).read_text())
    expected = contents(whole)
    size = (whole / "state.pt").stat().st_size
    killed = 0
    for number in itertools.count():
        out = folder / f"run{number}"
        kind = ("time", "byte", "call")[killed % 3]
        if kind == "time":
            moment: list[float] = [rng.uniform(0, seconds)]
            how = wait(start(out, never, resume=False), moment[0])
        elif kind == "byte":
            moment = [rng.randint(1, 9), rng.randint(1, size)]
            how = wait(start(out, at_byte(int(moment[0]), int(moment[1])), resume=False))
        else:
            moment = [rng.randint(1, calls)]
            how = wait(start(out, at_call(int(moment[0])), resume=False))
        if how == "done":  # it was quicker than the first
            continue
        left = sorted(path.name for path in out.iterdir()) if out.exists() else []
        wait(start(out, never, resume=True))  # also if nothing was left
        found = contents(out)
        leftover = [path.name for path in out.iterdir() if path.name.startswith(".") or path.suffix == ".lock"]
        lines.append(
            json.dumps(
                {
                    "kind": kind,
                    "moment": moment,
                    "half_written": [name for name in left if name.endswith(".tmp")],
                    "resumed": "state.pt" in left or "state-previous.pt" in left,
                    "same": same(found, expected) and not leftover,
                }
            )
        )
        killed += 1
        if killed == kills:
            break
    (folder / ANSWER).write_text("\n".join(lines))


if __name__ == "__main__":
    main(**GIVEN)  # type: ignore[name-defined]  # noqa: F821
