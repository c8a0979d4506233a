"""Reading safetensors. The library checks the header (size, offsets, shapes) before anything is mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fixify.errors import SourceError, UnsafeCheckpointError

# The dtypes that weights and counters of an image model have. Others (float8, packed 4 bit, complex) mean nothing
# without the scales or the code that belongs to them.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What the library reports -> what a person can do with it. The first that fits; order matters.
_DAMAGE: tuple[tuple[str, str], ...] = (
    ("HeaderTooLarge", "its header claims to be larger than 100 MB"),
    ("HeaderTooSmall", "it is shorter than a header"),
    ("InvalidHeaderLength", "its header claims to be longer than the file"),
    ("InvalidHeaderStart", "its header does not start as one"),
    ("InvalidHeader", "its header is not valid JSON of tensors"),
    ("MetadataIncompleteBuffer", "the tensors do not add up to the size of the file: it is cut short or damaged"),
    ("InvalidOffset", "its tensors overlap, leave gaps or lie outside the file"),
    ("TensorInvalidInfo", "a tensor's shape and dtype do not fit its bytes"),
    ("ValidationOverflow", "a tensor's shape is too large for any memory"),
    ("MisalignedSlice", "a tensor does not end on a whole byte"),
    ("TensorNotFound", "a tensor that its header names is missing"),
)


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
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.offset_keys())
            for name in names:
                _check_dtype(path, name, file.get_slice(name).get_dtype())
            tensors = {name: _on_meta(file, name) if meta else file.get_tensor(name) for name in names}
            return SafetensorsContents(tensors, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        # torch cannot make a tensor of that shape: dimensions beyond 64 bits whose product is still small (a zero)
        raise UnsafeCheckpointError(f"{path} was refused: it holds a tensor that cannot exist ({error}).") from error


def _on_meta(file: safe_open, name: str) -> Tensor:
    piece = file.get_slice(name)
    return torch.empty(piece.get_shape(), dtype=DTYPES[piece.get_dtype()], device="meta")


def _check_dtype(path: Path, name: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise SourceError(
            f"{path} stores {name} as {dtype}; fixify reads floating point of 16 bits and more, and plain integers.",
            hint="Quantised weights need the code that made them: give the checkpoint from before quantisation.",
        )


def _damaged(path: Path, reason: str) -> SourceError:
    for mark, meaning in _DAMAGE:
        if mark in reason:
            return UnsafeCheckpointError(
                f"{path} was refused: {meaning} ({path.stat().st_size} bytes).",
                hint="Download it again; if it stays so, the file is not a valid safetensors checkpoint.",
            )
    return SourceError(f"{path} is not a readable safetensors file: {reason}.")
