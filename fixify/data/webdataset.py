"""timm's `wds/...` data names: webdataset shards (tar files of images and labels), read at random.

An index says where each sample is, so that any sample can be read at any time. webdataset and timm stream the shards
instead: their order depends on the number of workers and shuffles only within a window, so such a run cannot be resumed
exactly. Reading the headers once costs about 70 microseconds per sample.
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

from fixify._values import counted
from fixify.data.class_matching import read_class_map
from fixify.data.dataset import DataOptions, OpenedData, Split, natural_order
from fixify.data.decoding import decode, unreadable
from fixify.data.folder import SPLIT_NAMES
from fixify.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Label = int | str | None

_INFO_FILES = ("_info.json", "info.json")  # timm's
_CLASS_NAME_FILES = ("classnames.txt", "classes.txt")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000


class WebdatasetImages:
    """Images of an index.

    Args:
        index: Where each sample is.
        rows: The samples to take, int64 [num_images].
        labels: The label of each, int64 [num_images].
    """

    def __init__(self, index: ShardIndex, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self.shards = index.shards
        self.shard, self.offset, self.size = index.shard[rows], index.offset[rows], index.size[rows]
        self.names = index.names[rows]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ImageSource.load`."""
        path = self.shards[int(self.shard[index])]
        where = self.where(index)
        try:
            # Open the file anew each time: forked workers would share one position in an open file.
            with path.open("rb") as file:
                file.seek(int(self.offset[index]))
                data = file.read(int(self.size[index]))
        except OSError as error:
            raise unreadable(error, where) from error
        return decode(io.BytesIO(data), where), int(self.labels[index])

    def where(self, index: int) -> str:
        """See `ImageSource.where`."""
        return f"{self.names[index].decode()} in {self.shards[int(self.shard[index])]}"

    def listing(self) -> Iterator[bytes]:
        """Identify each image by its shard, its name, its size and its label."""
        for shard, name, size, label in zip(self.shard, self.names, self.size, self.labels, strict=True):
            yield b"%s\0%s\0%d\0%d" % (self.shards[int(shard)].name.encode(), bytes(name), size, label)


def open_webdataset(name: str, roots: Sequence[Path], split: Split, options: DataOptions) -> OpenedData:
    """Open one split of webdataset shards.

    Args:
        name: A folder of shards, in the current folder or in one of the roots; or the shards of the split, written with
            * or {0000..0012}. In a folder, the shards of a split are those that timm's _info.json lists, those in a
            folder named like the split, or those with the split's name in their own.
        roots: Folders to look in.
        split: "val" is what is called val, valid, validation, eval or test.
        options: `input_key` has file extensions of images ("jpg;png"), `target_key` the field of the JSON file beside
            each image. Without it the class is in the `.cls` file, as a number or a name.

    Raises:
        DataError: there are no such shards, one is damaged, or samples have no class.
    """
    if "://" in name or name.startswith("pipe:"):
        raise DataError(
            f"wds/{name} is not on this machine. Shards are read at random, so they must be local files.",
            hint="Download the shards and give their folder: wds/FOLDER",
        )
    shards = _find_shards(name, roots, split)
    index = shards.index(options)
    if shards.num_samples not in (None, len(index.targets)):
        raise DataError(
            f"The shards of {shards.folder} hold {counted(len(index.targets), 'image')}, but {shards.info_file} says "
            f"{shards.num_samples:,}.",
            hint="A shard is incomplete, or the file belongs to another version.",
        )
    if options.need_labels:
        train = None
        if split != "train" and not _is_pattern(name) and any(isinstance(target, str) for target in index.targets):
            # The training shards define the classes, so that a class without validation images shifts no label.
            train = _find_shards(name, roots, "train").index(options)
        class_names, labels = _read_labels(index, train or index, shards.folder)
    else:
        class_names, labels = (), np.zeros(len(index.targets), dtype=np.int64)
    rows = np.flatnonzero(labels >= 0)
    without_class = len(labels) - len(rows)
    asides = [f"{without_class:,} more without a class"] if without_class else []
    if index.without_image:
        asides.append(f"images of unknown suffixes are not read: {index.without_image:,}")
    short = shards.folder.resolve().name
    files = shards.files[0].name if len(shards.files) == 1 else f"{len(shards.files):,} shards"
    return OpenedData(
        images=WebdatasetImages(index, rows, labels[rows]),
        class_names=class_names,
        location=str(shards.folder),
        description=f"{counted(len(rows), 'image')} of {counted(len(class_names), 'class', 'classes')} from {files} "
        f"of wds/{short}" + (f" ({'; '.join(asides)})" if asides else ""),
        name=f"wds/{short}",
        split=split,
        labelled=options.need_labels,
        asides=tuple(asides),
    )


def _read_labels(index: ShardIndex, train: ShardIndex, folder: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the class names, and the label of each sample.

    A label below 0 means that the sample has no class; timm leaves such samples out too. `train` is the index of the
    training shards.
    """
    targets = index.targets
    if all(target is None for target in targets):
        raise DataError(
            f"The shards of {folder} do not say the classes: there are no .cls files.",
            hint="Name the field of the JSON files that holds the class: --target-key NAME",
        )
    if not any(isinstance(target, str) for target in targets):
        labels = np.array([-1 if target is None else target for target in targets], dtype=np.int64)
        named = next((folder / file for file in _CLASS_NAME_FILES if (folder / file).is_file()), None)
        if named is None:
            return tuple(map(str, range(int(labels.max()) + 1))), labels
        label_of = read_class_map(named)
        names = sorted(label_of, key=lambda name: label_of[name])
        if list(map(label_of.get, names)) != list(range(len(names))) or labels.max() >= len(names):
            raise DataError(f"{named} has {counted(len(names), 'name')}, but the shards have label {labels.max()}.")
        return tuple(names), labels
    names = natural_order({str(target) for target in train.targets if target is not None})
    label_of = {name: label for label, name in enumerate(names)}
    if unknown := sorted({str(target) for target in targets if target is not None} - label_of.keys()):
        raise DataError(f"{unknown[0]!r} is not a class of the training shards of {folder}.")
    return tuple(names), np.array([-1 if each is None else label_of[str(each)] for each in targets], dtype=np.int64)


@dataclass(frozen=True)
class _Shards:
    """The shards of one split.

    Attributes:
        folder: The folder that holds them.
        files: The tar files.
        info_file: Name of timm's file that describes them; None if there is none.
        num_samples: Number of images by that file.
        target_key: Field of the JSON files that holds the class, by that file.
    """

    folder: Path
    files: tuple[Path, ...]
    info_file: str | None = None
    num_samples: int | None = None
    target_key: str | None = None

    def index(self, options: DataOptions) -> ShardIndex:
        """Index the shards; the keys in `options` take precedence."""
        extensions: tuple[str, ...] = IMAGE_EXTENSIONS
        if options.input_key:
            extensions = tuple(options.input_key.lower().replace(".", "").split(";"))
        return index_shards(self.files, extensions, options.target_key or self.target_key or None)


def _is_pattern(name: str) -> bool:
    return name.endswith(".tar") or "*" in name or "{" in name


def _find_shards(name: str, roots: Sequence[Path], split: Split) -> _Shards:
    places = (Path(name).expanduser(), *(root / name for root in roots))
    if _is_pattern(name):
        for place in places:
            if expanded := _expand(place):
                return _Shards(place.parent, expanded)
        raise DataError(f"There are no shards wds/{name}.", hint="Give a folder of .tar files, or their names.")
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise DataError(
            f"There is no folder {name!r} of shards, here or in {', '.join(map(str, roots))}.",
            hint="Give a folder of .tar files: wds/FOLDER, or say where it is with FIXIFY_DATA.",
        )
    for file in _INFO_FILES:
        if (folder / file).is_file():
            return _read_info(folder, file, split)
    for word in SPLIT_NAMES[split]:
        inside = _tar_files(folder / word)
        named = [path for path in _tar_files(folder) if word in re.split(r"[^a-z]+", path.stem.lower())]
        if inside or named:
            return _Shards(folder, tuple(inside or named))
    files = _tar_files(folder)
    words = {word for names in SPLIT_NAMES.values() for word in names}
    if files and split != "train" and not any(words & set(re.split(r"[^a-z]+", path.name.lower())) for path in files):
        return _Shards(folder, tuple(files))
    raise DataError(
        f"{folder} has no shards of a {split} split (looked for {', '.join(SPLIT_NAMES[split])}); "
        + (f"it has {', '.join(path.name for path in files[:5])}." if files else "it holds no .tar files."),
        hint="Put the shards into folders train/ and val/, or put the name of the split into theirs.",
    )


def _expand(pattern: Path) -> tuple[Path, ...]:
    """List the files that shard-{0000..0012}.tar or shard-*.tar stands for; a range must be complete."""
    text = pattern.name
    found = _RANGE.search(text)
    if found is None:
        return tuple(sorted(path for path in pattern.parent.glob(text) if path.is_file()))
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _MOST_SHARDS:
        raise DataError(f"{found[0]} is not a range of shards. It goes up, for example {{0000..0012}}.")
    paths = [
        pattern.with_name(f"{text[: found.start()]}{number:0{len(found[1])}}{text[found.end() :]}")
        for number in range(first, last + 1)
    ]
    missing = [path for path in paths if not path.is_file()]
    if missing and len(missing) < len(paths):
        raise DataError(f"Missing: {len(missing)} of the {counted(len(paths), 'shard')}, for example {missing[0]}.")
    return () if missing else tuple(paths)


def _read_info(folder: Path, file: str, split: Split) -> _Shards:
    """Read timm's description of the shards."""
    try:
        splits = json.loads((folder / file).read_text(encoding="utf-8"))["splits"]
        found = next((splits[word] for word in SPLIT_NAMES[split] if word in splits), None)
        if found is None:
            raise DataError(f"{folder / file} has no {split} split; it has {', '.join(splits)}.")
        files = tuple(folder / name for name in found["filenames"])
        shards = _Shards(folder, files, file, found.get("num_samples"), found.get("alt_label"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / file} is not timm's description of shards.",
            hint='Expected {"splits": {"train": {"filenames": [...], "num_samples": N}}}.',
        ) from error
    if missing := [path for path in files if not path.is_file()]:
        raise DataError(f"Missing: {len(missing)} of the {counted(len(files), 'shard')}, for example {missing[0]}.")
    return shards


def _tar_files(folder: Path) -> list[Path]:
    # A pipe of that name would never be read to its end.
    return [folder / name for name in natural_order(path.name for path in folder.glob("*.tar") if path.is_file())]


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of some shards are.

    Attributes:
        shards: The files.
        shard: Shard of each sample, int32 [num_samples].
        offset: Where the sample's image begins in the shard, in bytes, int64 [num_samples].
        size: Size of the image in bytes, int64 [num_samples].
        names: Name of the image, for messages; one array of bytes.
        targets: The class that the sample states: a number, a name, or None.
        without_image: Number of further samples that state a class and have no image of the extensions asked for.
    """

    shards: tuple[Path, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    names: NDArray[np.bytes_]
    targets: tuple[Label, ...]
    without_image: int = 0


@lru_cache(maxsize=4)
def index_shards(
    shards: tuple[Path, ...], extensions: tuple[str, ...] = IMAGE_EXTENSIONS, target_key: str | None = None
) -> ShardIndex:
    """Index shards.

    As in webdataset, the files of a sample are those with the same name up to the first dot of the file name.

    Args:
        shards: Uncompressed tar files.
        extensions: File extensions of images. If a sample has several images, the first extension listed here wins.
        target_key: The field of the JSON file beside an image that holds its class. None reads the `.cls` file.

    Raises:
        DataError: a shard is damaged, compressed or not a tar file, there are no images, or a JSON file lacks the key.
    """
    rows: list[tuple[int, int, int, bytes]] = []
    targets: list[Label] = []
    without_image = 0
    for number, path in enumerate(shards):
        for sample in _read_samples(path, extensions, target_key).values():
            if sample.image is not None:
                rows.append((number, sample.image.offset_data, sample.image.size, sample.image.name.encode()))
                targets.append(sample.target)
            elif sample.target is not None:
                without_image += 1
    if not rows:
        raise DataError(
            f"The shards hold no images that end in {', '.join(extensions)}: {', '.join(map(str, shards[:3]))}."
        )
    shard, offset, size, names = zip(*rows, strict=True)
    return ShardIndex(
        shards,
        np.array(shard, dtype=np.int32),
        np.array(offset, dtype=np.int64),
        np.array(size, dtype=np.int64),
        np.array(names),
        tuple(targets),
        without_image,
    )


@dataclass
class _Sample:
    """What has been read of a sample; `preference` is the position of the image's extension in the list of them."""

    preference: int = 1 << 30
    image: tarfile.TarInfo | None = None
    target: Label = None


def _read_samples(path: Path, extensions: tuple[str, ...], target_key: str | None) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    target_extension = "cls" if target_key is None else "json"
    try:
        total = path.stat().st_size
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isreg():
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                sample = samples.setdefault(folder + slash + stem, _Sample())
                extension = extension.lower()
                if extension in extensions and extensions.index(extension) < sample.preference:
                    if member.offset_data + member.size > total:
                        raise DataError(f"The shard {path} is cut off within {member.name}.", hint="Fetch it again.")
                    sample.preference, sample.image = extensions.index(extension), member
                elif extension == target_extension:
                    reader = shard.extractfile(member)
                    data = b"" if reader is None else reader.read()
                    if target_key is None:
                        sample.target = _parse_class(data)
                    else:
                        sample.target = _json_field(data, target_key, f"{member.name} in {path}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"Cannot read the shard {path}: {error}.",
            hint="Shards must be complete, uncompressed tar files on this machine.",
        ) from error
    return samples


def _parse_class(data: bytes) -> Label:
    text = data.decode("utf-8", "replace").strip()
    return int(text) if text.lstrip("-").isdigit() and text.isascii() else text or None


def _json_field(data: bytes, key: str, where: str) -> Label:
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON.") from error
    if not isinstance(found, dict) or key not in found:
        fields = ", ".join(found) if isinstance(found, dict) else "no fields"
        raise DataError(f"{where} has no field {key!r}; it has {fields}.", hint="Choose one: --target-key NAME")
    value = found[key]
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, str))):
        raise DataError(f"The field {key!r} of {where} is neither a whole number nor text.")
    return value
