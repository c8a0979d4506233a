"""Read matrices of numbers, a few rows at a time, from .npy, .npz and .safetensors files.

Nothing is unpickled. Sizes are compared with those of the file before memory is taken for them.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fixify._files import require_regular
from fixify.errors import SourceError, UnsafeCheckpointError

SUFFIXES = (".npy", ".npz", ".safetensors")

_AT_ONCE = 1 << 22  # numbers
_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000
_MOST_ARRAYS = 1000
_MOST_EXPANSION = 100  # trained weights hardly compress
_DESCR = re.compile(r"'descr':\s*'([<>|=]?)([A-Za-z])(\d+)'")
_ORDER = re.compile(r"'fortran_order':\s*(True|False)")
_SHAPE = re.compile(r"'shape':\s*\(([0-9, ]{0,200})\)")
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OF_ZIP = (zipfile.BadZipFile, zlib.error, UnicodeDecodeError, NotImplementedError)
"""What zipfile raises for damaged archives: names that are no text, methods and versions that it does not know."""
_AGAIN = "Write it again, or copy it again."


@dataclass(frozen=True)
class StoredArray:
    """An array in a file.

    Attributes:
        shape: Its shape, without dimensions of size 1 at the end beyond the second: a 1x1 convolution is a matrix.
        is_float: Whether its numbers are floating point of 16, 32 or 64 bits.
        num_bytes: Its size in the file, unpacked.
        rows: Yields its values, float32, as parts [k, ...] of its first dimension; the whole if it has no dimension.
    """

    shape: tuple[int, ...]
    is_float: bool
    num_bytes: int
    rows: Callable[[], Iterator[Tensor]]

    def read(self) -> Tensor:
        """Read all values: float32 of `shape`."""
        values = torch.empty(self.shape)
        start = 0
        for part in self.rows():
            part = part.reshape(-1, *self.shape[1:])
            if not self.shape:
                return part.reshape(())
            values[start : start + len(part)] = part
            start += len(part)
        return values


def stored_arrays(path: Path) -> Mapping[str, StoredArray]:
    """List the arrays of a .npy, .npz or .safetensors file by name; the name of the array of a .npy file is "".

    Raises:
        SourceError: The file cannot be read, is damaged, or holds types of numbers that fixify does not read.
        UnsafeCheckpointError: It holds pickled objects, or lies about its sizes.
    """
    require_regular(path, SourceError, "Give a .npy, .npz or .safetensors file.")
    with _explained(path):
        if path.suffix == ".npz":
            return _of_npz(path)
        if path.suffix == ".npy":
            return {"": _of_npy(path, lambda: open(path, "rb"), path.stat().st_size)}
        return _of_safetensors(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the readers raise for damaged files into a `SourceError`."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        zlib.error,
        SafetensorError,
        EOFError,
        UnicodeDecodeError,
        NotImplementedError,
    ) as error:
        raise SourceError(f"{path} is damaged: {error}.", hint=_AGAIN) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def _of_npz(path: Path) -> dict[str, StoredArray]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > _MOST_ARRAYS:
        raise UnsafeCheckpointError(f"{path} was refused: it lists {len(members):,} arrays.")
    found = {}
    for member in members:
        if not member.filename.endswith(".npy"):
            continue
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SourceError(f"{path} is encrypted, or packed in a way that numpy.savez does not.", hint=_AGAIN)
        if member.file_size > _MOST_EXPANSION * member.compress_size + _AT_ONCE:
            raise UnsafeCheckpointError(
                f"{path} was refused: {member.filename} expands from {member.compress_size:,} to "
                f"{member.file_size:,} bytes."
            )
        name = member.filename.removesuffix(".npy")
        found[name] = _of_npy(path, _opener(path, member.filename), member.file_size)
    return found


def _opener(path: Path, member: str) -> Callable[[], contextlib.AbstractContextManager[BinaryIO]]:
    @contextlib.contextmanager
    def opened() -> Iterator[BinaryIO]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file  # type: ignore[misc]

    return opened


def _of_npy(path: Path, opened: Callable[[], contextlib.AbstractContextManager[BinaryIO]], size: int) -> StoredArray:
    with opened() as file:
        start, (order, kind, item), fortran, shape = _npy_header(path, file)
    if prod(shape) * item != size - start:
        raise SourceError(
            f"{path} is damaged: its header describes {prod(shape) * item:,} bytes of numbers, it has "
            f"{size - start:,}.",
            hint=_AGAIN,
        )
    is_float = kind == "f" and item in (2, 4, 8)
    dtype = np.dtype(f"{order}f{item}") if is_float else None

    def rows() -> Iterator[Tensor]:
        if dtype is None:
            return
        along = shape[::-1] if fortran else shape
        width = prod(along[1:])
        step = max(1, _AT_ONCE // max(1, width))
        with _explained(path), opened() as file:
            file.read(start)
            if fortran:  # columns one after another
                whole = _numbers(file, prod(shape), dtype)
                yield torch.from_numpy(np.ascontiguousarray(whole.reshape(shape, order="F")))
                return
            for first in range(0, along[0] if along else 1, step):
                count = min(step, along[0] - first) if along else 1
                yield torch.from_numpy(_numbers(file, count * width, dtype).reshape(count, *along[1:]))

    return StoredArray(_squeezed(shape), is_float, size - start, rows)


def _npy_header(path: Path, file: BinaryIO) -> tuple[int, tuple[str, str, int], bool, tuple[int, ...]]:
    """Read the header of numpy's format (NEP 1): where numbers start, (byte order, kind, bytes), order, shape."""
    magic = file.read(8)
    if not magic.startswith(_MAGIC) or len(magic) < 8 or magic[6] not in (1, 2, 3):
        raise SourceError(f"{path} is not a NumPy array, whatever its name says.", hint=_AGAIN)
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > _LONGEST_HEADER:
        raise UnsafeCheckpointError(f"{path} was refused: it claims a header of {length:,} bytes.")
    text = file.read(length).decode("latin1")
    descr, order, shape = (pattern.search(text) for pattern in (_DESCR, _ORDER, _SHAPE))
    if descr is not None and descr[2] == "O":
        raise UnsafeCheckpointError(
            f"{path} was refused: it holds Python objects, which are pickles that can run code.",
            hint="Save numbers: numpy.save(path, numpy.asarray(values, dtype='float32'))",
        )
    if descr is None or order is None or shape is None:
        raise SourceError(f"{path} is damaged, or holds records instead of numbers.", hint=_AGAIN)
    sizes = tuple(int(part) for part in shape[1].replace(" ", "").split(",") if part)
    item = int(descr[3][:9]) * (4 if descr[2] == "U" else 1)
    return 8 + width + length, (descr[1], descr[2], item), order[1] == "True", sizes


def _numbers(file: BinaryIO, count: int, dtype: np.dtype[np.floating]) -> np.ndarray:
    data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise EOFError("the numbers are cut short")
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused by whoever reads it
        return np.frombuffer(data, dtype=dtype).astype(np.float32)


def _of_safetensors(path: Path) -> dict[str, StoredArray]:
    with safe_open(path, framework="pt") as file:
        names = list(file.offset_keys())
        if len(names) > _MOST_ARRAYS:
            return {}
        pieces = {name: file.get_slice(name) for name in names}
        return {
            name: _of_piece(path, name, tuple(piece.get_shape()), _FLOATS.get(piece.get_dtype()))
            for name, piece in pieces.items()
        }


def _of_piece(path: Path, name: str, shape: tuple[int, ...], item: int | None) -> StoredArray:
    def rows() -> Iterator[Tensor]:
        step = max(1, _AT_ONCE // max(1, prod(shape[1:])))
        with _explained(path), safe_open(path, framework="pt") as file:
            if not shape:
                yield file.get_tensor(name).float()
                return
            piece = file.get_slice(name)
            for first in range(0, shape[0], step):
                yield piece[first : first + step].float()

    return StoredArray(_squeezed(shape), item is not None, prod(shape) * (item or 1), rows)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
