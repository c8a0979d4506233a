"""Find the architecture of a state dict from the names and shapes of its tensors alone.

Names are compared first, with the number of classes, the input channels and the image size left free. If no names
match, the shapes and the structure of the names are compared, which also finds checkpoints of other implementations.
Several architectures can fit; all of them are returned with what sets them apart, and none is guessed. The order in
which a file stores its tensors decides nothing, so a `.pth` and a `.safetensors` file give the same result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product

from fixify.catalogue.matches import (
    Candidate,
    Identification,
    Match,
    candidates_of,
    matches_of,
    plainest,
    refuse_several,
    shipped_entry,
    variants,
)
from fixify.catalogue.shipped import Entry, load_index
from fixify.catalogue.signature import StateShapes, head_positions
from fixify.errors import ArchitectureError, NoClassifierError
from fixify.models.architectures import Architecture, build, list_architectures, preprocessing
from fixify.models.built import shapes_of, signature_of, traits
from fixify.models.classifiers import find_classifiers
from fixify.models.index import entries_of
from fixify.models.openmmlab import is_swin_v2, openmmlab_names
from fixify.models.readings import Reading, differences, hand_made_head, readings
from fixify.models.structure import NameMatch, match_names

Progress = Callable[[int, int], object]

_MOST_CHOICES = 8
_SOME_CLASSES = 1000
# Key names that occur together in every state dict of efficientnet-pytorch and in no other known implementation. The
# fork github.com/ml-illustrated/EfficientNet-Lite-PyTorch has the same names. Every convolution of both comes from
# `get_same_padding_conv2d`, since their weights are ports of TensorFlow's checkpoints.
_EFFICIENTNET_PYTORCH = {
    *("_conv_stem.weight", "_bn0.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight"),
}
_EFFICIENTNET_PYTORCH_CODE = (
    "https://github.com/lukemelas/EfficientNet-PyTorch/blob/master/efficientnet_pytorch/model.py"
)


HAND_MADE_HEAD = (
    "A file does not show what is between its layers. Build the model in Python, load the file, and replace its last "
    "Linear there: fixify.fix_classifier_(model)"
)


def identify(shapes: Mapping[str, Sequence[int]], *, on_progress: Progress | None = None) -> Identification:
    """Find the architectures that a state dict fits.

    Args:
        shapes: Name -> shape of each tensor, in the order in which they are stored.
        on_progress: Called with (done, total) while architectures are built. This takes minutes, and happens only with
            library versions that the shipped index does not know.

    Raises:
        ArchitectureError: no architecture fits.
        NoClassifierError: the state dict is an architecture without its classifier.
    """
    _refuse_windows_of_openmmlab(shapes)
    state = StateShapes(shapes)
    index = load_index()
    installed = set(list_architectures())
    stale = {ref for ref in installed if index.is_stale(ref.partition("/")[0])}
    entries = [entry for entry in index.entries if entry.architecture.ref in installed]
    if stale:
        entries += _build(stale - {entry.architecture.ref for entry in entries}, on_progress)
    found = _search(state, shapes, entries, confirm=stale)
    if found is None and stale:
        found = _search(state, shapes, _build(stale, on_progress), confirm=set())
    if found is None:
        _refuse_headless(state, entries)
        _refuse_hand_made_head(shapes, entries)
        raise ArchitectureError(
            f"No architecture of timm, torchvision or the paper has such tensors: the file has {len(shapes):,}.",
            hint="If it is a modified architecture, or a part of one, see what differs from that: --arch NAME.",
        )
    return found


def fit(arch: Architecture, shapes: Mapping[str, Sequence[int]]) -> Candidate | None:
    """Fit a state dict to a known architecture.

    Args:
        arch: The architecture. Arguments that the shapes need are added to its own.
        shapes: Name -> shape of each tensor, in the order in which they are stored.

    Returns:
        None if the state dict does not fit.

    Raises:
        ArchitectureError: the architecture cannot be built with its arguments, or it has the shapes, and the names do
            not decide which tensor is which.
        AmbiguousArchitectureError: it fits in several ways that no shape tells apart
            (`fixify.catalogue.matches.variants`).
    """
    _refuse_windows_of_openmmlab(shapes)
    entries = [entry for variant in variants(arch) if (entry := _entry_of(variant)) is not None]
    if not entries:
        build(arch, meta=True)  # raises if its arguments are the reason
        return None
    state = StateShapes(shapes)
    matches = [match for match in matches_of(state, entries) if not match.extra or _confirmed(match, state)]
    refuse_several(matches, preprocessing)
    for match in matches:
        return Candidate(match.architecture, match.choices["num_classes"])
    for reading in readings(shapes, entries):
        matches = _read(reading, entries)
        refuse_several(matches, preprocessing, reading.notes)
        for match in matches:
            return _as_read(match, reading)
    arranged = _arranged(shapes, entries)
    _refuse_ties(arranged)
    refuse_several([match for match, _ in arranged], preprocessing)
    for match, names in arranged:
        if not _most_agree(names.key_map):
            return Candidate(match.architecture, match.choices["num_classes"], names.key_map)
    return None


def explain(arch: Architecture, shapes: Mapping[str, Sequence[int]]) -> str:
    """Say in a few lines why a state dict does not fit an architecture: the first tensors that differ.

    Raises:
        ArchitectureError: the architecture cannot be built with its arguments.
    """
    entries = [entry for variant in variants(arch) if (entry := _entry_of(variant)) is not None]
    head = hand_made_head(shapes, entries)
    if head is not None:
        return head.describe()
    return "\n".join(differences(arch, shapes))


def refuse_headless(arch: Architecture, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a state dict that is this architecture without a classifier, and an architecture that never has one.

    Raises:
        NoClassifierError: one of the two is the case.
    """
    entries = [entry for variant in variants(arch) if (entry := _entry_of(variant)) is not None]
    if not entries:
        find_classifiers(build(arch, meta=True), arch)
    _refuse_headless(StateShapes(shapes), entries)


def _search(
    state: StateShapes, shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry], *, confirm: Collection[str]
) -> Identification | None:
    """Find the entries that fit, and build those that are uncertain to check their shapes.

    Entries are uncertain if `confirm` contains their name, because they may be outdated, or if they need arguments.
    """
    matches = [
        match
        for match in plainest(matches_of(state, entries))
        if not (match.extra or match.entry.architecture.ref in confirm) or _confirmed(match, state)
    ]
    if matches:
        return Identification(candidates_of([(match, None) for match in matches], preprocessing), "keys")
    return _search_readings(shapes, entries) or _search_structure(shapes, entries)


def _search_structure(shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry]) -> Identification | None:
    """Find the entries whose shapes can be matched by the structure of the names.

    Raises:
        ArchitectureError: the names do not decide which tensor is which, or only a few are not the architecture's.
    """
    arranged = _arranged(shapes, entries)
    if not arranged:
        return None
    fewest = min(len(match.extra) for match, _ in arranged)
    arranged = [(match, names) for match, names in arranged if len(match.extra) == fewest]
    narrowed_by = None
    if len(arranged) > 1 and shapes.keys() >= _EFFICIENTNET_PYTORCH:
        padded = [
            (match, names)
            for match, names in arranged
            if "as TensorFlow" in match.entry.traits.get("padding", ("", ""))[1]
        ]
        if padded:
            arranged = padded
            narrowed_by = f"the key names of efficientnet-pytorch (padding as TensorFlow, {_EFFICIENTNET_PYTORCH_CODE})"
    _refuse_ties(arranged)
    candidates = candidates_of([(match, names.key_map) for match, names in arranged], preprocessing)
    for candidate in candidates:
        _refuse_odd_names(candidate)
    return Identification(candidates, "shapes", narrowed_by)


def _arranged(shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry]) -> list[tuple[Match, NameMatch]]:
    """Find the entries that have the shapes of a state dict, and how its names are matched to theirs."""
    theirs = StateShapes(shapes)
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.signature.num_tensors == len(theirs.ordered):
            groups.setdefault((entry.signature.ordered, entry.signature.keys), []).append(entry)
    found: list[tuple[Match, NameMatch]] = []
    for group in groups.values():
        own = shapes_of(build(group[0].architecture, num_classes=_SOME_CLASSES, meta=True))
        matched: dict[tuple[tuple[int, ...], ...], NameMatch | None] = {}
        for entry in group:  # they may differ in how a size of images becomes one of tensors
            for choices in _choices(theirs, entry, own):
                chosen = _with_choices(own, entry, choices)
                key = tuple(chosen.values())
                names = matched[key] = matched[key] if key in matched else match_names(shapes, chosen)
                match = Match(entry, choices)
                if names is not None and (not match.extra or _confirmed(match, theirs, names=names.key_map)):
                    found.append((match, names))
    return found


def _choices(theirs: StateShapes, entry: Entry, own: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Find the choices with which an entry has the shapes of a state dict, each as often."""
    free = entry.signature.free
    places = StateShapes(own).sorted
    axes: dict[int, set[int]] = {}
    for group in free:
        for place, _, axis in group.places:
            axes.setdefault(place, set()).add(axis)
    every = Counter(shape for _, shape in theirs.ordered)
    fixed = Counter(shape for place, (_, shape) in enumerate(places) if place not in axes)
    rest = every - fixed
    if rest.total() != len(axes):
        return
    possible: dict[str, set[int]] = {}
    for group in free:
        for place, _, axis in group.places:
            shape, masked = places[place][1], axes[place]
            alike = [
                other
                for other in rest
                if len(other) == len(shape)
                and all(a == b for dim, (a, b) in enumerate(zip(other, shape, strict=True)) if dim not in masked)
            ]
            here = {choice for other in alike for choice in group.solve(other[axis])}
            possible[group.choice] = possible.get(group.choice, here) & here
    for values in islice(product(*(sorted(found) for found in possible.values())), _MOST_CHOICES):
        choices = dict(zip(possible, values, strict=True))
        if (
            Counter(shape for _, shape in StateShapes(_with_choices(own, entry, choices)).ordered) == every
            and choices["num_classes"] > 0
        ):
            yield choices


def _with_choices(
    own: Mapping[str, Sequence[int]], entry: Entry, choices: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return an entry's names and shapes with other choices."""
    shapes = {key: list(shape) for key, shape in own.items()}
    places = [key for key, _ in StateShapes(own).sorted]
    for group in entry.signature.free:
        for place, _, axis in group.places:
            shapes[places[place]][axis] = group.at(choices[group.choice])
    return {key: tuple(shape) for key, shape in shapes.items()}


def _refuse_windows_of_openmmlab(shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse the attention in windows of OpenMMLab, unless it is the Swin of a classifier.

    Its networks have the shapes of timm's, and their downsample layers expect their channels in another order.
    """
    windows = next((key for key in shapes if ".w_msa." in key), None)
    names = openmmlab_names(shapes)
    if windows is None or (names is not None and names.family == "Swin"):
        return
    what = "Swin V2 of mmpretrain" if is_swin_v2(shapes) else "Swin of OpenMMLab that is no classifier of mmpretrain"
    raise ArchitectureError(
        f"This is a {what} ({windows}). Its downsample layers expect their channels in another order than timm's.",
        hint="Convert it to timm's names and order first (fixify.models.openmmlab.patches_first does it for one "
        "tensor), or start from timm's weights: fixify convert timm/"
        + ("swinv2_tiny_window8_256" if is_swin_v2(shapes) else "swin_tiny_patch4_window7_224"),
    )


def _refuse_ties(arranged: Sequence[tuple[Match, NameMatch]]) -> None:
    for match, names in arranged:
        if names.tie is not None:
            raise ArchitectureError(
                f"The tensors have the shapes of {match.entry.architecture.ref}, but their names do not show which is "
                f"which: {names.tie}",
                hint="The order of a file is no proof. Rename the tensors so that numbers count the modules in the "
                "order in which they run (norm1, norm2), or as the architecture names them.",
            )


def _search_readings(shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry]) -> Identification | None:
    """Find the entries that fit under the names of one of the readings."""
    for reading in readings(shapes, entries):
        matches = plainest(_read(reading, entries))
        if matches:
            found = [
                replace(
                    each,
                    key_map=reading.key_map,
                    notes=reading.notes,
                    shapes=reading.shapes,
                    unfolded=reading.unfolded,
                )
                for each in candidates_of([(match, None) for match in matches], preprocessing)
            ]
            return Identification(tuple(found), "reading")
    return None


def _read(reading: Reading, entries: Sequence[Entry]) -> list[Match]:
    """Return the entries that fit a reading, with the arguments that it shows, built and compared."""
    state = StateShapes(reading.shapes)
    pooling = reading.kwargs.get("global_pool")
    if pooling is None:
        found = matches_of(state, entries)
    else:
        # The entries are those of the default pooling, under which the norm has the other name.
        before, after = ("fc_norm", "norm") if pooling == "avg" else ("norm", "fc_norm")
        usual = {re.sub(rf"^{before}\.", f"{after}.", key): shape for key, shape in reading.shapes.items()}
        found = [
            replace(match, entry=replace(match.entry, architecture=_with(match.entry.architecture, reading.kwargs)))
            for match in matches_of(StateShapes(usual), entries)
            if match.entry.architecture.library == "timm" and "global_pool" not in match.entry.architecture.kwargs
        ]
    return [match for match in found if _confirmed(match, state)]


def _as_read(match: Match, reading: Reading) -> Candidate:
    return Candidate(
        match.architecture,
        match.choices["num_classes"],
        reading.key_map,
        notes=reading.notes,
        shapes=reading.shapes,
        unfolded=reading.unfolded,
    )


def _with(arch: Architecture, kwargs: Mapping[str, object]) -> Architecture:
    return replace(arch, kwargs={**arch.kwargs, **kwargs})


def _most_agree(key_map: Mapping[str, str]) -> bool:
    """Return whether a map by shapes keeps most names and renames a few, which is a guess."""
    same = sum(old == new for old, new in key_map.items())
    return len(key_map) / 2 < same < len(key_map)


def _refuse_odd_names(candidate: Candidate) -> None:
    """Refuse a match by shapes if most names agree: those that do not are a message."""
    key_map = candidate.key_map
    if key_map is None or not _most_agree(key_map):
        return
    odd = [(old, new) for old, new in key_map.items() if old != new]
    shown = ", ".join(f"{old} stands where {new} is expected" for old, new in odd[:3])
    raise ArchitectureError(
        f"{len(key_map) - len(odd)} of {len(key_map)} names are those of {candidate.architecture.ref}, and these are "
        f"not: {shown}{f' and {len(odd) - 3} more' if len(odd) > 3 else ''}.",
        hint="The network may compute something else there. Rename the tensors if you know that it does not, or name "
        "the architecture with its arguments: --arch NAME,option=value",
    )


def _refuse_hand_made_head(shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry]) -> None:
    head = hand_made_head(shapes, entries)
    if head is not None:
        raise NoClassifierError(
            f"This is {head.architecture.ref} with another head: {head.describe()}.",
            hint=HAND_MADE_HEAD,
        )


def _confirmed(match: Match, state: StateShapes, *, names: Mapping[str, str] | None = None) -> bool:
    """Build the architecture with the match's choices, and compare all names (or what they map to) and shapes."""
    try:
        model = build(match.architecture, num_classes=match.choices["num_classes"], meta=True)
    except ArchitectureError:
        return False
    renamed = state.sorted if names is None else sorted((names[key], shape) for key, shape in state.ordered)
    return StateShapes(shapes_of(model)).sorted == renamed


def _refuse_headless(state: StateShapes, entries: Iterable[Entry]) -> None:
    for entry in entries:
        signature = entry.signature
        missing = len(head_positions(signature.free))
        if len(state.ordered) == signature.num_tensors - missing and (
            state.headless(signature.free) == signature.headless
        ):
            raise NoClassifierError(
                f"These {len(state.ordered)} tensors are {entry.architecture.ref} without its classifier.",
                hint="fixify replaces an existing classifier. Convert a checkpoint that still has it, or give it one: "
                f"--arch {entry.architecture.ref} --classifier FILE (a matrix of C x N)",
            )


def _entry_of(arch: Architecture) -> Entry | None:
    """Look an architecture up in the index, or build it; None if it takes no number of classes."""
    known = None if load_index().is_stale(arch.library) else shipped_entry(arch)
    if known is not None:
        return known
    found = signature_of(arch)
    return None if found is None else Entry(arch, found[0], traits(found[1]))


# Entries that were built in this process because the index does not know the library's version. Building takes seconds
# to minutes.
_built: dict[str, list[Entry]] = {}


def _build(refs: Iterable[str], on_progress: Progress | None) -> list[Entry]:
    names = sorted(refs)
    new = [name for name in names if name not in _built]
    for done, name in enumerate(new, start=1):
        _built[name] = list(entries_of([name]))
        if on_progress is not None:
            on_progress(done, len(new))
    return [entry for name in names for entry in _built[name]]
