"""Read what `torch.save` wrote, without running any code from the file.

Only `torch.load(weights_only=True)` reads the pickle. It builds tensors, containers and plain values. The few other
objects that training scripts leave in a checkpoint are replaced by inert stand-ins, so no code of another library runs
either. No option overrides this: a file that the reader refuses is refused.
"""

from __future__ import annotations

import argparse
import copy
import mmap
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.serialization

from fixify.checkpoints.outline import MAX_ENTRIES
from fixify.checkpoints.sniffing import kind_of
from fixify.errors import SourceError, UnsafeCheckpointError

# The errors that torch's reader raises for hostile bytes. It is written in Python, so damaged input can make any of its
# operations fail.
_PARSER_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
)
# The globals that the pickle of a state dict needs.
_TENSOR_GLOBAL = re.compile(
    r"torch\._utils\._rebuild_\w+|collections\.OrderedDict|torch\.(storage\.)?\w*Storage|torch\.\w+\d+"
)
# A string in the pickle of each framework's checkpoints -> its name, and the key of the weights.
_TRAINERS = {
    b"pytorch-lightning_version": ("Lightning", "state_dict"),
    b"mmengine_version": ("mmengine", "state_dict"),
    b"ds_version": ("DeepSpeed", "module"),
}
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")


class _Ignored:
    """A stand-in for an object that is saved with a checkpoint and not needed: a path, a date, a NumPy value."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _PlainDict:
    """A stand-in for a dictionary class of another library; an ordered dictionary is built instead."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


# These occur beside the weights in checkpoints of timm, torchvision's reference scripts and Lightning.
_STAND_INS: tuple[tuple[Any, str], ...] = (
    *(
        (_Ignored, name)
        for name in (
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.dtype",
            "numpy.ndarray",
            "datetime.datetime",
            "datetime.timedelta",
            "torch.torch_version.TorchVersion",
            "pathlib.PosixPath",
            "pathlib.WindowsPath",
            "pathlib.PurePosixPath",
            "pathlib._local.PosixPath",
            "pathlib._local.WindowsPath",
            "builtins.dict",
            "builtins.list",
        )
    ),
    *(
        (_PlainDict, name)
        for name in (
            "collections.defaultdict",
            "pytorch_lightning.utilities.parsing.AttributeDict",
            "lightning.pytorch.utilities.parsing.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
            "lightning.fabric.utilities.data.AttributeDict",
        )
    ),
)


# Limits of a checkpoint of an image model, so that a small file cannot keep the reader busy.
_MAX_KEY = 10_000  # values in one tuple, those inside it included: a tuple is hashed as a whole
_LONGEST_REASON = 2_000  # characters of torch's message
_LONGEST_GLOBAL = 1_000
_CHUNK = 1 << 20


# Larger files are mapped, since they may not fit into memory. Whoever cuts off a mapped file ends the process.
LARGEST_COPY = 4 << 30


def read_zip(path: Path, *, meta: bool = False) -> object:
    """Read a zip archive that `torch.save` wrote.

    Args:
        path: The file.
        meta: Only names and shapes are needed: the tensors are memory-mapped, and not compared with the archive's
            checksums. The pickle is, in any case.

    Raises:
        UnsafeCheckpointError: the pickle would run code or never end, or the archive lies about sizes.
        SourceError: it is another kind of zip archive, or is damaged.
    """
    _check_archive(path, check=not meta)
    # torch passes any path that ends in .safetensors to the safetensors library, whatever the file holds
    return _load(path, mmap=(meta or path.stat().st_size > LARGEST_COPY) and path.suffix != ".safetensors")


def read_legacy(path: Path) -> object:
    """Read a pickle that `torch.save` wrote before PyTorch 1.6 (or on request since) into memory.

    Raises:
        UnsafeCheckpointError: the pickle would run code or never end.
        SourceError: it is another kind of pickle, or is damaged.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _refuse_endless(path, content)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _load(path, mmap=False)


def _load(path: Path, *, mmap: bool) -> object:
    # Do not add what the calling program allows already: the context manager would remove it on exit.
    present = torch.serialization.get_safe_globals()
    allowed: tuple[Any, ...] = (argparse.Namespace, *_STAND_INS)
    extra = [entry for entry in allowed if entry not in present]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(extra):
            warnings.simplefilter("ignore")  # advice for the author of the file
            if mmap:
                return torch.load(str(path), weights_only=True, map_location="cpu", mmap=True)
            with open(path, "rb") as file:
                return torch.load(file, weights_only=True, map_location="cpu")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error
    except _PARSER_ERRORS as error:
        raise _refusal(path, str(error)) from error


def _refusal(path: Path, reason: str) -> SourceError:
    reason = reason[:_LONGEST_REASON]  # it has the names in the pickle, however long they are
    found = _REFUSED_GLOBAL.search(reason)
    if found is not None:
        return _unsafe(path, found[1] if "." in found[1] else f"builtins.{found[1]}")
    if "Unsupported operand" in reason:
        # torch's reader does not know the operations of protocols above 2. Scan the pickle without running anything.
        protocol, names = _scan(path)
        foreign = [name for name in names if not _TENSOR_GLOBAL.fullmatch(name)]
        if foreign:
            return _unsafe(path, foreign[0])
        if protocol > 2:
            return SourceError(
                f"{path} was saved with pickle protocol {protocol}; PyTorch's safe reader reads protocol 2.",
                hint="Save it again where it was made, without pickle_protocol: torch.save(model.state_dict(), ...)",
            )
    lines = [line.strip() for line in reason.splitlines() if line.strip() and not line.startswith("Check the doc")]
    return SourceError(
        f"{path} is not a checkpoint, or is cut short or damaged: {lines[-1][:160] if lines else 'it ends too early'}",
        hint="Compare its size with the original, or download it again.",
    )


def _unsafe(path: Path, name: str) -> UnsafeCheckpointError:
    trainer = _trainer_of(path)
    if trainer is not None:
        who, key = trainer
        return UnsafeCheckpointError(
            f"{path} was refused: its pickle asks for {name}, which could run any code. Nothing was run.",
            hint=f"It is a checkpoint of {who}. If you trust it, load it where it was made, and save only its weights: "
            f"torch.save(checkpoint[{key!r}], 'weights.pth')",
        )
    return UnsafeCheckpointError(
        f"{path} was refused: its pickle asks for {name}, which could run any code. Nothing was run.",
        hint="If it holds a whole model that you trust, save only its weights where it was made: "
        "torch.save(model.state_dict(), 'weights.pth')",
    )


def _trainer_of(path: Path) -> tuple[str, str] | None:
    """Return which framework's trainer wrote a zip archive, and its key of the weights; None if it is unknown."""
    try:
        content = _pickle_bytes(path) if kind_of(path) == "zip" else b""
    except (ValueError, LookupError, OSError, StopIteration, zipfile.BadZipFile):
        return None
    return next((found for mark, found in _TRAINERS.items() if mark in content), None)


def _scan(path: Path) -> tuple[int, list[str]]:
    """Return the protocol of a file's pickle and the globals that it asks for, in order, without importing them."""
    protocol = 0
    strings: list[str] = []
    names: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in strings of protocol 0
            for operation, argument, _ in pickletools.genops(_pickle_bytes(path)):
                if operation.name == "PROTO":
                    protocol = int(argument or 0)
                elif operation.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL" and len(strings) >= 2:
                    names.append(f"{strings[-2]}.{strings[-1]}")
                elif isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, LookupError, struct.error, OverflowError, EOFError, zipfile.BadZipFile):
        pass  # the rest is damaged; report what was read so far
    return protocol, names


def _refuse_endless(path: Path, content: bytes | mmap.mmap) -> None:
    """Refuse pickles whose tuples hold themselves again and again: hashing such a key takes for ever.

    A tuple that is built of two references to another one, which is built in the same way, takes three bytes and
    doubles the number of values. torch's reader hashes the tuples that are keys, and cannot be interrupted then.
    """
    place = 0
    try:
        for _ in range(_OLD_PICKLES):
            largest, place = _largest_tuple(content, place)
            if largest > _MAX_KEY:
                raise UnsafeCheckpointError(
                    f"{path} was refused: its pickle holds a tuple of more than {_MAX_KEY:,} values, or the name of a "
                    f"global with more than {_LONGEST_GLOBAL:,} characters. torch.save never writes that.",
                    hint="Download it again from a source that you trust.",
                )
    except (LookupError, ValueError):
        pass  # cut short, or not a pickle; torch's reader says what is wrong


_OLD_PICKLES = 5  # of the older format: magic number, protocol, system, tree, names of the storages
_MARK = -1  # on the stack of sizes
# What follows the byte of an operation: a number of bytes, a length (of 1 or 4 bytes) and as many bytes, or lines.
_FIXED = dict(zip(b"hqjrKMJGRb\x80\x82", (1, 1, 4, 4, 1, 2, 4, 8, 0, 0, 1, 1), strict=True))
_COUNTED = dict(zip(b"UTXC\x8aB\x8c", (1, 4, 4, 1, 1, 4, 1), strict=True))
_LINES = dict.fromkeys(b"ILFSVPgp", 1) | dict.fromkeys(b"ci", 2)
_TUPLES = dict(zip(b"\x85\x86\x87", (1, 2, 3), strict=True))
# How many values an operation takes from the stack and puts there, where it does not go down to a mark.
_EFFECTS = {
    **dict.fromkeys(b"KMJGUTXCBILFSVNcP\x88\x89\x8a\x8c]}\x8f", (0, 1)),
    **dict.fromkeys(b"R\x81ab\x93", (2, 1)),
    **dict.fromkeys(b"Q", (1, 1)),
    **dict.fromkeys(b"0", (1, 0)),
    **dict.fromkeys(b"s", (3, 1)),
    **dict.fromkeys(b"\x80", (0, 0)),
}
_TO_THE_MARK = {**dict.fromkeys(b"eu1\x90", 0), **dict.fromkeys(b"ldi", 1)}  # and how many they put


def _largest_tuple(content: bytes | mmap.mmap, place: int) -> tuple[int, int]:
    """Follow the sizes of the values in a pickle, without making them.

    An operation that torch's reader does not know ends the scan, as it ends the reading.

    Returns:
        How many values the largest tuple holds (not much more than the limit; more than it for a name that is too
        long), and where the next pickle starts.
    """
    stack: list[int] = []
    marks: list[int] = []  # where the marks are on the stack
    memo: dict[int, int] = {}
    largest = 0
    while True:
        code = content[place]
        place += 1
        start = place
        if code in _FIXED:
            place += _FIXED[code]
        elif code in _COUNTED:
            place += _COUNTED[code]
            place += int.from_bytes(content[start:place], "little")
        elif code in _LINES:
            for _ in range(_LINES[code]):
                # torch's reader takes all that is left if the line has no end.
                place = content.find(b"\n", place) + 1 or len(content)
            if code in b"ci" and place - start > _LONGEST_GLOBAL:  # torch's own search in its message is quadratic
                return _MAX_KEY + 1, place
        if code in b"qrp":
            memo[_number_at(content, code, start, place)] = stack[-1]
        elif code in b"hjg":
            stack.append(memo[_number_at(content, code, start, place)])
        elif code == 40:  # (
            marks.append(len(stack))
            stack.append(_MARK)
        elif code in _TUPLES or code == 116:  # t
            count = _TUPLES[code] if code in _TUPLES else len(stack) - 1 - marks.pop()
            size = 1 + sum(stack[len(stack) - count :]) if count else 1
            del stack[len(stack) - count - (code == 116) :]
            stack.append(size)
            largest = max(largest, size)
        elif code == 41:  # )
            stack.append(1)
        elif code == 50:  # 2
            stack.append(stack[-1])
        elif code in _EFFECTS:
            taken, put = _EFFECTS[code]
            if taken:
                del stack[len(stack) - taken :]
            if put:
                stack.append(1)
        elif code in _TO_THE_MARK:
            del stack[marks.pop() :]
            if _TO_THE_MARK[code]:
                stack.append(1)
        else:  # the end, or an operation that is unknown to torch's reader
            return largest, place
        if largest > _MAX_KEY:
            return largest, place


def _number_at(content: bytes | mmap.mmap, code: int, start: int, end: int) -> int:
    argument = content[start:end]
    return int(argument) if code in b"pg" else int.from_bytes(argument, "little")


def _pickle_bytes(path: Path) -> bytes:
    if kind_of(path) != "zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        return _read_entry(archive, entry, keep=True)


def _check_archive(path: Path, *, check: bool) -> None:
    """Check the directory of an archive, the checksums of what it lists, and its pickle."""
    entries = _entries(path)
    _check_entries(path, entries)
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in entries:
                is_pickle = entry.filename.endswith("data.pkl")
                # torch.save may be told to leave out the checksums; they are 0 then.
                if is_pickle or (check and entry.CRC):
                    content = _read_entry(archive, entry, keep=is_pickle)
                    if is_pickle:
                        _refuse_endless(path, content)
    except (zipfile.BadZipFile, EOFError, struct.error, ValueError, NotImplementedError, RuntimeError) as error:
        raise SourceError(
            f"{path} is damaged: {entry.filename} in it is not what was written ({error}).",
            hint="Compare its size with the original, or download it again.",
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, *, keep: bool) -> bytes:
    """Read one entry, and compare it with its checksum if it has one; return its bytes only if they are kept.

    Raises:
        zipfile.BadZipFile: they differ, or the directory of the archive contradicts the entry.
    """
    if not entry.CRC:
        entry = copy.copy(entry)
        del entry.CRC  # zipfile then compares nothing
    kept = []
    with archive.open(entry) as content:
        while chunk := content.read(_CHUNK):
            if keep:
                kept.append(chunk)
    return b"".join(kept)


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise SourceError(
            f"{path} is cut short or damaged: the directory at the end of the archive cannot be read ({error}).",
            hint="Compare its size with the original, or download it again.",
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len(names) > MAX_ENTRIES:
        raise UnsafeCheckpointError(f"{path} was refused: it lists {len(names):,} entries, more than any model has.")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise SourceError(
            f"{path} is a TorchScript program, not a state dict.",
            hint="Save its weights: torch.save(torch.jit.load('model.pt').state_dict(), 'weights.pth')",
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        raise SourceError(
            f"{path} is a program of torch.export, not a state dict.",
            hint="Save its weights: torch.save(torch.export.load('model.pt2').state_dict, 'weights.pth')",
        )
    if names and all(name.endswith(".npy") for name in names):
        raise SourceError(f"{path} is a NumPy archive (.npz); fixify reads PyTorch and safetensors checkpoints.")
    if not any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
        raise SourceError(
            f"{path} is a zip archive without a checkpoint in it.",
            hint="If it contains a checkpoint file, unpack it first.",
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise UnsafeCheckpointError(
                f"{path} was refused: {entry.filename} in it is compressed or encrypted "
                f"({entry.compress_size} bytes that claim to be {entry.file_size}). torch.save never does that.",
                hint="If you packed it yourself, save it again with torch.save.",
            )
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UnsafeCheckpointError(
            f"{path} was refused: it lists {twice} twice; readers disagree about which one counts.",
            hint="Download it again from a source that you trust.",
        )
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > size:
        raise UnsafeCheckpointError(f"{path} was refused: its entries claim {claimed} bytes and the file has {size}.")
