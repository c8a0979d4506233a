"""Reading safetensors. The library checks the header (size, offsets, shapes) before anything is mapped."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fixify.errors import SourceError, UnsafeCheckpointError
from fixify.sources.names import DTYPES, unusual_dtype

# Entries of the metadata, of files that fixify wrote.
SLIM_KEY = "fixify"
LANGUAGE_KEY = "fixify.language"
# The library's own limit.
_MAX_HEADER = 100_000_000
_AGAIN = "Compare its size with the original, or download it again."


@dataclass(frozen=True)
class SafetensorsContents:
    """The tensors of one file in the order of their bytes, and its metadata (string -> string)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: Path, *, meta: bool = False) -> SafetensorsContents:
    """Read a safetensors file: memory-mapped tensors, or with `meta` their shapes and dtypes from the header alone.

    Raises:
        UnsafeCheckpointError: the header lies about what the file holds.
        SourceError: it cannot be read, is cut short, or holds a dtype that no image model is stored in.
    """
    _check_header_size(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.offset_keys())
            for name in names:
                _check_tensor(path, name, file.get_slice(name))
            tensors = {name: _on_meta(file, name) if meta else file.get_tensor(name) for name in names}
            return SafetensorsContents(tensors, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise _disagreement(path, str(error).removeprefix("Error while deserializing header: ")) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def has_metadata(path: Path | str, key: str) -> bool:
    """Whether it is a safetensors file with this entry in its metadata. Only the header is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return key in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _on_meta(file: safe_open, name: str) -> Tensor:
    piece = file.get_slice(name)
    return torch.empty(piece.get_shape(), dtype=DTYPES[piece.get_dtype()], device="meta")


def _check_tensor(path: Path, name: str, piece: Any) -> None:
    if piece.get_dtype() not in DTYPES:
        raise unusual_dtype(path.name, name, piece.get_dtype())
    # A dimension of zero makes any shape fit zero bytes; torch still computes strides from the others.
    if math.prod(max(size, 1) for size in piece.get_shape()) * 8 >= 1 << 63:
        raise UnsafeCheckpointError(
            f"{path} was refused: {name} has the shape {piece.get_shape()}, which no memory can hold.", hint=_AGAIN
        )


def _check_header_size(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8:
        raise SourceError(f"{path} is no safetensors file: {size} bytes are less than a header has.", hint=_AGAIN)
    header = int.from_bytes(start, "little")
    if header > _MAX_HEADER:
        raise UnsafeCheckpointError(
            f"{path} was refused: it claims a header of {header} bytes; safetensors allows {_MAX_HEADER}.",
            hint=_AGAIN,
        )
    if header > size - 8:
        raise SourceError(
            f"{path} is cut short: its header has {header} bytes, and the whole file {size}.", hint=_AGAIN
        )


def _disagreement(path: Path, reason: str) -> SourceError:
    size, described = path.stat().st_size, _described_bytes(path)
    if described is not None and described > size:
        return SourceError(f"{path} is cut short: its header describes {described} bytes, it has {size}.", hint=_AGAIN)
    return UnsafeCheckpointError(
        f"{path} was refused: its header does not describe what it holds ({reason}).", hint=_AGAIN
    )


def _described_bytes(path: Path) -> int | None:
    """Size that the file should have by its header, for the message; None if the header is beyond reading."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        try:
            entries = json.loads(file.read(header)).values()
            return 8 + header + max(entry["data_offsets"][1] for entry in entries if "data_offsets" in entry)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
