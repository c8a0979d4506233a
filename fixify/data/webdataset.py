"""Where each sample of webdataset shards is, so that any of them can be read at any time.

Streaming such shards, as webdataset and timm do, has an order that depends on the number of workers and shuffles only
within a window; a run of it cannot be continued exactly. Reading the headers once costs about 70 microseconds a sample.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fixify.data.class_matching import natural_order, read_class_map
from fixify.data.dataset import DataOptions, OpenedData, Split, decode
from fixify.data.folder import SPLIT_FOLDERS
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


# timm's `wds/...` data names: webdataset shards (tar files of images and their labels), read at random.


_INFO_FILES = ("_info.json", "info.json")  # timm's
_NAME_FILES = ("classnames.txt", "classes.txt")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000


class WdsImages:
    """Images in shards, by their place in them."""

    def __init__(self, index: TarIndex, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self.shards = index.shards
        self.shard, self.offset, self.size = index.shard[rows], index.offset[rows], index.size[rows]
        self.names = index.names[rows]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path = self.shards[int(self.shard[index])]
        where = f"{self.names[index].decode()} in {path}"
        try:
            # Opened anew each time: a file that forked workers share has one position for all of them.
            with path.open("rb") as file:
                file.seek(int(self.offset[index]))
                data = file.read(int(self.size[index]))
        except OSError as error:
            raise DataError(f"Cannot read the image {where}: {error.strerror}.") from error
        return decode(io.BytesIO(data), where), int(self.labels[index])

    def listing(self) -> Iterator[bytes]:
        for shard, name, size, label in zip(self.shard, self.names, self.size, self.labels, strict=True):
            yield b"%s\0%s\0%d\0%d" % (self.shards[int(shard)].name.encode(), bytes(name), size, label)


def open_wds(name: str, roots: Sequence[Path], split: Split, options: DataOptions) -> OpenedData:
    """Open one split of webdataset shards.

    Args:
        name: A folder of shards, here or in one of the roots; or shards, spelled with * or {0000..0012}, which then are
            the split that is asked for. In a folder the shards of a split are those that timm's _info.json lists, those
            in a folder of the split's name, or those with the split's name in theirs.
        roots: Folders to look in.
        split: "val" is what is called val, valid, validation, eval or test.
        options: `input_key` has endings of images ("jpg;png"), `target_key` the field of the JSON file beside each
            image; without it the class is in the `.cls` file, a number or a name.

    Raises:
        DataError: no such shards, one that is damaged, or samples without a class.
    """
    if "://" in name or name.startswith("pipe:"):
        raise DataError(
            f"wds/{name} is not on this machine, and shards are read at random here.",
            hint="Download the shards, and give their folder: wds/FOLDER",
        )
    base, shards, info = _find_shards(name, roots, split)
    target_key = options.target_key or info.get("alt_label") or None
    endings = tuple(options.input_key.lower().replace(".", "").split(";")) if options.input_key else IMAGE_ENDINGS
    index = index_shards(shards, endings, target_key)
    if info.get("num_samples") not in (None, len(index.targets)):
        raise DataError(
            f"The shards of {base} hold {len(index.targets):,} images, and its {info['file']} says "
            f"{info['num_samples']:,}.",
            hint="A shard is incomplete, or the file is of another version.",
        )
    if options.need_labels:
        class_names, labels = _labels(index, base, name, roots, split, options)
    else:
        class_names, labels = (), np.zeros(len(index.targets), dtype=np.int64)
    rows = np.flatnonzero(labels >= 0)
    left = len(labels) - len(rows)
    short = base.resolve().name
    return OpenedData(
        images=WdsImages(index, rows, labels[rows]),
        class_names=class_names,
        location=str(base),
        description=f"{len(rows):,} images of {len(class_names):,} classes from {_shards(shards)} of wds/{short}"
        + (f" ({left:,} more have no class)" if left else ""),
        name=f"wds/{short}",
        split=split,
        labelled=options.need_labels,
    )


def _find_shards(name: str, roots: Sequence[Path], split: Split) -> tuple[Path, tuple[Path, ...], dict[str, Any]]:
    """The folder, the shards of the split, and what timm's info file says of it."""
    places = (Path(name).expanduser(), *(root / name for root in roots))
    if name.endswith(".tar") or "*" in name or "{" in name:
        for place in places:
            shards = _expand(place)
            if shards:
                return place.parent, shards, {}
        raise DataError(f"There are no shards wds/{name}.", hint="Give a folder of .tar files, or their names.")
    base = next((place for place in places if place.is_dir()), None)
    if base is None:
        raise DataError(
            f"There is no folder {name!r} of shards, here or in {', '.join(map(str, roots))}.",
            hint="Give a folder of .tar files: wds/FOLDER, or say where it is with FIXIFY_DATA.",
        )
    for file in _INFO_FILES:
        if (base / file).is_file():
            return base, *_of_info(base, file, split)
    for word in SPLIT_FOLDERS[split]:
        inside = _tars(base / word)
        named = [path for path in _tars(base) if word in re.split(r"[^a-z]+", path.stem.lower())]
        if inside or named:
            return base, tuple(inside or named), {}
    names = [path.name for path in _tars(base)]
    words = {word for each in SPLIT_FOLDERS.values() for word in each}
    if names and split != "train" and not any(words & set(re.split(r"[^a-z]+", each.lower())) for each in names):
        return base, tuple(_tars(base)), {}
    raise DataError(
        f"{base} has no shards of a {split} split (looked for {', '.join(SPLIT_FOLDERS[split])}); "
        + (f"it has {', '.join(names[:5])}." if names else "it holds no .tar files."),
        hint="Put them into folders train/ and val/, or name them so.",
    )


def _of_info(base: Path, file: str, split: Split) -> tuple[tuple[Path, ...], dict[str, Any]]:
    try:
        splits = json.loads((base / file).read_text(encoding="utf-8"))["splits"]
        found = next((splits[word] for word in SPLIT_FOLDERS[split] if word in splits), None)
        if found is None:
            raise DataError(f"{base / file} has no {split} split; it has {', '.join(splits)}.")
        shards = tuple(base / each for each in found["filenames"])
        info = {"file": file, "num_samples": found.get("num_samples"), "alt_label": found.get("alt_label")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{base / file} is not timm's description of shards.",
            hint='It has {"splits": {"train": {"filenames": [...], "num_samples": N}}}.',
        ) from error
    if missing := [path for path in shards if not path.is_file()]:
        raise DataError(f"{len(missing)} of the {len(shards)} shards are missing, for example {missing[0]}.")
    return shards, info


def _labels(
    index: TarIndex, base: Path, name: str, roots: Sequence[Path], split: Split, options: DataOptions
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and the label of each sample; below 0 where it has none, which timm leaves out too."""
    targets = index.targets
    if all(target is None for target in targets):
        raise DataError(
            f"The shards of {base} do not say the classes: there are no .cls files.",
            hint="Say which field of the JSON files has the class: --target-key NAME",
        )
    if not any(isinstance(target, str) for target in targets):
        labels = np.array([-1 if target is None else target for target in targets], dtype=np.int64)
        named = next((base / file for file in _NAME_FILES if (base / file).is_file()), None)
        if named is not None:
            indices = read_class_map(named)
            names = sorted(indices, key=lambda each: indices[each])
            if list(map(indices.get, names)) == list(range(len(names))) and labels.max() < len(names):
                return tuple(names), labels
            raise DataError(f"{named} has {len(names)} names, and there is label {labels.max()}.")
        return tuple(map(str, range(int(labels.max()) + 1))), labels
    train = index
    if split != "train" and not name.endswith(".tar") and "*" not in name and "{" not in name:
        # The training shards say which classes there are, so that one without validation images shifts nothing.
        _, shards, info = _find_shards(name, roots, "train")
        endings = tuple(options.input_key.lower().replace(".", "").split(";")) if options.input_key else IMAGE_ENDINGS
        train = index_shards(shards, endings, options.target_key or info.get("alt_label") or None)
    names = natural_order({str(target) for target in train.targets if target is not None})
    place = {each: label for label, each in enumerate(names)}
    if unknown := sorted({str(target) for target in targets if target is not None} - place.keys()):
        raise DataError(f"{unknown[0]!r} is no class of the training shards of {base}.")
    return tuple(names), np.array([-1 if each is None else place[str(each)] for each in targets], dtype=np.int64)


def _expand(pattern: Path) -> tuple[Path, ...]:
    """shard-{0000..0012}.tar and shard-*.tar as files that exist; a range has to be there as a whole."""
    text = pattern.name
    found = _RANGE.search(text)
    if found is None:
        return tuple(sorted(pattern.parent.glob(text)))
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _MOST_SHARDS:
        raise DataError(f"{found[0]} is no range of shards.")
    paths = [
        pattern.with_name(f"{text[: found.start()]}{number:0{len(found[1])}}{text[found.end() :]}")
        for number in range(first, last + 1)
    ]
    missing = [path for path in paths if not path.is_file()]
    if missing and len(missing) < len(paths):
        raise DataError(f"{len(missing)} of the {len(paths)} shards are missing, for example {missing[0]}.")
    return () if missing else tuple(paths)


def _tars(folder: Path) -> list[Path]:
    return [folder / name for name in natural_order(path.name for path in folder.glob("*.tar"))]


def _shards(shards: Sequence[Path]) -> str:
    return shards[0].name if len(shards) == 1 else f"{len(shards):,} shards"
