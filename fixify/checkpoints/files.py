"""Read a checkpoint from disk: one file, or a folder as the Hugging Face hub lays it out.

A file's content, not its name, determines how it is read. Headers of safetensors files are checked before anything
else is read of them (`fixify.checkpoints.outline`); `fixify.checkpoints.pickles` reads what `torch.save` wrote. Reading
a header needs no torch.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fixify import _files
from fixify.checkpoints.header import LANGUAGE_KEY, SLIM_KEY
from fixify.checkpoints.keys import StateDict, clean, find_state_dict
from fixify.checkpoints.metadata import facts_of_config, facts_of_metadata, facts_of_training
from fixify.checkpoints.outline import Outline, is_tensor, read_outlines
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

_MAX_JSON = 64 << 20
_MAX_NAME = 200  # characters of a file's name


def open_file(path: Path, *, ema: bool = False, meta: bool = False, name: str | None = None) -> Source:
    """Read one checkpoint file: PyTorch's zip archive, its older pickle, or safetensors.

    Args:
        path: The file.
        ema: Read the moving average of the weights.
        meta: Read only names, shapes and dtypes: tensors are outlines (`fixify.checkpoints.outline.Outline`), and
            there is no SHA-256.
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
        outlines, metadata = read_outlines(path)
        for key, what in (
            (SLIM_KEY, "a slim checkpoint already"),
            (LANGUAGE_KEY, "a language model, not an image model"),
        ):
            if key in metadata:
                raise SourceError(f"{path} is {what}.", hint=f"Show what is in it: fixify inspect {path}")
        if meta:
            return outlines, facts_of_metadata(metadata)
        from fixify.checkpoints.safetensors_file import read_tensors

        return read_tensors(path, outlines), facts_of_metadata(metadata)
    from fixify.checkpoints.pickles import read_legacy, read_zip

    tree = read_zip(path, meta=meta) if kind == "zip" else read_legacy(path)
    for key, tensor in find_state_dict(tree, path.name).entries.items():
        if is_tensor(tensor) and tensor.is_meta:
            raise SourceError(
                f"{path} stores only the shape of {key}, no values: the model was on the meta device.",
                hint="Save it after its weights were loaded.",
            )
    return tree, facts_of_training(tree)


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
            found = {key: tensor for key in keys if is_tensor(tensor := held.get(key))}
            missing = [key for key in keys if key not in found]
            if missing:
                raise SourceError(f"{index.name} says that {path} holds {missing[0]}, but it does not.")
            entries.update(found)
        num_bytes += path.stat().st_size
    weights = clean(StateDict(entries), name, file_bytes=num_bytes)
    tensors = _shapes_only(weights.tensors) if meta else weights.tensors
    return Source(name=name, tensors=tensors, num_bytes=num_bytes, dropped=weights.dropped, extras=weights.extras)


def _shapes_only(tensors: dict[str, Any]) -> dict[str, Outline]:
    """Keep only names, shapes and dtypes of tensors."""
    return {key: tensor if isinstance(tensor, Outline) else Outline.of(tensor) for key, tensor in tensors.items()}


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
