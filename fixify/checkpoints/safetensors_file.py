"""Read the tensors of a safetensors file into memory; `fixify.checkpoints.outline` reads and checks its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fixify.checkpoints.outline import AGAIN, Outline, disagreement, outline_of
from fixify.checkpoints.pickles import LARGEST_COPY
from fixify.errors import SourceError


def read_tensors(path: Path, outlines: Mapping[str, Outline]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; those of a very large file are mapped.

    Args:
        path: The file.
        outlines: What `fixify.checkpoints.outline.read_outlines` read of it.

    Raises:
        SourceError: the file cannot be read, is cut short, or is no longer what its header said.
    """
    try:
        if path.stat().st_size > LARGEST_COPY:
            with safe_open(path, framework="pt", device="cpu") as mapped:
                return {name: mapped.get_tensor(name) for name in outlines}
        read = {}
        with open(path, "rb") as raw:
            file = TensorFile(raw)
            for name, outline in outlines.items():
                read[name] = torch.empty(outline.shape, dtype=getattr(torch, outline.dtype))
                file.read_into(name, read[name])
        return read
    except EOFError as error:
        raise SourceError(f"{path}: {error}.", hint=AGAIN) from error
    except SafetensorError as error:
        raise disagreement(path, error) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


class TensorFile:
    """The tensors of a safetensors file, read into memory that the caller chooses; the library would map them.

    A file that is cut off under a map ends the process (SIGBUS).

    Args:
        file: The file, open for reading in binary mode; its header was checked by the library.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        length = int.from_bytes(file.read(8), "little")
        self._header = json.loads(file.read(length))
        self._start = 8 + length

    def read_into(self, name: str, tensor: Tensor) -> None:
        """Fill a contiguous tensor on the CPU.

        Raises:
            EOFError: the file is too short.
        """
        content = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        begin, end = self._header[name]["data_offsets"]
        self._file.seek(self._start + begin)
        if end - begin != content.nbytes or (content.nbytes and self._read(content.data) != content.nbytes):
            raise EOFError("the file is cut short, or changed while it was read")

    def _read(self, memory: memoryview) -> int:
        return cast(Any, self._file).readinto(memory)


def on_meta(file: safe_open, name: str) -> Tensor:
    """Return a tensor of a safetensors file without its values, on torch's meta device.

    Raises:
        SafetensorError: torch has no such type.
    """
    outline = outline_of(name, file.get_slice(name))
    return torch.empty(outline.shape, dtype=getattr(torch, outline.dtype), device="meta")
