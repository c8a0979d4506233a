"""Reading what `torch.save` wrote, and nothing that could run code.

Only `torch.load(weights_only=True)` ever sees the pickle. It builds tensors, containers and plain values; the few
other things that training scripts leave in a checkpoint are replaced by inert stand-ins, so that no code of
another library runs either. There is no way around it: a file that it refuses is refused.
"""

from __future__ import annotations

import argparse
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

from fixify.checkpoints.sniffing import kind_of
from fixify.errors import SourceError, UnsafeCheckpointError

# What reading hostile bytes may raise inside torch: a parser built from Python operations fails in any of their ways.
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
# What a state dict is made of, as names in its pickle.
_TENSOR_GLOBAL = re.compile(
    r"torch\._utils\._rebuild_\w+|collections\.OrderedDict|torch\.(storage\.)?\w*Storage|torch\.\w+\d+"
)
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")


class _Ignored:
    """Stands in for an object that rides along in a checkpoint and is not needed: paths, dates, NumPy's."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _PlainDict:
    """Stands in for a dictionary class of another library: what is built is an ordered dictionary."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


# Seen in checkpoints of timm, torchvision's reference scripts and Lightning, beside the weights.
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


def read_zip(path: Path) -> object:
    """What `torch.save` put into a zip archive; its tensors are memory-mapped, none of their bytes is read yet.

    Raises:
        UnsafeCheckpointError: it would run code, or its sizes lie.
        SourceError: it is another kind of zip, or damaged.
    """
    _check_archive(path)
    # torch hands a path that ends in .safetensors to the other library, whatever it holds
    return _load(path, mmap=path.suffix != ".safetensors")


def read_legacy(path: Path) -> object:
    """What `torch.save` wrote before PyTorch 1.6 (or still does, when asked): read into memory.

    Raises:
        UnsafeCheckpointError: it would run code.
        SourceError: it is another kind of pickle, or damaged.
    """
    return _load(path, mmap=False)


def _load(path: Path, *, mmap: bool) -> object:
    # Entries that the caller's program allows already stay; the context would take them away on leaving.
    present = torch.serialization.get_safe_globals()
    allowed: tuple[Any, ...] = (argparse.Namespace, *_STAND_INS)
    extra = [entry for entry in allowed if entry not in present]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(extra):
            warnings.simplefilter("ignore")  # advice to the author of the file, not to its reader
            if mmap:
                return torch.load(str(path), weights_only=True, map_location="cpu", mmap=True)
            with open(path, "rb") as file:
                return torch.load(file, weights_only=True, map_location="cpu")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error
    except _PARSER_ERRORS as error:
        raise _refusal(path, str(error)) from error


def _refusal(path: Path, reason: str) -> SourceError:
    found = _REFUSED_GLOBAL.search(reason)
    if found is not None:
        return _unsafe(path, found[1] if "." in found[1] else f"builtins.{found[1]}")
    if "Unsupported operand" in reason:
        # Protocols above 2 have operations that torch's reader does not know: look, without running anything.
        protocol, names = _looked_through(path)
        foreign = [name for name in names if not _TENSOR_GLOBAL.fullmatch(name)]
        if foreign:
            return _unsafe(path, foreign[0])
        if protocol > 2:
            return SourceError(
                f"{path} was saved with pickle protocol {protocol}; PyTorch's safe reader reads protocol 2.",
                hint="Save it again without pickle_protocol, where it was made: torch.save(model.state_dict(), ...)",
            )
    lines = [line.strip() for line in reason.splitlines() if line.strip() and not line.startswith("Check the doc")]
    return SourceError(
        f"{path} is not a checkpoint, or is cut short or damaged: {lines[-1][:160] if lines else 'it ends too early'}",
        hint="Compare its size with the original, or download it again.",
    )


def _unsafe(path: Path, name: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{path} was refused: its pickle asks for {name}, and a pickle that may call what it likes can run any code. "
        "Nothing was run.",
        hint="If it holds a whole model that you trust, save its weights where it was made: "
        "torch.save(model.state_dict(), 'weights.pth')",
    )


def _looked_through(path: Path) -> tuple[int, list[str]]:
    """The protocol of the pickle in a file and the names that it asks for, in order; read as text, never looked up."""
    protocol = 0
    strings: list[str] = []
    names: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings of protocol 0
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
        pass  # damaged further on: what was read so far is what there is to say
    return protocol, names


def _pickle_bytes(path: Path) -> bytes:
    if kind_of(path) != "zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise SourceError(
            f"{path} is cut short or damaged: the directory at the end of the archive cannot be read ({error}).",
            hint="Compare its size with the original, or download it again.",
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise SourceError(
            f"{path} is a TorchScript program, not weights.",
            hint="Save its weights: torch.save(torch.jit.load('model.pt').state_dict(), 'weights.pth')",
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        raise SourceError(
            f"{path} is a program of torch.export, not weights.",
            hint="Save its weights: torch.save(torch.export.load('model.pt2').state_dict, 'weights.pth')",
        )
    if names and all(name.endswith(".npy") for name in names):
        raise SourceError(f"{path} is a NumPy archive (.npz); fixify reads PyTorch and safetensors checkpoints.")
    if not any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
        raise SourceError(
            f"{path} is a zip archive without a checkpoint in it.",
            hint="If a checkpoint was packed into it, unpack it first.",
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise UnsafeCheckpointError(
                f"{path} was refused: {entry.filename} in it is compressed or encrypted "
                f"({entry.compress_size} bytes that claim to be {entry.file_size}); torch.save never does that.",
                hint="If you packed it yourself, save it again with torch.save.",
            )
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UnsafeCheckpointError(
            f"{path} was refused: it lists {twice} twice; readers disagree on which of them counts.",
            hint="Download it again, from a place you trust.",
        )
    claimed, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if claimed > size:
        raise UnsafeCheckpointError(f"{path} was refused: its entries claim {claimed} bytes and the file has {size}.")
