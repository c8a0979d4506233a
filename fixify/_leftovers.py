"""Locks that die with their process, and the temporary files of processes that were killed while they wrote."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fixify.errors import OutputError

if sys.platform != "win32":
    import fcntl

_SUFFIX = ".tmp"
_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
_LONGEST_HEADER = 16 << 20  # bytes
_OLD = 3600.0  # seconds, where nothing says whether the writer lives
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def private_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside an output, for writers that choose the names of their temporary files.

    It is removed at the end. If the process is killed, `remove_leftovers` recognises it by its name.

    Args:
        path: The output.

    Raises:
        OutputError: the folder cannot be created.
    """
    with contextlib.ExitStack() as held:
        folder = None
        while folder is None:
            try:
                made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))
            except OSError as error:
                raise OutputError(f"Cannot write in {path.parent}: {error.strerror}.") from error
            held.enter_context(_locked(made, wait=True))  # for a process that looks whether it is a leftover
            folder = made if made.exists() else None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote an output.

    Nothing is removed while another process writes the same output. Earlier versions of fixify left files of
    safetensors' own, `.tmpXXXXXX`, which do not name their output: those in the folder that are surely theirs go too.

    Args:
        path: The output. Its temporary files and folders lie beside it and are called `.NAME.xxxxxxxx.tmp`.

    Raises:
        OutputError: one cannot be removed.
    """
    found = leftovers(path)
    with contextlib.ExitStack() as held:
        # Listed again: the folder of a writer is made before its file, but the first list can hold the file alone.
        for each in leftovers(path):
            free = held.enter_context(_locked(each))
            if not (_is_old(each) if free is None else free):
                return
        remove(found)
    remove(_of_safetensors(path.parent))


def leftovers(path: Path) -> list[Path]:
    """List the temporary files and folders of an output, of processes that live and that do not."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")  # what `tempfile` makes
    try:
        beside = sorted(path.parent.iterdir())
    except OSError:
        return []  # the one who writes there says why
    return [each for each in beside if pattern.fullmatch(each.name)]


def _of_safetensors(folder: Path) -> list[Path]:
    """List the temporary files of safetensors in a folder that hold a slim checkpoint and that nobody writes any more.

    The library writes the header first, so that it is whole even if the process was killed.
    """
    try:
        named = [each for each in sorted(folder.iterdir()) if _SAFETENSORS.fullmatch(each.name)]
    except OSError:
        return []
    return [each for each in named if _is_old(each) and _is_slim(each)]


def _is_slim(path: Path) -> bool:
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else None
    except (OSError, ValueError, RecursionError):
        return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and {"fixify", "fixify.version"} <= metadata.keys()


def remove(found: list[Path]) -> None:
    """Remove files and folders; those that are gone already are skipped.

    Raises:
        OutputError: one cannot be removed.
    """
    for each in found:
        try:
            if each.is_dir() and not each.is_symlink():
                shutil.rmtree(each)
            else:
                each.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise OutputError(f"Cannot remove {each}, which a killed process left: {error.strerror}.") from error


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Lock a temporary folder within the block.

    Yield False if a living process writes to it or removes it, True if not, and None where folders cannot be locked.
    A file counts as free: it is written while its process holds the folder of the same output.
    """
    if sys.platform == "win32":
        yield None
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield True
        return
    try:
        yield _flock(descriptor, wait)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, wait: bool) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return None if error.errno in _NO_LOCKS else False
    return True


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime >= _OLD
    except FileNotFoundError:
        return True


class FolderLock:
    """A lock on a folder: one process at a time, until it releases the lock or ends.

    The file in the folder names the process. Where the file system has no locks, the file alone counts, as long as
    the process that it names may be alive.

    Args:
        folder: The folder; `acquire` creates it.
        what: What the process does there, for the message.
    """

    FILE = "running.lock"
    _held_here: set[Path] = set()  # noqa: RUF012  (the system does not keep two locks of one process apart)

    def __init__(self, folder: Path, what: str = "trains in") -> None:
        self.folder, self.what = folder, what
        self._path = folder / self.FILE
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            OutputError: another process has it, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self.folder.resolve() / self.FILE
            if self._path in self._held_here:
                raise self._taken(_this_process())
            while self._descriptor is None:
                self._descriptor = self._try()
        except OSError as error:
            raise OutputError(f"Cannot use the folder {self.folder}: {error.strerror}.") from error
        self._held_here.add(self._path)

    def release(self) -> None:
        """Give the lock back and remove its file; nothing happens if it was not taken."""
        if self._descriptor is None:
            return
        if os.name == "posix":  # removed while it is locked, so that it is nobody else's
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        if os.name != "posix":  # which cannot remove an open file
            self._path.unlink(missing_ok=True)
        self._descriptor = None
        self._held_here.discard(self._path)

    def _try(self) -> int | None:
        """Return the open, locked file; None if its owner removed it at this moment."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            owner = os.read(descriptor, 200).decode(errors="replace")
            if not _lock(descriptor, owner):
                raise self._taken(owner)
            if not _is_still(descriptor, self._path):
                os.close(descriptor)
                return None
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, _this_process().encode())
        except (OSError, OutputError):
            os.close(descriptor)
            raise
        return descriptor

    def _taken(self, owner: str) -> OutputError:
        number, _, host = owner.partition(" on ")
        by = f"Process {number} on {host}" if number.isdecimal() and host.isprintable() else "Another process"
        return OutputError(
            f"{by} {self.what} {self.folder}.",
            hint=f"Wait until it ends, or stop it; or choose another folder with -o. If there is no such process, "
            f"remove {self._path}.",
        )


def _this_process() -> str:
    return f"{os.getpid()} on {platform.node() or 'this computer'}"


def _lock(descriptor: int, owner: str) -> bool:
    """Lock a file for this process, not for those that it forks; return whether it worked."""
    if sys.platform == "win32":
        return not _may_be_alive(owner)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        return not _may_be_alive(owner)
    return True


def _may_be_alive(owner: str) -> bool:
    """Check whether the process that a file names may be alive: on this computer, or on another one."""
    number, _, host = owner.partition(" on ")
    if not (number.isascii() and number.isdigit()):
        return False
    if f"{number} on {host}" == _this_process():
        return False  # an earlier process with this number
    if host != _this_process().partition(" on ")[2] or sys.platform == "win32":
        return True
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
