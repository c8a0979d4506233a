"""Loader processes end: lost, hanging and failing ones end the command with a sentence, and none is left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids, _set_worker_pids

from fixify.data import OpenedData, UnreadableImages, make_loader, processes
from fixify.data.idx import ArrayImages
from fixify.data.processes import Reading, explain
from fixify.errors import DataError, LoaderError, ResourceError, resource_problem, resources_explained

GRAY = {"input_size": (1, 16, 16), "mean": (0.4,), "std": (0.2,), "crop_pct": 1.0}


class Trap(ArrayImages):
    """Twelve images; a loader process that loads number 5 does something."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(np.zeros((12, 16, 16), np.uint8), np.arange(12))
        self.action = action

    def where(self, index: int) -> str:
        return f"{index}.png"

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index == 5 and get_worker_info() is not None:
            self.action()
        return super().load(index)


def loader(action: Callable[[], object] = lambda: None, **given: Any) -> Any:
    data = OpenedData(Trap(action), tuple("abcdefghijkl"), "", "", "", "val")
    return make_loader(data, GRAY, **{"training": False, "batch_size": 2, "workers": 2, **given})


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ZeroDivisionError("a defect")


def run_out_of_memory() -> None:
    raise MemoryError


@pytest.fixture(autouse=True)
def _none_is_left() -> Any:
    before = multiprocessing.active_children()
    yield
    assert multiprocessing.active_children() == before


def test_a_killed_process_names_the_image() -> None:
    with pytest.raises(LoaderError, match=r"SIGKILL.* 5\.png") as caught, loader(kill_myself) as batches:
        list(batches)
    assert "--workers" in str(caught.value.hint)


def test_a_loader_after_a_killed_process_may_get_its_place_in_memory() -> None:
    """Torch lists loader processes by the address of their iterator."""
    inner = loader()._loader
    iterator = iter(inner)
    for process in processes.workers_of(inner):
        process.kill()
        process.join()
    address = id(iterator)
    processes.end_workers(inner)
    _set_worker_pids(address, ())  # raises if that of the killed process is still listed
    _remove_worker_pids(address)


def test_a_hanging_process_gives_up_and_names_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIXIFY_IMAGE_SECONDS", "0.2")
    with pytest.raises(LoaderError, match=r"hangs.* 5\.png") as caught, loader(lambda: time.sleep(600)) as batches:
        list(batches)
    assert "FIXIFY_IMAGE_SECONDS" in str(caught.value.hint)


def test_a_defect_keeps_its_class_and_the_workers_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="a defect"), loader(fail) as batches:
        list(batches)


def test_memory_that_runs_out_is_no_traceback() -> None:
    with pytest.raises(LoaderError, match="memory") as caught, loader(run_out_of_memory) as batches:
        list(batches)
    assert "--batch-size" in str(caught.value.hint)


@pytest.mark.parametrize("training", [True, False])
def test_an_unreadable_image_in_a_process_is_counted(training: bool) -> None:
    def refuse() -> None:
        raise DataError("Cannot read the image 5.png: RuntimeError.")

    unreadable = UnreadableImages(12, 0.1)
    with loader(refuse, training=training, unreadable=unreadable) as batches:
        assert sum(len(labels) for _, labels in batches) == (12 if training else 11)
    assert list(unreadable.messages) == ["Cannot read the image 5.png: RuntimeError."]


def test_closing_ends_a_process_that_hangs_and_the_loader_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE", 0.2)
    batches = loader(lambda: time.sleep(600))
    next(iter(batches))
    started = multiprocessing.active_children()
    assert len(started) == 2
    batches.close()
    assert not any(process.is_alive() for process in started)
    batches._loader.dataset.images.action = lambda: None
    assert sum(len(labels) for _, labels in batches) == 12
    batches.close()
    batches.close()


def test_processes_ignore_the_signals_that_stop_a_run() -> None:
    with loader() as batches:
        for number, (images, _) in enumerate(batches):
            assert len(images) == 2
            if number == 1:  # each of the two has read a batch, so it has started
                for process in multiprocessing.active_children():
                    os.kill(process.pid or 0, signal.SIGTERM)
                    os.kill(process.pid or 0, signal.SIGINT)
    assert number == 5


def test_a_lost_process_raises_nothing_elsewhere() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    with loader() as batches:
        next(iter(batches))
        assert signal.getsignal(signal.SIGCHLD) == before


def test_images_that_are_not_read_have_no_name() -> None:
    reading = Reading(2)
    with reading.image(3):  # in this process it is not recorded
        assert reading.of(0) is None
    assert Reading(0)._indices is None


IMAGES = SimpleNamespace(where=lambda index: f"{index}.png")


def lost(*codes: int | None, text: str = "DataLoader worker (pid(s) 1) exited unexpectedly", image: int = 7) -> Any:
    reading = Reading(len(codes) or 1)
    reading._indices[len(codes) - 1] = image  # type: ignore[index]
    return explain(RuntimeError(text), [SimpleNamespace(exitcode=code) for code in codes], reading, IMAGES)


@pytest.mark.parametrize(
    ("code", "words", "hint"),
    [
        (-signal.SIGKILL, r"SIGKILL.* 7\.png", "memory"),
        (-signal.SIGSEGV, r"SIGSEGV.* 7\.png", "damaged"),
        (-signal.SIGABRT, r"SIGABRT.* 7\.png", "damaged"),
        (-signal.SIGBUS, r"SIGBUS.* 7\.png", "shared memory"),
        (3, r"exit code 3.* 7\.png", "--workers 0"),
        (75, r"hangs.* 7\.png", "FIXIFY_IMAGE_SECONDS"),
    ],
)
def test_how_a_process_ended(code: int, words: str, hint: str) -> None:
    found = lost(None, code)
    assert re.search(words, found.message) and hint in str(found.hint)


@pytest.mark.parametrize("error", [ConnectionResetError, ConnectionRefusedError, FileNotFoundError, EOFError])
def test_a_process_that_is_killed_while_it_sends_a_batch(error: type[Exception]) -> None:
    process = multiprocessing.get_context("fork").Process(target=kill_myself)
    process.start()
    found = explain(error(), [process], Reading(1), IMAGES)  # type: ignore[arg-type]
    process.join()
    assert found is not None and "SIGKILL" in found.message


def test_a_process_that_ended_between_two_images() -> None:
    assert "image" not in lost(-signal.SIGKILL, image=-1).message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("received 0 items of ancdata", "too many files"),
        ("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)", "too many"),
        ("unable to write to file </torch_1>: No space left on device (28)", "shared memory"),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "memory"),
        ("Caught RuntimeError in DataLoader worker process 0.\n... not enough memory: you tried to allocate", "memory"),
        ("DataLoader worker (pid 3) is killed by signal: Killed. ", "unexpectedly"),
    ],
)
def test_words_of_torch(text: str, words: str) -> None:
    found = lost(None, 0, text=text)
    assert isinstance(found, LoaderError) and words in found.message and found.hint


@pytest.mark.parametrize(
    "text", ["Caught RuntimeError in DataLoader worker process 0.\nmat1 and mat2", "mat1 and mat2"]
)
def test_defects_are_not_explained(text: str) -> None:
    assert lost(None, text=text) is None


def test_what_the_machine_lacks() -> None:
    for number in (errno.EMFILE, errno.ENOMEM):
        with pytest.raises(ResourceError, match="Cannot evaluate: "), resources_explained("evaluate"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), resources_explained("evaluate"):
        raise PermissionError(errno.EACCES, "no")
    assert resource_problem(KeyError("out of memory")) is None


PROGRAM = """
import numpy as np
from fixify.data import OpenedData, make_loader
from fixify.data.idx import ArrayImages
data = OpenedData(ArrayImages(np.zeros((8, 16, 16), np.uint8), np.arange(8)), tuple("abcdefgh"), "", "", "", "val")
loader = make_loader(data, {"input_size": (1, 16, 16), "mean": (0.4,), "std": (0.2,)}, training=False, batch_size=2,
                     workers=2)
next(iter(loader))
raise SystemExit(7)  # without closing
"""


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (7, "")
