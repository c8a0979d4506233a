"""Where each sample of webdataset shards is, so that any of them can be read at any time.

Streaming such shards, as webdataset and timm do, has an order that depends on the number of workers and shuffles only
within a window; a run of it cannot be continued exactly. Reading the headers once costs about 70 microseconds a sample.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fixify.errors import DataError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
Label = int | str | None


@dataclass(frozen=True)
class TarIndex:
    """The samples of some shards.

    Attributes:
        shards: The files.
        shard: Of each sample, int32 [num_samples].
        offset, size: Of its image in the shard's bytes, int64 [num_samples].
        names: Of its image, for messages; bytes, as one array.
        targets: What is said of its class: a number, a name, or None.
    """

    shards: tuple[Path, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    names: NDArray[np.bytes_]
    targets: tuple[Label, ...]


@lru_cache(maxsize=4)
def index_shards(
    shards: tuple[Path, ...], endings: tuple[str, ...] = IMAGE_ENDINGS, target_key: str | None = None
) -> TarIndex:
    """Index shards. A sample is what has the same name up to the first dot of the file's name, as in webdataset.

    Args:
        shards: Uncompressed tar files.
        endings: What an image's name ends in; of several in a sample the first of these counts.
        target_key: The field of the JSON file beside an image that says its class; None takes the `.cls` file.

    Raises:
        DataError: a shard is damaged, compressed or no tar, or a sample does not have what is looked for.
    """
    rows: list[tuple[int, int, int, bytes]] = []
    targets: list[Label] = []
    for number, path in enumerate(shards):
        for sample in _samples(path, endings, target_key).values():
            if sample.image is not None:
                rows.append((number, sample.image.offset_data, sample.image.size, sample.image.name.encode()))
                targets.append(sample.target)
    if not rows:
        raise DataError(
            f"The shards hold no images that end in {', '.join(endings)}: {', '.join(map(str, shards[:3]))}."
        )
    shard, offset, size, names = zip(*rows, strict=True)
    return TarIndex(
        shards,
        np.array(shard, dtype=np.int32),
        np.array(offset, dtype=np.int64),
        np.array(size, dtype=np.int64),
        np.array(names),
        tuple(targets),
    )


@dataclass
class _Sample:
    rank: int = 1 << 30
    image: tarfile.TarInfo | None = None
    target: Label = None


def _samples(path: Path, endings: tuple[str, ...], target_key: str | None) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    wanted = "cls" if target_key is None else "json"
    try:
        total = path.stat().st_size
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isreg():
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                sample = samples.setdefault(folder + slash + stem, _Sample())
                ending = ending.lower()
                if ending in endings and endings.index(ending) < sample.rank:
                    if member.offset_data + member.size > total:
                        raise DataError(f"The shard {path} is cut off within {member.name}.", hint="Fetch it again.")
                    sample.rank, sample.image = endings.index(ending), member
                elif ending == wanted:
                    reader = shard.extractfile(member)
                    data = b"" if reader is None else reader.read()
                    sample.target = (
                        _class_in(data) if target_key is None else _field(data, target_key, f"{member.name} in {path}")
                    )
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"Cannot read the shard {path}: {error}.",
            hint="Shards have to be whole, uncompressed tar files on this machine.",
        ) from error
    return samples


def _class_in(data: bytes) -> Label:
    text = data.decode("utf-8", "replace").strip()
    return int(text) if text.lstrip("-").isdigit() and text.isascii() else text or None


def _field(data: bytes, key: str, where: str) -> Label:
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON.") from error
    if not isinstance(found, dict) or key not in found:
        has = ", ".join(found) if isinstance(found, dict) else "no fields"
        raise DataError(f"{where} has no field {key!r}; it has {has}.", hint="Say which with --target-key NAME.")
    value = found[key]
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, str))):
        raise DataError(f"The field {key!r} of {where} is neither a whole number nor text.")
    return value
