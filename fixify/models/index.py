"""Read and build the shipped index of signatures.

The index covers every architecture of timm and torchvision that takes a number of classes, and the paper's own.
`python -m fixify.models.index` rebuilds it, which takes some minutes. The same library versions give the same entries;
older versions that gave the same entries remain listed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fixify._files import write_atomic
from fixify.errors import NoClassifierError
from fixify.models.architectures import Architecture, library_versions, list_architectures, parse_architecture
from fixify.models.classifiers import find_classifiers
from fixify.models.signature import FreeDimensions, Signature, Trait, signature_of, traits

PATH = Path(__file__).with_name("index.json.xz")
_FORMAT = 2

# The source files that define the architectures: which tensors they have and what they compute.
_SOURCES = {
    "timm": ("models", "layers", "data/config.py", "data/constants.py"),
    "torchvision": ("models", "ops", "transforms/_presets.py"),
}

# Architectures that torchvision builds differently when it loads its own weights: it drops the auxiliary classifiers
# and normalises the input once more (`transform_input`).
_CHOOSING = {"torchvision/googlenet", "torchvision/inception_v3"}


@dataclass(frozen=True)
class Entry:
    """One architecture in the index.

    Attributes:
        architecture: The architecture, without tag.
        signature: Its names and shapes.
        traits: The traits in which it differs from other architectures with the same names or shapes.
    """

    architecture: Architecture
    signature: Signature
    traits: Mapping[str, Trait] = field(default_factory=dict)


@dataclass(frozen=True)
class Index:
    """Signatures of many architectures, and the library versions they were taken from.

    Attributes:
        versions: Library -> the versions that build exactly these architectures.
        sources: Library -> digests of their source code (see `source_digest`). A release with the same source builds
            the same architectures.
        entries: One entry per architecture and variant.
    """

    versions: Mapping[str, Collection[str]]
    sources: Mapping[str, Collection[str]]
    entries: tuple[Entry, ...]

    def is_stale(self, library: str) -> bool:
        """Return whether the installed library may build architectures other than the indexed ones.

        fixify's own networks are never stale, because the index ships with them.
        """
        if library not in _SOURCES:
            return False
        if library_versions()[library] in self.versions.get(library, ()):
            return False
        return source_digest(library) not in self.sources.get(library, ())


@cache
def load_index() -> Index:
    """Load the index that ships with fixify."""
    data = json.loads(lzma.decompress(PATH.read_bytes()))
    return Index(data["versions"], data["sources"], tuple(_entry(values) for values in data["entries"]))


@cache
def source_digest(library: str) -> str:
    """Hash the Python files of an installed library that define its architectures (64 bits of SHA-256)."""
    spec = importlib.util.find_spec(library)
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    digest = hashlib.sha256()
    for part in _SOURCES[library]:
        path = folder / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.is_file():
                data = file.read_bytes()
                digest.update(f"{file.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def variants(arch: Architecture) -> list[Architecture]:
    """Return the ways to build an architecture that its name leaves open: for most, only itself.

    torchvision's GoogLeNet and Inception v3 have several: a checkpoint has auxiliary classifiers or not, and needs
    `transform_input` if its training started from torchvision's weights.

    >>> [variant.spelled for variant in variants(parse_architecture("torchvision/googlenet,aux_logits=false"))]
    ... # doctest: +NORMALIZE_WHITESPACE
    ['torchvision/googlenet,aux_logits=false,transform_input=false',
     'torchvision/googlenet,aux_logits=false,transform_input=true']
    """
    if f"{arch.library}/{arch.name}" not in _CHOOSING:
        return [arch]
    auxiliary = [arch.kwargs["aux_logits"]] if "aux_logits" in arch.kwargs else [True, False]
    # A tag names torchvision's own weights, for which `build` sets transform_input as torchvision does.
    transform = [True] if arch.tag else [False, True]
    transform = [arch.kwargs["transform_input"]] if "transform_input" in arch.kwargs else transform
    return [
        replace(arch, kwargs={**arch.kwargs, "aux_logits": aux, "transform_input": again})
        for aux in auxiliary
        for again in transform
    ]


def entries_of(refs: Iterable[str], on_progress: Callable[[int], object] | None = None) -> Iterator[Entry]:
    """Build architectures on the meta device and yield their entries, except those without a classifier.

    Args:
        refs: Names of architectures.
        on_progress: Called with the number of names done.
    """
    for done, ref in enumerate(refs, start=1):
        for arch in variants(parse_architecture(ref)):
            found = signature_of(arch)
            if found is not None and _has_classifier(found[1]):
                yield Entry(arch, found[0], traits(found[1]))
        if on_progress is not None:
            on_progress(done)


def build_index(refs: Iterable[str], on_progress: Callable[[int], object] | None = None) -> Index:
    """Index architectures, keeping only the traits that tell apart architectures with the same names or shapes."""
    entries = list(entries_of(refs, on_progress))
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        for kind, value in (("named", entry.signature.named), ("ordered", entry.signature.ordered)):
            groups.setdefault((kind, value), []).append(entry)
    kept: dict[int, set[str]] = {id(entry): set() for entry in entries}
    for group in groups.values():
        names = {name for entry in group for name in entry.traits}
        apart = {name for name in names if len({entry.traits.get(name, ("", ""))[0] for entry in group}) > 1}
        for entry in group:
            kept[id(entry)] |= apart
    return Index(
        versions={library: [library_versions()[library]] for library in _SOURCES},
        sources={library: [source_digest(library)] for library in _SOURCES},
        entries=tuple(
            Entry(e.architecture, e.signature, {k: v for k, v in sorted(e.traits.items()) if k in kept[id(e)]})
            for e in entries
        ),
    )


def with_known(index: Index, before: Index) -> Index:
    """Add the versions and sources of an older index, for each library whose entries have not changed."""
    versions, sources = dict(index.versions), dict(index.sources)
    for library in _SOURCES:
        ours, theirs = (
            [_values(entry) for entry in each.entries if entry.architecture.library == library]
            for each in (index, before)
        )
        if json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs)):
            versions[library] = sorted({*versions[library], *before.versions.get(library, ())})
            sources[library] = sorted({*sources[library], *before.sources.get(library, ())})
    return replace(index, versions=versions, sources=sources)


def dump_index(index: Index) -> bytes:
    """Serialise an index as xz-compressed JSON, the form in which it is shipped."""
    data = {
        "format": _FORMAT,
        "versions": {library: list(versions) for library, versions in index.versions.items()},
        "sources": {library: list(digests) for library, digests in index.sources.items()},
        "entries": [_values(entry) for entry in index.entries],
    }
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return lzma.compress(text.encode(), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)


def _has_classifier(model: Any) -> bool:
    try:
        return bool(find_classifiers(model))
    except NoClassifierError:
        return False


def _values(entry: Entry) -> list[Any]:
    signature = entry.signature
    return [
        entry.architecture.ref,
        dict(entry.architecture.kwargs),
        signature.num_tensors,
        *(signature.keys, signature.named, signature.ordered, signature.headless),
        [[group.choice, group.samples, group.places] for group in signature.free],
        dict(signature.defaults),
        dict(entry.traits),
    ]


def _entry(values: list[Any]) -> Entry:
    ref, kwargs, num_tensors, keys, named, ordered, headless, free, defaults, found = values
    library, _, name = ref.partition("/")
    groups = tuple(
        FreeDimensions(choice, tuple(map(tuple, samples)), tuple(map(tuple, places)))
        for choice, samples, places in free
    )
    return Entry(
        Architecture(library, name, kwargs),
        Signature(num_tensors, keys, named, ordered, headless, groups, defaults),
        {trait: tuple(value) for trait, value in found.items()},
    )


def main() -> None:
    """Rebuild the shipped index from the installed libraries."""
    refs = list_architectures()

    def report(done: int) -> None:
        if done % 50 == 0 or done == len(refs):
            print(f"{done}/{len(refs)}", file=sys.stderr)

    index = with_known(build_index(refs, report), load_index())
    data = dump_index(index)
    write_atomic(PATH, data)
    print(f"{len(index.entries)} architectures, {len(data)} bytes: {PATH.name}")


if __name__ == "__main__":
    main()
