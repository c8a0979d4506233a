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
from dataclasses import dataclass, field, replace
from itertools import islice, product

from fixify.errors import AmbiguousArchitectureError, ArchitectureError, NoClassifierError
from fixify.models.architectures import Architecture, build, list_architectures, preprocessing
from fixify.models.classifiers import find_classifiers
from fixify.models.index import Entry, entries_of, load_index, variants
from fixify.models.openmmlab import is_swin_v2, openmmlab_names
from fixify.models.readings import Reading, differences, hand_made_head, readings
from fixify.models.signature import StateShapes, Trait, head_positions, shapes_of, signature_of, traits
from fixify.models.structure import NameMatch, match_names

Progress = Callable[[int, int], object]

# The class names of the modules: a long trait, and mostly a consequence of another trait that says it better.
_SHOWN_LAST = {".class"}
_MOST_SHOWN = 5
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


@dataclass(frozen=True)
class Candidate:
    """An architecture that a state dict fits.

    Attributes:
        architecture: The architecture, with the arguments that the shapes need (`in_chans`, `img_size`).
        num_classes: Number of classes of its classifier.
        key_map: Name in the state dict -> name in the architecture; None where they are the same. BatchNorm's counters
            are omitted if the two have different numbers of them, and so are tensors without effect on answers.
        aliases: Other architectures that are the same network with the same preprocessing.
        differences: Trait -> value, for the traits that set it apart from the other candidates.
        notes: How its names were read, if they are not the architecture's own.
        shapes: Name in the architecture -> shape, for tensors that are stored with other axes of length one.
        unfolded: See `Reading`.
    """

    architecture: Architecture
    num_classes: int
    key_map: Mapping[str, str] | None = None
    aliases: tuple[str, ...] = ()
    differences: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    unfolded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Identification:
    """The architectures that a state dict fits.

    Attributes:
        candidates: At least one. If there are several, they fit equally well and compute different things.
        by: What was compared: "keys" or "shapes"; "name" if the checkpoint names its architecture; "reading" if the
            keys are known under other names (`fixify.models.readings`).
        narrowed_by: What else left only these candidates, in words, or None.
    """

    candidates: tuple[Candidate, ...]
    by: str
    narrowed_by: str | None = None

    @property
    def choices(self) -> dict[str, str]:
        """Each candidate as it is typed -> what sets it apart, in words."""
        return {candidate.architecture.spelled: in_words(candidate.differences) for candidate in self.candidates}

    def describe(self) -> str:
        """List the candidates, one per line, with what sets each apart."""
        return "\n".join(f"  {name}: {facts}" if facts else f"  {name}" for name, facts in self.choices.items())


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
        AmbiguousArchitectureError: it fits in several ways that no shape tells apart (`fixify.models.index.variants`).
    """
    _refuse_windows_of_openmmlab(shapes)
    entries = [entry for variant in variants(arch) if (entry := _entry_of(variant)) is not None]
    if not entries:
        build(arch, meta=True)  # raises if its arguments are the reason
        return None
    state = StateShapes(shapes)
    matches = [match for match in _matches(state, entries) if not match.extra or _confirmed(match, state)]
    _refuse_several(matches)
    for match in matches:
        return Candidate(match.architecture, match.choices["num_classes"])
    for reading in readings(shapes, entries):
        matches = _read(reading, entries)
        _refuse_several(matches, reading.notes)
        for match in matches:
            return _as_read(match, reading)
    arranged = _arranged(shapes, entries)
    _refuse_ties(arranged)
    _refuse_several([match for match, _ in arranged])
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


@dataclass(frozen=True)
class Behaviour:
    """What an architecture computes, beyond its names and shapes.

    Attributes:
        library: Its library. Traits that are plain attributes of modules (".num_heads") can only be compared between
            architectures of the same library.
        values: Its traits and its preprocessing.
    """

    library: str
    values: Mapping[str, Trait]

    @classmethod
    def of(cls, arch: Architecture, traits: Mapping[str, Trait]) -> Behaviour:
        """Combine the traits of an architecture with its preprocessing."""
        images = {key: _readable(value) for key, value in preprocessing(arch).items()}
        return cls(arch.library, dict(traits) | {key: (text, text) for key, text in images.items()})


def merge(behaviours: Sequence[Behaviour]) -> list[list[int]]:
    """Group the indices of architectures that are the same network with the same preprocessing under several names.

    Networks of different libraries are never grouped, because their modules do not show whether they are the same.
    """
    groups: list[list[int]] = []
    for index, found in enumerate(behaviours):
        for group in groups:
            if behaviours[group[0]] == found:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def set_apart(behaviours: Sequence[Behaviour]) -> list[dict[str, str]]:
    """Return, for each architecture, its values of the traits that differ, the most telling traits first."""
    shown = []
    for name in dict.fromkeys(name for found in behaviours for name in found.values):
        own = name.startswith(".")
        values = {(found.library if own else "", found.values.get(name, ("", ""))[0]) for found in behaviours}
        if len(values) > (len({library for library, _ in values}) if own else 1):
            shown.append(name)
    texts = {name: {found.values[name][1] for found in behaviours if name in found.values} for name in shown}
    shown.sort(key=lambda name: (len(texts[name]) == 1, name in _SHOWN_LAST, name.startswith("."), name))
    return [
        {
            name.lstrip("."): found.values[name][1] + (" (placed differently)" if len(texts[name]) == 1 else "")
            for name in shown[:_MOST_SHOWN]
            if name in found.values
        }
        for found in behaviours
    ]


def in_words(differences: Mapping[str, str]) -> str:
    """Write differences as text.

    >>> in_words({"padding": "even", "mean": "0.5 0.5 0.5"})
    'padding even; mean 0.5 0.5 0.5'
    """
    return "; ".join(f"{trait} {value}" for trait, value in differences.items())


@dataclass(frozen=True)
class _Match:
    """An entry of the index that fits, and the choices that make it fit."""

    entry: Entry
    choices: Mapping[str, int]

    @property
    def extra(self) -> dict[str, int]:
        """Choices that differ from the architecture's defaults."""
        defaults = self.entry.signature.defaults
        return {key: value for key, value in self.choices.items() if key in defaults and value != defaults[key]}

    @property
    def architecture(self) -> Architecture:
        arch = self.entry.architecture
        return replace(arch, kwargs={**arch.kwargs, **self.extra})


def _search(
    state: StateShapes, shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry], *, confirm: Collection[str]
) -> Identification | None:
    """Find the entries that fit, and build those that are uncertain to check their shapes.

    Entries are uncertain if `confirm` contains their name, because they may be outdated, or if they need arguments.
    """
    matches = [
        match
        for match in _plainest(_matches(state, entries))
        if not (match.extra or match.entry.architecture.ref in confirm) or _confirmed(match, state)
    ]
    if matches:
        return Identification(_candidates([(match, None) for match in matches]), "keys")
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
    candidates = _candidates([(match, names.key_map) for match, names in arranged])
    for candidate in candidates:
        _refuse_odd_names(candidate)
    return Identification(candidates, "shapes", narrowed_by)


def _arranged(shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry]) -> list[tuple[_Match, NameMatch]]:
    """Find the entries that have the shapes of a state dict, and how its names are matched to theirs."""
    theirs = StateShapes(shapes)
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.signature.num_tensors == len(theirs.ordered):
            groups.setdefault((entry.signature.ordered, entry.signature.keys), []).append(entry)
    found: list[tuple[_Match, NameMatch]] = []
    for group in groups.values():
        own = shapes_of(build(group[0].architecture, num_classes=_SOME_CLASSES, meta=True))
        matched: dict[tuple[tuple[int, ...], ...], NameMatch | None] = {}
        for entry in group:  # they may differ in how a size of images becomes one of tensors
            for choices in _choices(theirs, entry, own):
                chosen = _with_choices(own, entry, choices)
                key = tuple(chosen.values())
                names = matched[key] = matched[key] if key in matched else match_names(shapes, chosen)
                match = _Match(entry, choices)
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


def _refuse_ties(arranged: Sequence[tuple[_Match, NameMatch]]) -> None:
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
        matches = _plainest(_read(reading, entries))
        if matches:
            found = [
                replace(
                    each,
                    key_map=reading.key_map,
                    notes=reading.notes,
                    shapes=reading.shapes,
                    unfolded=reading.unfolded,
                )
                for each in _candidates([(match, None) for match in matches])
            ]
            return Identification(tuple(found), "reading")
    return None


def _read(reading: Reading, entries: Sequence[Entry]) -> list[_Match]:
    """Return the entries that fit a reading, with the arguments that it shows, built and compared."""
    state = StateShapes(reading.shapes)
    pooling = reading.kwargs.get("global_pool")
    if pooling is None:
        found = _matches(state, entries)
    else:
        # The entries are those of the default pooling, under which the norm has the other name.
        before, after = ("fc_norm", "norm") if pooling == "avg" else ("norm", "fc_norm")
        usual = {re.sub(rf"^{before}\.", f"{after}.", key): shape for key, shape in reading.shapes.items()}
        found = [
            replace(match, entry=replace(match.entry, architecture=_with(match.entry.architecture, reading.kwargs)))
            for match in _matches(StateShapes(usual), entries)
            if match.entry.architecture.library == "timm" and "global_pool" not in match.entry.architecture.kwargs
        ]
    return [match for match in found if _confirmed(match, state)]


def _as_read(match: _Match, reading: Reading) -> Candidate:
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


def what_to_type(choices: Mapping[str, str]) -> str:
    """Say how to choose between architectures: which one is right, where that is known, else an example.

    Args:
        choices: Each architecture as it is typed -> what sets it apart, in words.

    >>> what_to_type({"timm/a": "padding even", "timm/b": "padding odd"})
    'Choose one: --arch timm/a'
    """
    if set(choices.values()) == {"transform_input False", "transform_input True"}:
        scratch, further = sorted(choices, key=choices.__getitem__)
        return (
            f"If its training started from torchvision's own weights: --arch {further}\n"
            f"If it was trained from scratch: --arch {scratch}"
        )
    return f"Choose one: --arch {next(iter(choices))}"


def _refuse_several(matches: Sequence[_Match], notes: Sequence[str] = ()) -> None:
    if len(matches) > 1:
        apart = set_apart([Behaviour.of(match.architecture, match.entry.traits) for match in matches])
        choices = {match.architecture.spelled: in_words(facts) for match, facts in zip(matches, apart, strict=True)}
        raise AmbiguousArchitectureError(
            " ".join([f"The checkpoint does not show which of these it is: {' or '.join(choices)}.", *notes]),
            hint=what_to_type(choices),
            choices=choices,
        )


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


def _matches(state: StateShapes, entries: Iterable[Entry]) -> list[_Match]:
    """Return the entries that have the names of a state dict, and its shapes with some choices."""
    found = []
    for entry in entries:
        signature = entry.signature
        if signature.num_tensors != len(state.ordered) or signature.keys != state.keys:
            continue
        choices = state.choices(signature.free)
        if choices is None or choices["num_classes"] < 1:
            continue
        if state.named(signature.free) == signature.named:
            found.append(_Match(entry, choices))
    return found


def _plainest(matches: list[_Match]) -> list[_Match]:
    """Keep the matches with the fewest arguments: vit_base_patch16_384, not vit_base_patch16_224,img_size=384."""
    fewest = min((len(match.extra) for match in matches), default=0)
    return [match for match in matches if len(match.extra) == fewest]


def _confirmed(match: _Match, state: StateShapes, *, names: Mapping[str, str] | None = None) -> bool:
    """Build the architecture with the match's choices, and compare all names (or what they map to) and shapes."""
    try:
        model = build(match.architecture, num_classes=match.choices["num_classes"], meta=True)
    except ArchitectureError:
        return False
    renamed = state.sorted if names is None else sorted((names[key], shape) for key, shape in state.ordered)
    return StateShapes(shapes_of(model)).sorted == renamed


def _candidates(matches: Sequence[tuple[_Match, Mapping[str, str] | None]]) -> tuple[Candidate, ...]:
    """Merge the matches (with the map of their names) that are the same network, and say what sets the others apart."""
    behaviours = [Behaviour.of(match.architecture, match.entry.traits) for match, _ in matches]
    # The index keeps the traits that differ between architectures of the same names, or of the same shapes in order.
    alike: dict[str, list[int]] = {}
    for index, (match, key_map) in enumerate(matches):
        alike.setdefault("" if key_map is None else match.entry.signature.ordered, []).append(index)
    groups = [
        [indices[index] for index in group]
        for indices in alike.values()
        for group in merge([behaviours[index] for index in indices])
    ]
    differences = set_apart([behaviours[group[0]] for group in groups])
    return tuple(
        Candidate(
            architecture=matches[first][0].architecture,
            num_classes=matches[first][0].choices["num_classes"],
            key_map=matches[first][1],
            aliases=tuple(matches[index][0].architecture.ref for index in others),
            differences=apart,
        )
        for (first, *others), apart in zip(groups, differences, strict=True)
    )


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
    if not load_index().is_stale(arch.library):
        for entry in load_index().entries:
            known = entry.architecture
            if (known.library, known.name, known.kwargs) == (arch.library, arch.name, arch.kwargs):
                return replace(entry, architecture=arch)
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


def _readable(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_readable(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
