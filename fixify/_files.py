"""Write files in one step, so that no partial file is left and no existing file is lost."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fixify.errors import OutputError, OutputExistsError

_CHUNK = 1 << 20


def refuse_existing(path: Path, *, force: bool) -> None:
    """Check that an output can be written; call this before the work that produces it.

    Raises:
        OutputExistsError: `path` exists and `force` is False.
        OutputError: its folder does not exist.
    """
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists already.", hint="Choose another name with -o, or add --force.")
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist.", hint=f"Create it first: mkdir -p {path.parent}")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success sync it and rename it to `path`, otherwise remove it.

    The file has the mode that `open()` would give it (safetensors itself writes 0600).

    Raises:
        OutputError: the disk is full, or the folder is not writable.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise OutputError(f"Cannot write in {path.parent}: {error.strerror}.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
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
