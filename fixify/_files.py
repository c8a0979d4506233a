"""Write files in one step, and read files that stay the same.

A written file is complete, replaces no other one unasked, and leaves nothing behind. A file that is read has to be a
regular one, and `unchanged` notices if somebody writes to it meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fixify.errors import FixifyError, OutputError, OutputExistsError

_CHUNK = 1 << 20


def refuse_existing(path: Path, *, force: bool) -> None:
    """Check that an output can be written; call this before the work that produces it.

    Raises:
        OutputExistsError: `path` exists and `force` is False. A link that leads nowhere counts too.
        OutputError: `path` is a folder, a device or a pipe; its folder does not exist; or the system refuses the name.
    """
    try:
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            raise OutputError(f"{path.parent} is not a folder.", hint="Choose another name with -o.")
    except (FileNotFoundError, NotADirectoryError):
        hint = f"Create it first: mkdir -p {path.parent}"
        raise OutputError(f"The folder {path.parent} does not exist.", hint=hint) from None
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    try:
        mode = path.lstat().st_mode
        mode = path.stat().st_mode if path.exists() else mode  # of what a link leads to
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise OutputError(f"{path} is {_what(mode)}, not a file.", hint="Choose another name with -o.")
    if not force:
        raise _exists(path)


@contextlib.contextmanager
def atomic_path(path: Path, *, force: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success sync it and rename it to `path`, otherwise remove it.

    The file has the mode that `open()` would give it (safetensors itself writes 0600).

    Args:
        path: The file.
        force: Replace a file that exists by then. If not, only one of several writers succeeds.

    Raises:
        OutputExistsError: `path` exists and `force` is False.
        OutputError: the disk is full, or the folder is not writable.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"Cannot write {path.name} in {path.parent}: {reason}.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        if force:
            temporary.replace(path)
        else:
            _move_new(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"Cannot write {path}: {reason}.", hint="Nothing was changed.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` in one step: readers see either the old file or the complete new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def require_regular(path: Path | str, error: type[FixifyError], hint: str = "Give a checkpoint file.") -> None:
    """Check that an input exists and is a regular file: opening a named pipe would wait for a writer for ever.

    Args:
        path: The file.
        error: Raised otherwise, with what the path is instead.
        hint: What to do then.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise error(f"There is no file {path}.") from None
    except (OSError, ValueError) as failed:
        reason = failed.strerror if isinstance(failed, OSError) else failed
        raise error(f"{path} cannot be read: {reason}.") from failed
    if not stat.S_ISREG(mode):
        raise error(f"{path} is {_what(mode)}, not a file.", hint=hint)


@contextlib.contextmanager
def unchanged(path: Path, error: type[FixifyError]) -> Iterator[None]:
    """Check that a file is the same after the block as before: neither replaced, cut off nor written to.

    Args:
        path: The file.
        error: Raised if it changed, even if the block failed: that is then the reason.
    """
    before = _state_of(path)
    try:
        yield
    except Exception as failed:
        if _state_of(path) != before:
            raise _changed(path, error) from failed
        raise
    if _state_of(path) != before:
        raise _changed(path, error)


def sha256_of(path: Path, on_progress: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits.

    Args:
        path: The file.
        on_progress: Called with the number of bytes in each chunk that was read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if on_progress is not None:
                on_progress(len(chunk))
    return digest.hexdigest()


def _state_of(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _changed(path: Path, error: type[FixifyError]) -> FixifyError:
    hint = "Run this again when no other program writes to the file."
    return error(f"{path} changed while it was read.", hint=hint)


def _move_new(temporary: Path, path: Path) -> None:
    """Give a file its name, unless another file has it: a link is refused where a rename would replace."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without hard links
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise _exists(path) from None
        temporary.replace(path)


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError(f"{path} exists already.", hint="Choose another name with -o, or add --force.")


def _cannot_write(path: Path, error: OSError | ValueError) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) else error
    return OutputError(f"Cannot write {path}: {reason}.", hint="Choose another name with -o.")


def _what(mode: int) -> str:
    for test, what in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return what
    return "something else"


def _umask() -> int:
    # os.umask reads the umask only by setting it, which is a race between threads. Linux shows it in /proc.
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass  # not Linux
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
