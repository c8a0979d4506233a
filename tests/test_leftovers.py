"""Locks on folders, and what killed writers leave."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fixify._leftovers import FolderLock, leftovers, private_folder, remove_leftovers
from fixify.checkpoints.slim import write_safetensors
from fixify.errors import OutputError


def in_child(do: Callable[[], object]) -> int:
    """Call a function in a forked process and return its exit code; 9 if it raised an OutputError."""
    child = os.fork()
    if not child:
        try:
            do()
        except OutputError:
            os._exit(9)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Another process that holds the lock of a folder: its number, and the folder."""
    ready, told = multiprocessing.Pipe()
    child = os.fork()
    if not child:
        FolderLock(tmp_path / "run").acquire()
        told.send_bytes(b"held")
        signal.pause()
    ready.recv_bytes()
    yield child, tmp_path / "run"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


class TestLock:
    def test_it_names_the_other_process_and_ends_with_it(self, other_process: tuple[int, Path]) -> None:
        child, folder = other_process
        with pytest.raises(OutputError, match=f"Process {child} on .* trains in .*run"):
            FolderLock(folder).acquire()
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        lock = FolderLock(folder)
        lock.acquire()
        assert (folder / FolderLock.FILE).read_text().startswith(f"{os.getpid()} on ")
        lock.release()
        assert list(folder.iterdir()) == []

    def test_twice_in_one_process(self, tmp_path: Path) -> None:
        first, second = FolderLock(tmp_path), FolderLock(tmp_path / "new" / "..")
        first.acquire()
        with pytest.raises(OutputError, match=str(os.getpid())):
            second.acquire()
        second.release()  # it has none
        assert in_child(FolderLock(tmp_path).acquire) == 9
        first.release()
        assert in_child(FolderLock(tmp_path).acquire) == 0

    def test_a_forked_process_does_not_keep_it(self, tmp_path: Path) -> None:
        def fork_and_die() -> None:
            lock = FolderLock(tmp_path)
            lock.acquire()
            if not os.fork():  # stands for a loader process, which outlives its parent for some seconds
                signal.alarm(20)
                signal.pause()
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(fork_and_die) == -signal.SIGKILL
        lock = FolderLock(tmp_path)
        lock.acquire()
        lock.release()

    @pytest.mark.parametrize(
        ("owner", "taken"),
        [("1 on elsewhere", True), ("999999999 on {here}", False), ("{parent} on {here}", True), ("\x1b]0;x", False)],
    )
    def test_without_locks_the_named_process_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, taken: bool
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)
        named = owner.format(here=os.uname().nodename, parent=os.getppid())
        (tmp_path / FolderLock.FILE).write_text(named)
        lock = FolderLock(tmp_path)
        if taken:
            with pytest.raises(OutputError, match=named) as caught:
                lock.acquire()
            assert str(tmp_path / FolderLock.FILE) in str(caught.value.hint)
        else:
            lock.acquire()
            lock.release()

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="file"):
            FolderLock(tmp_path / "file").acquire()


class TestLeftovers:
    def test_of_a_process_killed_while_it_writes_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, tensors = tmp_path / "net.safetensors", {"weight": torch.zeros(100)}

        def die(*arguments: object, **options: object) -> None:
            save_file(*arguments, **options)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patched:
            patched.setattr("fixify.checkpoints.slim.save_file", die)
            assert in_child(lambda: write_safetensors(path, tensors, {"format": "pt"})) == -signal.SIGKILL
        (tmp_path / ".net.safetensors.mine.tmp").write_text("not fixify's")
        assert [each for each in leftovers(path) if each.is_dir() and list(each.iterdir())]
        write_safetensors(path, tensors, {"format": "pt"})
        assert sorted(each.name for each in tmp_path.iterdir()) == [".net.safetensors.mine.tmp", "net.safetensors"]

    def test_those_of_a_living_writer_are_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "net.safetensors"
        (tmp_path / ".net.safetensors.abcdefgh.tmp").write_text("")
        with private_folder(path) as folder:
            (folder / "part").write_text("")
            assert in_child(lambda: remove_leftovers(path)) == 0
            assert len(leftovers(path)) == 2 and (folder / "part").exists()
        remove_leftovers(path)
        assert list(tmp_path.iterdir()) == []

    def test_writers_at_once_take_nothing_from_each_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every folder is looked at by another writer before it is locked, and some are removed then."""
        path, make = tmp_path / "net", tempfile.mkdtemp

        def make_and_lose(**options: Any) -> str:
            made = make(**options)
            if len(lost) < 2:
                lost.append(made)
                remove_leftovers(path)
            return made

        lost: list[str] = []
        monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
        with private_folder(path) as folder:
            assert folder.exists() and len(lost) == 2 and str(folder) not in lost
        assert list(tmp_path.iterdir()) == []

    def test_links_are_removed_and_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "kept").mkdir()
        (tmp_path / ".net.abcdefgh.tmp").symlink_to(tmp_path / "kept")
        remove_leftovers(tmp_path / "net")
        assert [each.name for each in tmp_path.iterdir()] == ["kept"]


class TestFilesOfSafetensors:
    """`.tmpXXXXXX` of earlier versions, which safetensors left when the process was killed."""

    @staticmethod
    def left(path: Path, metadata: dict[str, str] | None, *, hours: float = 2) -> Path:
        save_file({"a": torch.zeros(3)}, path, metadata=metadata)
        os.utime(path, (path.stat().st_mtime - 3600 * hours,) * 2)
        return path

    def test_a_slim_checkpoint_is_removed(self, tmp_path: Path) -> None:
        ours = {"fixify": "{}", "fixify.version": "1"}
        left = self.left(tmp_path / ".tmpaB3x9Z", ours)
        kept = [
            self.left(tmp_path / ".tmpnewone", ours, hours=0.5),  # it may be written now
            self.left(tmp_path / ".tmpOthers", None),
            self.left(tmp_path / ".tmpTooLong1", ours),
            self.left(tmp_path / "model.safetensors", ours),
        ]
        (tmp_path / ".tmpBroken").write_bytes(b"\xff" * 40)
        (tmp_path / ".tmpLinked").symlink_to(kept[3])
        write_safetensors(tmp_path / "x.fixed.safetensors", {"a": torch.zeros(2)}, {"format": "pt"})
        assert not left.exists()
        assert all(path.exists() for path in kept)
        assert (tmp_path / ".tmpBroken").exists() and (tmp_path / ".tmpLinked").exists()
