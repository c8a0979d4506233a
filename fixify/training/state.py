"""The file that a run's state is in: sealed with its own checksum, and never without a whole one before it.

A state is what `torch.save` writes, a zip archive, and carries as the archive's comment the SHA-256 of every byte
before it. Nothing of a file whose seal does not fit is parsed. (The archive's own checksums would not do: `torch.load`
does not look at them.)
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixify._io import atomic_path
from fixify.errors import OutputError, TrainingError

STATE_FILE, PREVIOUS_STATE_FILE = "state.pt", "state-previous.pt"

_SEAL = 64  # hexadecimal digits of a SHA-256
_NO_COMMENT, _COMMENT = (0).to_bytes(2, "little"), _SEAL.to_bytes(2, "little")
_CHUNK = 1 << 20


def write_sealed(folder: Path, content: dict[str, Any]) -> None:
    """Write the state; the one before becomes `state-previous.pt`, in the moment in which the new one is whole.

    Raises:
        OutputError: the disk is full, or the folder cannot be written; both states are as they were.
    """
    path = folder / STATE_FILE
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch's zip writer makes of any failure to write
            raise OutputError(f"Cannot write {path}: {_why(folder, content)}.", hint=_KEPT) from error
        _seal(temporary)
        if path.exists():
            path.replace(folder / PREVIOUS_STATE_FILE)


def read_sealed(path: Path, device: torch.device) -> dict[str, Any] | None:
    """What `write_sealed` wrote, tensors on `device`; None if there is no such file, or it is damaged.

    Raises:
        TrainingError: the file cannot be read.
    """
    try:
        if not _is_sealed(path):
            return None
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrainingError(f"Cannot read {path}: {error.strerror}.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError):  # sealed by somebody else: it holds more than plain values
        return None
    return content if isinstance(content, dict) else None


_KEPT = "The state before it was kept: make room, and go on with --resume."


def _why(folder: Path, content: dict[str, Any]) -> str:
    needed, free = _bytes_of(content), shutil.disk_usage(folder).free
    if free < needed:
        return f"the disk is full; the state takes {_megabytes(needed)}"
    return f"writing its {_megabytes(needed)} failed"


def _bytes_of(content: Any) -> int:
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(_bytes_of, content.values()))
    return sum(map(_bytes_of, content)) if isinstance(content, (list, tuple)) else 0


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _seal(path: Path) -> None:
    """Add the comment: its length, which are the last two bytes of a zip archive without one, and itself."""
    with open(path, "r+b") as file:
        digest = _digest(file, os.fstat(file.fileno()).st_size - len(_NO_COMMENT))
        if file.read() != _NO_COMMENT:
            raise OutputError(f"Cannot seal {path}: torch wrote a zip archive with a comment.")
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_COMMENT + digest)
        file.flush()
        os.fsync(file.fileno())  # before the state that it replaces gets another name


def _is_sealed(path: Path) -> bool:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - len(_COMMENT) - _SEAL
        return size > 0 and _COMMENT + _digest(file, size) == file.read()


def _digest(file: Any, size: int) -> bytes:
    """Of the first `size` bytes, after which the file is then."""
    found = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(_CHUNK, size))):
        found.update(chunk)
        size -= len(chunk)
    return found.hexdigest().encode()
