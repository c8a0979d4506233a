"""Read a checkpoint from disk: one file, or a folder as the Hugging Face hub lays it out.

A file's content, not its name, determines how it is read. safetensors headers are checked here and by the library
(size, offsets, shapes) before anything is mapped; `fixify.checkpoints.pickles` reads what `torch.save` wrote.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fixify import _files
from fixify._values import counted
from fixify.checkpoints.header import LANGUAGE_KEY, MAX_HEADER, SLIM_KEY
from fixify.checkpoints.keys import DTYPES, StateDict, clean, find_state_dict, unusual_dtype
from fixify.checkpoints.metadata import facts_of_config, facts_of_metadata, facts_of_training
from fixify.checkpoints.pickles import LARGEST_COPY, MAX_ENTRIES, read_legacy, read_zip
from fixify.checkpoints.sniffing import kind_of
from fixify.checkpoints.source import Facts, Source
from fixify.errors import SourceError, UnsafeCheckpointError

CONFIG = "config.json"
# In the order in which the hub's libraries prefer them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".th")

_STORED = {**DTYPES, "U16": torch.uint16, "U32": torch.uint32}  # codes of slim checkpoints too
_MAX_JSON = 64 << 20
_MAX_NAME = 200  # characters of a file's name
_AGAIN = "Compare its size with the original, or download it again."


def open_file(path: Path, *, ema: bool = False, meta: bool = False, name: str | None = None) -> Source:
    """Read one checkpoint file: PyTorch's zip archive, its older pickle, or safetensors.

    Args:
        path: The file.
        ema: Read the moving average of the weights.
        meta: Read only names, shapes and dtypes: tensors are on the meta device, and there is no SHA-256.
        name: The name for messages and records; the file name if None.

    Raises:
        UnsafeCheckpointError: the file would run code, or lies about what it holds. Nothing was run.
        SourceError: the file is not a checkpoint, is damaged, holds no weights, or lacks the requested moving average.
    """
    with _files.unchanged(path, SourceError):
        tree, facts = read_tree(path, meta=meta)
        num_bytes = path.stat().st_size
        found = find_state_dict(tree, path.name, ema=ema)
        weights = clean(found, path.name, file_bytes=num_bytes, ema=ema)
        tensors = _shapes_only(weights.tensors) if meta else weights.tensors
        sha256 = None if meta else _files.sha256_of(path)
    return Source(
        name=name or path.name,
        tensors=tensors,
        facts=facts,
        sha256=sha256,
        num_bytes=num_bytes,
        used_ema=weights.used_ema,
        has_ema=weights.has_ema,
        dropped=weights.dropped,
        beside=weights.beside,
        extras=weights.extras,
        joined=found.joined,
    )


def open_folder(folder: Path, *, ema: bool = False, meta: bool = False, name: str | None = None) -> Source:
    """Open the only checkpoint of a folder, and the config.json beside it.

    Args:
        folder: The folder.
        ema: See `open_file`.
        meta: See `open_file`.
        name: The name for messages and records; the folder's name if None.

    Raises:
        SourceError: the folder has no checkpoint, or several of which none has a name that the hub uses.
    """
    name = name or folder.resolve().name
    for weights in WEIGHTS:
        if (folder / weights).exists():
            return open_with_config(folder / weights, ema=ema, meta=meta, name=name)
    found = sorted(entry.name for entry in _listing(folder) if entry.name.endswith(SUFFIXES) and entry.is_file())
    if len(found) == 1:
        source = open_file(folder / found[0], ema=ema, meta=meta, name=name)
        return replace(source, facts=source.facts.or_else(config_facts(folder / CONFIG)))
    if found:
        raise SourceError(
            f"The folder {folder} holds {len(found)} checkpoints: {', '.join(found[:6])}"
            f"{', ...' if len(found) > 6 else ''}.",
            hint=f"Name one of them: {folder / found[-1]}",
        )
    raise SourceError(
        f"The folder {folder} holds no checkpoint.",
        hint=f"fixify looks for {', '.join(WEIGHTS)} and files ending in {', '.join(SUFFIXES)}.",
    )


def holds_one_checkpoint(folder: Path) -> bool:
    """Return whether `open_folder` finds exactly one checkpoint in a folder."""
    names = [entry.name for entry in _listing(folder) if entry.is_file()]
    return any(name in WEIGHTS for name in names) or sum(name.endswith(SUFFIXES) for name in names) == 1


def open_with_config(path: Path, *, ema: bool = False, meta: bool = False, name: str | None = None) -> Source:
    """Open a file that has one of the hub's names, and take facts from the config.json beside it.

    Args:
        path: The weights, or the index of weights that are stored in several files.
        ema: See `open_file`.
        meta: See `open_file`.
        name: See `open_file`.

    Raises:
        SourceError: see `open_file`; or a part is missing, or a JSON file is damaged.
    """
    if path.name.endswith(".index.json"):
        source = _open_shards(path, ema=ema, meta=meta, name=name or path.name)
    else:
        source = open_file(path, ema=ema, meta=meta, name=name)
    return replace(source, facts=source.facts.or_else(config_facts(path.parent / CONFIG)))


def shards_of(index: Path) -> dict[str, list[str]]:
    """Read which file holds which tensors from an index: file name -> tensor names, both in the order of the index.

    Raises:
        UnsafeCheckpointError: the index names a file outside its folder.
        SourceError: it is not an index.
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} is not the index of a checkpoint: it has no weight_map.")
    shards: dict[str, list[str]] = {}
    for key, shard in weight_map.items():
        is_name = (
            isinstance(shard, str) and len(shard) <= _MAX_NAME and shard.isprintable() and shard.endswith(SUFFIXES)
        )
        if not is_name or Path(shard).name != shard:
            name = str(shard)[:_MAX_NAME]
            raise UnsafeCheckpointError(f"{index} was refused: it names {name!r}, which is not a file beside it.")
        shards.setdefault(shard, []).append(key)
    return shards


def config_facts(path: Path) -> Facts:
    """Return what a config.json says about the checkpoint beside it; no facts if the file does not exist.

    Raises:
        SourceError: the file is damaged.
    """
    return facts_of_config(_read_json(path)) if path.exists() else Facts()


def read_tree(path: Path, *, meta: bool) -> tuple[object, Facts]:
    """Read the content of a file as it was saved, and what it says about the model.

    Args:
        path: The file.
        meta: Read only the header of a safetensors file. The tensors of a zip archive are memory-mapped then, and cost
            nothing.

    Raises:
        UnsafeCheckpointError, SourceError: see `open_file`.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        contents = read_safetensors(path, meta=meta)
        for key, what in (
            (SLIM_KEY, "a slim checkpoint already"),
            (LANGUAGE_KEY, "a language model, not an image model"),
        ):
            if key in contents.metadata:
                raise SourceError(f"{path} is {what}.", hint=f"Show what is in it: fixify inspect {path}")
        return contents.tensors, facts_of_metadata(contents.metadata)
    tree = read_zip(path, meta=meta) if kind == "zip" else read_legacy(path)
    for key, tensor in find_state_dict(tree, path.name).entries.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise SourceError(
                f"{path} stores only the shape of {key}, no values: the model was on the meta device.",
                hint="Save it after its weights were loaded.",
            )
    return tree, facts_of_training(tree)


@dataclass(frozen=True)
class SafetensorsContents:
    """The content of one safetensors file.

    Attributes:
        tensors: Name -> tensor, in the order of their bytes.
        metadata: String -> string.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_safetensors(path: Path, *, meta: bool = False) -> SafetensorsContents:
    """Read a safetensors file.

    Args:
        path: The file.
        meta: Read only the header: tensors are on the meta device.

    Raises:
        UnsafeCheckpointError: the header lies about what the file holds.
        SourceError: the file cannot be read, is cut short, or holds a dtype that image models do not use.
    """
    _check_header_size(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.offset_keys())
            if len(names) > MAX_ENTRIES:
                raise UnsafeCheckpointError(
                    f"{path} was refused: it lists {len(names):,} tensors, more than any model has."
                )
            for name in names:
                _check_tensor(path, name, file.get_slice(name))
            if meta or path.stat().st_size <= LARGEST_COPY:
                tensors = {name: on_meta(file, name) for name in names}
            else:
                tensors = {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
        return SafetensorsContents(tensors if meta else _read_tensors(path, tensors), metadata)
    except SafetensorError as error:
        raise _disagreement(path, str(error).removeprefix("Error while deserializing header: ")) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors that are on the meta device into memory; the library would map them."""
    read = {}
    with open(path, "rb") as raw:
        file = TensorFile(raw)
        for name, tensor in tensors.items():
            read[name] = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
            if tensor.is_meta:
                try:
                    file.read_into(name, read[name])
                except EOFError as error:
                    raise SourceError(f"{path}: {error}.", hint=_AGAIN) from error
    return read


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


def _open_shards(index: Path, *, ema: bool, meta: bool, name: str) -> Source:
    if ema:
        raise SourceError(f"{index} is a checkpoint in several files; those hold no moving average (EMA).")
    entries: dict[str, object] = {}
    num_bytes = 0
    for shard, keys in shards_of(index).items():
        path = index.parent / shard
        if not path.exists():
            raise SourceError(
                f"{index} names {shard}, which does not exist.", hint=f"Download it into {index.parent} as well."
            )
        with _files.unchanged(path, SourceError):
            held = find_state_dict(read_tree(path, meta=meta)[0], path.name).entries
            found = {key: tensor for key in keys if isinstance(tensor := held.get(key), Tensor)}
            missing = [key for key in keys if key not in found]
            if missing:
                raise SourceError(f"{index.name} says that {path} holds {missing[0]}, but it does not.")
            entries.update(found)
        num_bytes += path.stat().st_size
    weights = clean(StateDict(entries), name, file_bytes=num_bytes)
    tensors = _shapes_only(weights.tensors) if meta else weights.tensors
    return Source(name=name, tensors=tensors, num_bytes=num_bytes, dropped=weights.dropped, extras=weights.extras)


def _shapes_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move tensors to the meta device, keeping only names, shapes and dtypes."""
    return {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}


def _read_json(path: Path) -> dict[str, Any]:
    _files.require_regular(path, SourceError, f"Put the real {path.name} there, or remove it.")
    try:
        if path.stat().st_size > _MAX_JSON:
            raise SourceError(
                f"{path} is too large: {path.stat().st_size} bytes, at most {_MAX_JSON}.", hint="Download it again."
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}.", hint="Download it again, or remove it.") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a configuration: it holds a {type(value).__name__}.")
    return value


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise SourceError(f"The folder {folder} cannot be read: {error.strerror or error}.") from error


def on_meta(file: safe_open, name: str) -> Tensor:
    """Return a tensor of a safetensors file without its values.

    Raises:
        SafetensorError: torch has no such type.
    """
    piece = file.get_slice(name)
    if piece.get_dtype() not in _STORED:
        raise SafetensorError(f"{name} has the type {piece.get_dtype()}")
    return torch.empty(piece.get_shape(), dtype=_STORED[piece.get_dtype()], device="meta")


def _check_tensor(path: Path, name: str, piece: Any) -> None:
    if piece.get_dtype() not in _STORED:
        raise unusual_dtype(path.name, name, piece.get_dtype())
    # If one dimension is zero, any shape fits zero bytes, but torch still computes strides from the other dimensions.
    if math.prod(max(size, 1) for size in piece.get_shape()) * 8 >= 1 << 63:
        raise UnsafeCheckpointError(
            f"{path} was refused: {name} has the shape {piece.get_shape()}, which no memory can hold.", hint=_AGAIN
        )


def _check_header_size(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8:
        raise SourceError(
            f"{path} is not a safetensors file: {counted(size, 'byte')}, too few for a header.", hint=_AGAIN
        )
    header = int.from_bytes(start, "little")
    if header > MAX_HEADER:
        raise UnsafeCheckpointError(
            f"{path} was refused: it claims a header of {header} bytes; safetensors allows {MAX_HEADER}.",
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
    """Return the file size that the header implies, for the message; None if the header cannot be read."""
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        try:
            entries = json.loads(file.read(header)).values()
            return 8 + header + max(entry["data_offsets"][1] for entry in entries if "data_offsets" in entry)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
