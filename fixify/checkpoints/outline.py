"""Tensors of a checkpoint without their values: name, shape and type, as the header of a safetensors file has them.

Importing this module needs no torch, so that what is asked of names and shapes alone is answered quickly.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from safetensors import SafetensorError, safe_open

from fixify._values import counted
from fixify.checkpoints.header import MAX_HEADER
from fixify.errors import SourceError, UnsafeCheckpointError

# The types of an image model's weights and counters, by their names in safetensors files. Others (float8, packed 4 bit,
# complex) mean nothing without the scales or the code that belong to them.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
STORED = {**DTYPES, "U16": "uint16", "U32": "uint32"}
"""With the codes of slim checkpoints."""
AGAIN = "Compare its size with the original, or download it again."
"""What to do about a damaged file."""
MAX_ENTRIES = 50_000
"""Tensors of a file: more than any model has."""

_BYTES = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "uint32": 4, "int8": 1, "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class Outline:
    """A tensor without its values. What is asked of it here is named as torch names it.

    Attributes:
        dtype: torch's name of its type, for example "float32".
        shape: Its shape.
        is_meta: It has no values.
    """

    dtype: str
    shape: tuple[int, ...]
    is_meta: bool = True

    @classmethod
    def of(cls, tensor: Any) -> Outline:
        """Describe a tensor of torch.

        >>> import torch
        >>> Outline.of(torch.ones(2, 3))
        Outline(dtype='float32', shape=(2, 3), is_meta=True)
        """
        return cls(dtype_name(tensor), tuple(tensor.shape))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """Count its elements."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Return the bytes of an element."""
        return _BYTES.get(self.dtype, 2)

    def is_floating_point(self) -> bool:
        """Return whether it holds floating-point numbers."""
        return "float" in self.dtype

    def reshape(self, shape: Sequence[int]) -> Outline:
        """Return it with another shape of as many elements."""
        return replace(self, shape=tuple(shape))

    def __len__(self) -> int:
        return self.shape[0]


AnyTensor: TypeAlias = Any
"""A tensor of torch, or an outline where only the header of a file was read."""


def is_tensor(value: object) -> TypeGuard[Any]:
    """Return whether a value from a checkpoint is a tensor, with or without its values."""
    if isinstance(value, Outline):
        return True
    torch = sys.modules.get("torch")  # what was not imported has made no tensor
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(tensor: Any) -> str:
    """Return torch's name of the type of a tensor or an outline, for example "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def unusual_dtype(name: str, key: str, dtype: str) -> SourceError:
    """Make the error for a dtype that is not in `DTYPES`."""
    return SourceError(
        f"{name} stores {key} as {dtype}; fixify reads 16, 32 and 64 bit floating point, and plain integers.",
        hint="Quantised weights need the code that made them. Give the checkpoint from before quantisation.",
    )


def read_outlines(path: Path) -> tuple[dict[str, Outline], dict[str, str]]:
    """Read the header of a safetensors file, and check that it describes the file.

    Returns:
        Name -> tensor without values, in the order of their bytes; and the metadata.

    Raises:
        UnsafeCheckpointError: the header lies about what the file holds.
        SourceError: the file cannot be read, is cut short, or holds a dtype that image models do not use.
    """
    _check_header_size(path)
    try:
        with safe_open(path, framework="numpy") as file:  # of the values, which NumPy cannot always hold, none is read
            names = list(file.offset_keys())
            if len(names) > MAX_ENTRIES:
                raise UnsafeCheckpointError(
                    f"{path} was refused: it lists {len(names):,} tensors, more than any model has."
                )
            pieces = {name: file.get_slice(name) for name in names}
            for name, piece in pieces.items():
                _check_tensor(path, name, piece)
            found = {name: outline_of(name, piece) for name, piece in pieces.items()}
            return found, dict(file.metadata() or {})
    except SafetensorError as error:
        raise disagreement(path, error) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def outline_of(name: str, piece: Any) -> Outline:
    """Describe a tensor of an open safetensors file.

    Raises:
        SafetensorError: torch has no such type.
    """
    if piece.get_dtype() not in STORED:
        raise SafetensorError(f"{name} has the type {piece.get_dtype()}")
    return Outline(STORED[piece.get_dtype()], tuple(piece.get_shape()))


def disagreement(path: Path, error: Exception) -> SourceError:
    """Make the error for a file that the library refuses: its header does not describe it."""
    reason = str(error).removeprefix("Error while deserializing header: ")
    size, described = path.stat().st_size, _described_bytes(path)
    if described is not None and described > size:
        return SourceError(f"{path} is cut short: its header describes {described} bytes, it has {size}.", hint=AGAIN)
    return UnsafeCheckpointError(
        f"{path} was refused: its header does not describe what it holds ({reason}).", hint=AGAIN
    )


def _check_tensor(path: Path, name: str, piece: Any) -> None:
    if piece.get_dtype() not in STORED:
        raise unusual_dtype(path.name, name, piece.get_dtype())
    # If one dimension is zero, any shape fits zero bytes, but torch still computes strides from the other dimensions.
    if math.prod(max(size, 1) for size in piece.get_shape()) * 8 >= 1 << 63:
        raise UnsafeCheckpointError(
            f"{path} was refused: {name} has the shape {piece.get_shape()}, which no memory can hold.", hint=AGAIN
        )


def _check_header_size(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8:
        raise SourceError(
            f"{path} is not a safetensors file: {counted(size, 'byte')}, too few for a header.", hint=AGAIN
        )
    header = int.from_bytes(start, "little")
    if header > MAX_HEADER:
        raise UnsafeCheckpointError(
            f"{path} was refused: it claims a header of {header} bytes; safetensors allows {MAX_HEADER}.",
            hint=AGAIN,
        )
    if header > size - 8:
        raise SourceError(f"{path} is cut short: its header has {header} bytes, and the whole file {size}.", hint=AGAIN)


def _described_bytes(path: Path) -> int | None:
    """Return the file size that the header implies, for the message; None if the header cannot be read."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        try:
            entries = json.loads(file.read(header)).values()
            return 8 + header + max(entry["data_offsets"][1] for entry in entries if "data_offsets" in entry)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
