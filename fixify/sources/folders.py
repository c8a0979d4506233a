"""A folder as the Hugging Face hub lays it out: config.json and weights, in one file or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fixify.errors import SourceError, UnsafeCheckpointError
from fixify.sources.files import open_file, read_tree, shapes_only
from fixify.sources.hints import facts_of_config
from fixify.sources.names import clean
from fixify.sources.source import Facts, Source
from fixify.sources.wrappers import StateDict, find_state_dict

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


def open_folder(folder: Path, *, ema: bool = False, meta: bool = False, name: str | None = None) -> Source:
    """Open the one checkpoint of a folder, and the config.json beside it.

    Raises:
        SourceError: no checkpoint, or several and none of them has one of the hub's names.
    """
    name = name or folder.resolve().name
    for weights in WEIGHTS:
        if (folder / weights).exists():
            return open_with_config(folder / weights, ema=ema, meta=meta, name=name)
    found = sorted(entry.name for entry in _listing(folder) if entry.name.endswith(SUFFIXES) and entry.is_file())
    if len(found) == 1:
        source = open_file(folder / found[0], ema=ema, meta=meta, name=name)
        return source.with_facts(source.facts.or_else(config_facts(folder / CONFIG)))
    if found:
        raise SourceError(
            f"The folder {folder} holds {len(found)} checkpoints: {', '.join(found[:6])}"
            f"{', ...' if len(found) > 6 else ''}.",
            hint=f"Name one of them: {folder / found[-1]}",
        )
    raise SourceError(
        f"The folder {folder} holds no checkpoint.",
        hint=f"Looked for {', '.join(WEIGHTS)} and files ending in {', '.join(SUFFIXES)}.",
    )


def holds_one_checkpoint(folder: Path) -> bool:
    """Whether `open_folder` would know which checkpoint is meant."""
    names = [entry.name for entry in _listing(folder) if entry.is_file()]
    return any(name in WEIGHTS for name in names) or sum(name.endswith(SUFFIXES) for name in names) == 1


def open_with_config(path: Path, *, ema: bool = False, meta: bool = False, name: str | None = None) -> Source:
    """Open a file that has one of the hub's names, taking facts from the config.json beside it.

    Raises:
        SourceError: see `open_file`; or a part is missing, or the JSON is damaged.
    """
    if path.name.endswith(".index.json"):
        source = _open_shards(path, ema=ema, meta=meta, name=name or path.name)
    else:
        source = open_file(path, ema=ema, meta=meta, name=name)
    return source.with_facts(source.facts.or_else(config_facts(path.parent / CONFIG)))


def shards_of(index: Path) -> dict[str, list[str]]:
    """File name -> names of its tensors, from an index; both in the order they are listed in."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} is no index of a checkpoint: it has no weight_map.")
    shards: dict[str, list[str]] = {}
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(SUFFIXES):
            raise UnsafeCheckpointError(f"{index} was refused: it names {shard!r}, which is no file beside it.")
        shards.setdefault(shard, []).append(key)
    return shards


def config_facts(path: Path) -> Facts:
    """What a config.json says of the checkpoint beside it; nothing if it is not there.

    Raises:
        SourceError: it is damaged.
    """
    return facts_of_config(_read_json(path)) if path.exists() else Facts()


def _open_shards(index: Path, *, ema: bool, meta: bool, name: str) -> Source:
    if ema:
        raise SourceError(f"{index} is a checkpoint in several files; those hold no moving average (EMA).")
    entries: dict[str, object] = {}
    num_bytes = 0
    for shard, keys in shards_of(index).items():
        path = index.parent / shard
        if not path.exists():
            raise SourceError(
                f"{index} names {shard}, which is not there.", hint=f"Download it into {index.parent}, too."
            )
        held = find_state_dict(read_tree(path, meta=meta)[0], path.name).entries
        missing = [key for key in keys if not isinstance(held.get(key), Tensor)]
        if missing:
            raise SourceError(f"{path} should hold {missing[0]} by {index.name}, and does not.")
        entries.update((key, held[key]) for key in keys)
        num_bytes += path.stat().st_size
    weights = clean(StateDict(entries), name, file_bytes=num_bytes)
    tensors = shapes_only(weights.tensors) if meta else weights.tensors
    return Source(name=name, tensors=tensors, num_bytes=num_bytes, dropped=weights.dropped)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise SourceError(f"{path} is too large ({path.stat().st_size} bytes).", hint="Download it again.")
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
