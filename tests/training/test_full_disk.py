"""A disk that is full while a run writes."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fixify.errors import OutputError
from fixify.training import EpochEnded, Event, FinetuneOptions, FinetuneResult
from fixify.training.run_folder import read_sealed

Run = Callable[..., FinetuneResult]
PLAIN = FinetuneOptions.create(epochs=2, batch_size=8, lr=0.05, no_aug=True, workers=0, device="cpu")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    # Lazy, since torch leaves the file open that it could not write.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def epoch_in(folder: Path) -> int:
    state = read_sealed(folder / "state.pt", torch.device("cpu"))
    assert state is not None
    return int(state["progress"]["epoch"])


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(run: Run, small_disk: Path) -> None:
    def fill(event: Event) -> None:
        if isinstance(event, EpochEnded):
            filler = os.open(small_disk / "filler", os.O_CREAT | os.O_WRONLY)
            try:
                while True:
                    os.write(filler, b"0" * 1000)
            except OSError:
                os.close(filler)

    with pytest.raises(OutputError, match=r"state\.pt.* disk is full") as caught:
        run(small_disk / "run", PLAIN, on_event=fill, save=lambda _model, _path, _record: None)
    assert "--resume" in str(caught.value.hint)
    assert epoch_in(small_disk / "run") == 1
    assert not list((small_disk / "run").glob(".*.tmp"))
    (small_disk / "filler").unlink()
    assert len(run(small_disk / "run", PLAIN, resume=True).history) == 2


def test_a_file_that_may_not_grow_is_one_sentence_and_keeps_the_state_before(run: Run, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: Event) -> None:
        if isinstance(event, EpochEnded):
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))

    try:
        with pytest.raises(OutputError, match=r"state\.pt.* 0\.0 MB") as caught:
            run(tmp_path, PLAIN, on_event=fill, save=lambda _model, _path, _record: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "--resume" in str(caught.value.hint)
    assert epoch_in(tmp_path) == 1
    assert not list(tmp_path.glob(".*.tmp"))
    assert len(run(tmp_path, PLAIN, resume=True).history) == 2
