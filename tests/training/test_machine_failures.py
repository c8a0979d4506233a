"""A loader process is killed; memory or file handles run out."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fixify.errors import DataError, LoaderError, OutputError, ResourceError, TrainingError
from fixify.training import EpochEnded, Evaluated, Event, FinetuneOptions, FinetuneResult, Step
from fixify.training.failures import machine_failure
from fixify.training.run_folder import write_sealed

Run = Callable[..., FinetuneResult]
PLAIN = FinetuneOptions.create(epochs=3, batch_size=8, lr=0.05, no_aug=True, workers=0, device="cpu")
LOST = LoaderError("A loader process was killed (SIGKILL).", hint="Try fewer --workers.")
KILLED = RuntimeError("DataLoader worker (pid 4242) is killed by signal: Killed. ")
FAILURES = [
    (LOST, "loader process"),
    (ResourceError("Cannot count: there is not enough memory.", hint="Try less."), "memory"),
    (MemoryError(), "memory"),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
        "memory",
    ),
    (torch.OutOfMemoryError("CUDA out of memory."), "memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
    (OSError(errno.EMFILE, "Too many open files"), "files"),
    (RuntimeError("received 0 items of ancdata"), "files"),
]


def failing(error: BaseException, when: Callable[[Event], bool]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if when(event):
            raise error

    return listen


@pytest.mark.parametrize(("error", "word"), FAILURES)
def test_each_is_one_sentence_that_says_what_was_saved(
    run: Run, tmp_path: Path, error: BaseException, word: str
) -> None:
    in_second = failing(error, lambda event: isinstance(event, Step) and (event.epoch, event.batch) == (1, 2))
    with pytest.raises(TrainingError, match=rf"{word}.* in epoch 2 of 3 .*state .*epoch 2 of 3 after 0 of 5") as caught:
        run(tmp_path, PLAIN, on_event=in_second)
    assert "--resume" in str(caught.value.hint) and str(tmp_path) in caught.value.message
    assert len(run(tmp_path, PLAIN, resume=True).history) == 3


def test_before_training_nothing_was_saved(run: Run, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="before training"):
        run(tmp_path, PLAIN, on_event=failing(LOST, lambda event: isinstance(event, Evaluated)))
    assert len(run(tmp_path, PLAIN, resume=True).history) == 3


def test_what_the_loader_made_of_it_counts_too() -> None:
    error = DataError("A loader process ended unexpectedly.")
    error.__cause__ = LOST
    assert machine_failure(error) is not None


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), DataError("no images"), OSError(errno.ENOENT, "x")])
def test_other_errors_are_not(error: Exception, run: Run, tmp_path: Path) -> None:
    assert machine_failure(error) is None
    with pytest.raises(type(error)) as caught:
        run(tmp_path, PLAIN, on_event=failing(error, lambda event: isinstance(event, Step)))
    assert caught.value is error


def test_a_loader_that_is_killed_while_a_state_is_written_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KILLED

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(RuntimeError, match="DataLoader") as caught:
        write_sealed(tmp_path, {"weights": torch.zeros(3)})
    assert not isinstance(caught.value, OutputError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["step", pytest.param("validation", marks=pytest.mark.slow)])
def test_a_real_loader_process(run: Run, tmp_path: Path, moment: str) -> None:
    def kill(event: Event) -> None:
        due = isinstance(event, EpochEnded) if moment == "validation" else isinstance(event, Step) and event.epoch == 1
        workers = multiprocessing.active_children()
        if due and workers and workers[0].pid is not None:
            os.kill(workers[0].pid, signal.SIGKILL)
            time.sleep(0.2)  # within it torch raises

    options: Any = PLAIN.replace(workers=1)
    with pytest.raises(TrainingError, match=r"(?i)loader process .*SIGKILL.*state .*saved in") as caught:
        run(tmp_path, options, on_event=kill)
    assert "--resume" in str(caught.value.hint)
    assert isinstance(caught.value.__cause__, LoaderError)
    assert multiprocessing.active_children() == []
    assert len(run(tmp_path, PLAIN, resume=True).history) == 3
