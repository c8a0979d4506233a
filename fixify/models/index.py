"""Build the index that ships with fixify.

The index covers every architecture of timm and torchvision that takes a number of classes, and the paper's own.
`python -m fixify.models.index` rebuilds it, which takes some minutes. The same library versions give the same entries;
older versions that gave the same entries remain listed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from timm.models import get_deprecated_models

from fixify._files import write_atomic
from fixify.catalogue.matches import variants
from fixify.catalogue.shipped import (
    PATH,
    SOURCES,
    Entry,
    Index,
    Names,
    dump_index,
    library_versions,
    load_index,
    source_digest,
    values_of,
)
from fixify.description import LIBRARIES
from fixify.errors import ArchitectureError, NoClassifierError
from fixify.models.architectures import (
    Architecture,
    list_architectures,
    parse_architecture,
    preprocessing,
    tags_of,
    weights_enum,
)
from fixify.models.built import signature_of, traits
from fixify.models.classifiers import find_classifiers
from fixify.models.skeletons import network_of


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
                yield Entry(arch, found[0], traits(found[1]), network_of(arch, found[1]))
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
        versions={library: [library_versions()[library]] for library in SOURCES},
        sources={library: [source_digest(library)] for library in SOURCES},
        entries=tuple(
            replace(e, traits={k: v for k, v in sorted(e.traits.items()) if k in kept[id(e)]}) for e in entries
        ),
        names=_names(),
    )


def with_known(index: Index, before: Index) -> Index:
    """Add the versions and sources of an older index, for each library whose entries have not changed."""
    versions, sources = dict(index.versions), dict(index.sources)
    for library in SOURCES:
        ours, theirs = (
            [values_of(entry) for entry in each.entries if entry.architecture.library == library]
            for each in (index, before)
        )
        if json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs)):
            versions[library] = sorted({*versions[library], *before.versions.get(library, ())})
            sources[library] = sorted({*sources[library], *before.sources.get(library, ())})
    return replace(index, versions=versions, sources=sources)


def _has_classifier(model: Any) -> bool:
    try:
        return bool(find_classifiers(model))
    except NoClassifierError:
        return False


def _names() -> Names:
    """List the names of all architectures of the installed libraries, with their tags and preprocessing."""
    different: dict[str, int] = {}
    tags: dict[str, dict[str, dict[str, int | None]]] = {library: {} for library in LIBRARIES}
    for ref in list_architectures():
        library, _, name = ref.partition("/")
        own = tags[library][name] = {}
        for tag in ("", *tags_of(library, name)):
            try:
                images = json.dumps(preprocessing(Architecture(library, name, tag=tag or None)))
            except ArchitectureError:
                own[tag] = None
                continue
            own[tag] = different.setdefault(images, len(different))
    return Names(
        tags=tags,
        preprocessings=tuple(map(json.loads, different)),
        renamed=dict(get_deprecated_models()),
        enums={name: weights_enum(name) for name in tags["torchvision"]},
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
