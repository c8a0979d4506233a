"""Read the index that ships with fixify, and say whether it is that of the installed libraries.

`fixify.models.index` makes the index. Importing this module needs neither torch nor timm.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import lzma
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from fixify._version import __version__
from fixify.catalogue.signature import FreeDimensions, Shape, Signature, Trait, is_counter
from fixify.catalogue.skeleton import ClassifierSite, Skeleton
from fixify.description import LIBRARIES, Architecture

PATH = Path(__file__).with_name("index.json.xz")
FORMAT = 3

SOURCES = {
    "timm": ("models", "layers", "data/config.py", "data/constants.py"),
    "torchvision": ("models", "ops", "transforms/_presets.py"),
}
"""The source files that define the architectures: which tensors they have, what they compute, and their names."""

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Network:
    """What an architecture is besides its signature, so that it need not be built to be counted.

    Attributes:
        sites: (path, type of layer) of each classifier layer, in the order of its modules.
        odd: Positions of the tensors, among the sorted names without counters, that are no parameters although they
            are no statistics of a BatchNorm (or the other way round), or that are listed a second time.
        integers: Positions of the tensors that hold integers.
        tower: The width of its last layer with which the library's default weights are the image tower of a CLIP
            model; None for the others.
        tags: Tags with which the library builds another network than without, or the tower of a CLIP model.
    """

    sites: tuple[tuple[str, str], ...]
    odd: tuple[int, ...] = ()
    integers: tuple[int, ...] = ()
    tower: int | None = None
    tags: tuple[str, ...] = ()

    def skeleton(self, shapes: Mapping[str, Shape]) -> Skeleton:
        """Describe the network whose state dict has these shapes.

        Args:
            shapes: Name -> shape, as they match the signature. Counters of BatchNorm may be missing.
        """
        names = sorted(key for key in shapes if not is_counter(key))
        odd, integers = ({names[place] for place in places} for places in (self.odd, self.integers))
        counters = [f"{key.rpartition('.')[0]}.num_batches_tracked" for key in names if key.endswith(".running_mean")]
        return Skeleton(
            shapes={**{key: shapes[key] for key in names}, **dict.fromkeys(counters, ())},
            floats=frozenset(names) - integers,
            num_parameters=sum(prod(shapes[key]) for key in names if (key in odd) is is_statistic(key)),
            sites=tuple(ClassifierSite.of_shapes(path, kind, shapes) for path, kind in self.sites),
        )

    def may_be_another(self, architecture: Architecture, shapes: Mapping[str, Shape]) -> bool:
        """Return whether only building the architecture shows its classifier layers: a tag or a width is special.

        Args:
            architecture: The architecture, with its tag.
            shapes: Name -> shape of a state dict that has its names.
        """
        sites = dict(self.sites)
        width = shapes[f"{next(iter(sites))}.weight"][0]
        if architecture.tag in self.tags or (architecture.tag is None and width == self.tower):
            return True
        # A hidden layer in front of the last one is told from it by its width, unless that is the number of classes.
        heads = tuple(f"{path.partition('.')[0]}." for path in sites if "." in path)
        return any(
            shape[:1] == (width,) and len(shape) in (2, 4) and key.removesuffix(".weight") not in sites
            for key, shape in shapes.items()
            if key.startswith(heads) and key.endswith(".weight")
        )


def is_statistic(key: str) -> bool:
    """Return whether a tensor has the name of a running statistic, which is no parameter."""
    return key.rpartition(".")[2] in _STATISTICS


@dataclass(frozen=True)
class Entry:
    """One architecture in the index.

    Attributes:
        architecture: The architecture, without tag.
        signature: Its names and shapes.
        traits: The traits in which it differs from other architectures with the same names or shapes.
        network: What else is known of it; None if it has to be built.
    """

    architecture: Architecture
    signature: Signature
    traits: Mapping[str, Trait] = field(default_factory=dict)
    network: Network | None = None


@dataclass(frozen=True)
class Names:
    """The names of the libraries' architectures, and how images are prepared for them.

    Attributes:
        tags: Library -> name -> tag -> index of its preprocessing in `preprocessings`, None for one that is refused;
            "" is the library's default.
        preprocessings: The different preprocessings.
        renamed: timm's old names -> the name and tag of today; None if there is none.
        enums: torchvision's name of an architecture -> the name of its enum of weights, and alias -> member.
    """

    tags: Mapping[str, Mapping[str, Mapping[str, int | None]]] = field(default_factory=dict)
    preprocessings: tuple[Mapping[str, Any], ...] = ()
    renamed: Mapping[str, str | None] = field(default_factory=dict)
    enums: Mapping[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Index:
    """Signatures of many architectures, and the library versions they were taken from.

    Attributes:
        versions: Library -> the versions that build exactly these architectures.
        sources: Library -> digests of their source code (see `source_digest`). A release with the same source builds
            the same architectures.
        entries: One entry per architecture and variant.
        names: The names of all architectures, with and without a classifier.
    """

    versions: Mapping[str, Collection[str]]
    sources: Mapping[str, Collection[str]]
    entries: tuple[Entry, ...]
    names: Names = Names()

    def is_stale(self, library: str) -> bool:
        """Return whether the installed library may build architectures other than the indexed ones.

        fixify's own networks are never stale, because the index ships with them.
        """
        if library not in SOURCES:
            return False
        if library_versions()[library] in self.versions.get(library, ()):
            return False
        return source_digest(library) not in self.sources.get(library, ())


@cache
def load_index() -> Index:
    """Load the index that ships with fixify."""
    data = json.loads(lzma.decompress(PATH.read_bytes()))
    names = data["names"]
    return Index(
        data["versions"],
        data["sources"],
        tuple(_entry(values) for values in data["entries"]),
        Names(names["tags"], tuple(names["preprocessings"]), names["renamed"], names["enums"]),
    )


@cache
def is_current() -> bool:
    """Return whether the shipped index is that of all installed libraries."""
    return not any(map(load_index().is_stale, LIBRARIES))


def library_versions() -> dict[str, str]:
    """Return the installed version of each library, without build suffix ("+cu130")."""
    versions = {**{library: _installed(library) for library in SOURCES}, "fixify": __version__}
    return {library: version.partition("+")[0] for library, version in versions.items()}


@cache
def _installed(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path, without a record of its version
        return str(importlib.import_module(library).__version__)


@cache
def source_digest(library: str) -> str:
    """Hash the Python files of an installed library that define its architectures (64 bits of SHA-256)."""
    spec = importlib.util.find_spec(library)
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    digest = hashlib.sha256()
    for part in SOURCES[library]:
        path = folder / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.is_file():
                data = file.read_bytes()
                digest.update(f"{file.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def dump_index(index: Index) -> bytes:
    """Serialise an index as xz-compressed JSON, the form in which it is shipped."""
    names = index.names
    data = {
        "format": FORMAT,
        "versions": {library: list(versions) for library, versions in index.versions.items()},
        "sources": {library: list(digests) for library, digests in index.sources.items()},
        "entries": [values_of(entry) for entry in index.entries],
        "names": {
            "tags": names.tags,
            "preprocessings": names.preprocessings,
            "renamed": names.renamed,
            "enums": names.enums,
        },
    }
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return lzma.compress(text.encode(), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)


def values_of(entry: Entry) -> list[Any]:
    """Return an entry as the plain values that are stored."""
    signature, network = entry.signature, entry.network
    return [
        entry.architecture.ref,
        dict(entry.architecture.kwargs),
        signature.num_tensors,
        *(signature.keys, signature.named, signature.ordered, signature.headless),
        [[group.choice, group.samples, group.places] for group in signature.free],
        dict(signature.defaults),
        dict(entry.traits),
        network and [network.sites, network.odd, network.integers, network.tower, network.tags],
    ]


def _entry(values: list[Any]) -> Entry:
    ref, kwargs, num_tensors, keys, named, ordered, headless, free, defaults, found, network = values
    library, _, name = ref.partition("/")
    groups = tuple(
        FreeDimensions(choice, tuple(map(tuple, samples)), tuple(map(tuple, places)))
        for choice, samples, places in free
    )
    return Entry(
        Architecture(library, name, kwargs),
        Signature(num_tensors, keys, named, ordered, headless, groups, defaults),
        {trait: tuple(value) for trait, value in found.items()},
        network and _network(*network),
    )


def _network(
    sites: list[list[str]], odd: list[int], integers: list[int], tower: int | None, tags: list[str]
) -> Network:
    return Network(tuple((path, kind) for path, kind in sites), tuple(odd), tuple(integers), tower, tuple(tags))
