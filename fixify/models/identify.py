"""Naming schemes of other implementations, as far as they settle what shapes alone leave open.

A checkpoint with foreign key names is identified by the order of its shapes, and several architectures can have the
same. Some schemes belong to one implementation that is known to compute in one way; that decides between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fixify.errors import AmbiguousArchitectureError, ArchitectureError, NoClassifierError
from fixify.models.architectures import Architecture, build, list_architectures, preprocessing
from fixify.models.classifiers import find_classifiers
from fixify.models.index import Entry, entries_of, load_index, variants
from fixify.models.signature import StateShapes, Trait, head_positions, is_counter, shapes_of, signature_of, traits


@dataclass(frozen=True)
class NamingScheme:
    """Key names that one implementation uses.

    Attributes:
        name: The implementation.
        keys: Names that occur in every state dict of it, and together in no other known one.
        trait: The trait (see `fixify.models.signature`) that it settles.
        value: What the trait's value must contain.
        provenance: Where that is to be seen.
    """

    name: str
    keys: frozenset[str]
    trait: str
    value: str
    provenance: str


SCHEMES = (
    NamingScheme(
        name="efficientnet-pytorch",
        keys=frozenset({"_conv_stem.weight", "_bn0.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight"}),
        trait="padding",
        value="as TensorFlow",
        # Also the naming of its fork github.com/ml-illustrated/EfficientNet-Lite-PyTorch. Every convolution of both
        # comes from `get_same_padding_conv2d`; their weights are ports of the TensorFlow checkpoints.
        provenance="https://github.com/lukemelas/EfficientNet-PyTorch/blob/master/efficientnet_pytorch/model.py",
    ),
)


def recognise(keys: Collection[str]) -> NamingScheme | None:
    """The naming scheme of these keys, if it is a known one."""
    present = set(keys)
    return next((scheme for scheme in SCHEMES if scheme.keys <= present), None)


# Architectures with the same names and shapes: which of them are one network, and what sets the others apart.


_LAST = {".class"}  # long, and mostly a consequence of what is said better by another trait
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Facts:
    """What is known of one architecture besides its shapes.

    Attributes:
        library: The traits that are plain attributes of modules (".num_heads") mean the same only within it.
        values: Its traits, and its preprocessing.
    """

    library: str
    values: Mapping[str, Trait]

    @classmethod
    def of(cls, arch: Architecture, traits: Mapping[str, Trait]) -> Facts:
        """The facts of an architecture of which the traits are known."""
        images = {key: _readable(value) for key, value in preprocessing(arch).items()}
        return cls(arch.library, dict(traits) | {key: (text, text) for key, text in images.items()})


def merge(facts: Sequence[Facts]) -> list[list[int]]:
    """Group architectures that nothing sets apart: the same network with the same preprocessing, under two names.

    Networks of different libraries are never merged: that they are the same cannot be seen from their modules.
    """
    groups: list[list[int]] = []
    for index, found in enumerate(facts):
        for group in groups:
            if facts[group[0]] == found:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def set_apart(facts: Sequence[Facts]) -> list[dict[str, str]]:
    """For each architecture, its values of the traits that are not the same for all, the telling ones first."""
    shown = []
    for name in dict.fromkeys(name for found in facts for name in found.values):
        own = name.startswith(".")
        values = {(found.library if own else "", found.values.get(name, ("", ""))[0]) for found in facts}
        if len(values) > (len({library for library, _ in values}) if own else 1):
            shown.append(name)
    texts = {name: {found.values[name][1] for found in facts if name in found.values} for name in shown}
    shown.sort(key=lambda name: (len(texts[name]) == 1, name in _LAST, name.startswith("."), name))
    return [
        {
            name.lstrip("."): found.values[name][1] + (" (placed differently)" if len(texts[name]) == 1 else "")
            for name in shown[:_MOST_SHOWN]
            if name in found.values
        }
        for found in facts
    ]


def in_words(differences: Mapping[str, str]) -> str:
    """What sets one architecture apart, for a person: "padding even; mean 0.5 0.5 0.5"."""
    return "; ".join(f"{trait} {value}" for trait, value in differences.items())


def _readable(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_readable(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Which architecture a state dict is of, from its names and shapes alone.
#
# First by names (with the number of classes, the input channels and the image size left free), then by the order of the
# shapes, for checkpoints of other implementations. Several architectures can fit; all of them are returned, with what
# sets them apart, and none is guessed.


Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Candidate:
    """An architecture that a state dict fits.

    Attributes:
        architecture: With the arguments that the shapes ask for (`in_chans`, `img_size`).
        num_classes: Of its classifier.
        key_map: Name in the state dict -> name in the architecture; None where they are the same. BatchNorm's
            counters are left out where the numbers of them differ.
        aliases: Other architectures that are the same network with the same preprocessing.
        differences: What sets it apart from the other candidates, by trait.
    """

    architecture: Architecture
    num_classes: int
    key_map: Mapping[str, str] | None = None
    aliases: tuple[str, ...] = ()
    differences: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Identification:
    """What a state dict can be.

    Attributes:
        candidates: At least one. More than one: they fit equally well and compute different things.
        by: "keys" or "shapes".
        scheme: The foreign naming scheme that narrowed the candidates down, if one did.
    """

    candidates: tuple[Candidate, ...]
    by: str
    scheme: NamingScheme | None = None

    @property
    def choices(self) -> dict[str, str]:
        """How each candidate is spelled -> what sets it apart, in words."""
        return {candidate.architecture.spelled: in_words(candidate.differences) for candidate in self.candidates}

    def describe(self) -> str:
        """One line a candidate, with what sets it apart."""
        return "\n".join(f"  {name}: {facts}" if facts else f"  {name}" for name, facts in self.choices.items())


@dataclass(frozen=True)
class _Match:
    entry: Entry
    choices: Mapping[str, int]

    @property
    def extra(self) -> dict[str, int]:
        """Choices that are not the architecture's own."""
        defaults = self.entry.signature.defaults
        return {key: value for key, value in self.choices.items() if key in defaults and value != defaults[key]}

    @property
    def architecture(self) -> Architecture:
        arch = self.entry.architecture
        return replace(arch, kwargs={**arch.kwargs, **self.extra})


def identify(shapes: Mapping[str, Sequence[int]], *, on_progress: Progress | None = None) -> Identification:
    """Find the architectures that a state dict fits.

    Args:
        shapes: Name -> shape of each tensor, in the order in which they are stored.
        on_progress: Called with (done, total) where architectures have to be built, which takes minutes: only with
            versions of the libraries that the shipped index does not know.

    Raises:
        ArchitectureError: none fits.
        NoClassifierError: it is an architecture without its classifier.
    """
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
        raise ArchitectureError(
            f"No architecture of timm, torchvision or the paper has these {len(state.ordered)} tensors.",
            hint="If it is one that was changed, or half of one, say which: --arch NAME.",
        )
    return found


def fit(arch: Architecture, shapes: Mapping[str, Sequence[int]]) -> Candidate | None:
    """How a state dict fits an architecture that is known.

    Args:
        arch: Arguments that the shapes ask for are added to its own.
        shapes: Name -> shape of each tensor, in the order in which they are stored.

    Returns:
        None if it does not.

    Raises:
        ArchitectureError: the architecture cannot be built with its arguments.
        AmbiguousArchitectureError: it fits in several ways that no shape tells apart (`fixify.models.index.variants`).
    """
    entries = [entry for variant in variants(arch) if (entry := _entry_of(variant)) is not None]
    if not entries:
        build(arch, meta=True)  # says so if it is the arguments that it does not take
        return None
    state = StateShapes(shapes)
    for by_order in (False, True):
        matches = [
            match
            for match in _matches(state, entries, by_order=by_order)
            if not match.extra or _confirmed(match, state, by_order=by_order)
        ]
        if len(matches) > 1:
            apart = set_apart([Facts.of(match.architecture, match.entry.traits) for match in matches])
            choices = {match.architecture.spelled: in_words(facts) for match, facts in zip(matches, apart, strict=True)}
            raise AmbiguousArchitectureError(
                f"A checkpoint cannot show which it is: {' or '.join(choices)}.",
                hint=f"Say it in full: --arch {matches[0].architecture.spelled}",
                choices=choices,
            )
        for match in matches:
            return Candidate(match.architecture, match.choices["num_classes"], _key_map(match, shapes, by_order))
    return None


def refuse_headless(arch: Architecture, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise if a state dict is this architecture without a classifier, or if it never has one.

    Raises:
        NoClassifierError: so it is.
    """
    entries = [entry for variant in variants(arch) if (entry := _entry_of(variant)) is not None]
    if not entries:
        find_classifiers(build(arch, meta=True), arch)
    _refuse_headless(StateShapes(shapes), entries)


def _entry_of(arch: Architecture) -> Entry | None:
    if not load_index().is_stale(arch.library):
        for entry in load_index().entries:
            known = entry.architecture
            if (known.library, known.name, known.kwargs) == (arch.library, arch.name, arch.kwargs):
                return replace(entry, architecture=arch)
    found = signature_of(arch)
    return None if found is None else Entry(arch, found[0], traits(found[1]))


def _refuse_headless(state: StateShapes, entries: Iterable[Entry]) -> None:
    for entry in entries:
        signature = entry.signature
        missing = len(head_positions(signature.free))
        if len(state.ordered) == signature.num_tensors - missing and (
            state.headless(signature.free) == signature.headless
        ):
            raise NoClassifierError(
                f"These {len(state.ordered)} tensors are {entry.architecture.ref} without its classifier.",
                hint="fixify replaces a classifier that is there; convert a checkpoint that still has it.",
            )


_built: dict[str, list[Entry]] = {}
"""What had to be built in this process, because the index does not know the libraries: it takes seconds to minutes."""


def _build(refs: Iterable[str], on_progress: Progress | None) -> list[Entry]:
    names = sorted(refs)
    new = [name for name in names if name not in _built]
    for done, name in enumerate(new, start=1):
        _built[name] = list(entries_of([name]))
        if on_progress is not None:
            on_progress(done, len(new))
    return [entry for name in names for entry in _built[name]]


def _search(
    state: StateShapes, shapes: Mapping[str, Sequence[int]], entries: Sequence[Entry], *, confirm: Collection[str]
) -> Identification | None:
    """What fits; those named in `confirm`, and those that need arguments, are built to see whether they really do."""
    for by_order in (False, True):
        matches = [
            match
            for match in _plainest(_matches(state, entries, by_order=by_order))
            if not (match.extra or match.entry.architecture.ref in confirm)
            or _confirmed(match, state, by_order=by_order)
        ]
        if matches:
            scheme = recognise(shapes) if by_order else None
            matches, scheme = _narrowed(matches, scheme)
            return Identification(_candidates(matches, shapes, by_order), "shapes" if by_order else "keys", scheme)
    return None


def _matches(state: StateShapes, entries: Iterable[Entry], *, by_order: bool) -> list[_Match]:
    found = []
    for entry in entries:
        signature = entry.signature
        if signature.num_tensors != len(state.ordered) or (not by_order and signature.keys != state.keys):
            continue
        choices = state.choices(signature.free, by_order=by_order)
        if choices is None or choices["num_classes"] < 1:
            continue
        same = (
            state.by_order(signature.free) == signature.ordered
            if by_order
            else (state.named(signature.free) == signature.named)
        )
        if same:
            found.append(_Match(entry, choices))
    return found


def _plainest(matches: list[_Match]) -> list[_Match]:
    """Those that need the fewest arguments: vit_base_patch16_384, not vit_base_patch16_224 at another image size."""
    fewest = min((len(match.extra) for match in matches), default=0)
    return [match for match in matches if len(match.extra) == fewest]


def _confirmed(match: _Match, state: StateShapes, *, by_order: bool) -> bool:
    """Whether the architecture, built with these choices, has exactly these shapes."""
    try:
        model = build(match.architecture, num_classes=match.choices["num_classes"], meta=True)
    except ArchitectureError:
        return False
    built = StateShapes(shapes_of(model))
    if by_order:
        return [shape for _, shape in built.ordered] == [shape for _, shape in state.ordered]
    return built.sorted == state.sorted


def _narrowed(matches: list[_Match], scheme: NamingScheme | None) -> tuple[list[_Match], NamingScheme | None]:
    if scheme is None or len(matches) == 1:
        return matches, None
    kept = [m for m in matches if scheme.value in m.entry.traits.get(scheme.trait, ("", ""))[1]]
    return (kept, scheme) if kept else (matches, None)


def _candidates(matches: list[_Match], shapes: Mapping[str, Sequence[int]], by_order: bool) -> tuple[Candidate, ...]:
    facts = [Facts.of(match.architecture, match.entry.traits) for match in matches]
    groups = merge(facts)
    differences = set_apart([facts[group[0]] for group in groups])
    return tuple(
        Candidate(
            architecture=matches[first].architecture,
            num_classes=matches[first].choices["num_classes"],
            key_map=_key_map(matches[first], shapes, by_order),
            aliases=tuple(matches[index].architecture.ref for index in others),
            differences=apart,
        )
        for (first, *others), apart in zip(groups, differences, strict=True)
    )


def _key_map(match: _Match, shapes: Mapping[str, Sequence[int]], by_order: bool) -> dict[str, str] | None:
    if not by_order:
        return None
    model = build(match.architecture, num_classes=match.choices["num_classes"], meta=True)
    theirs, ours = list(shapes), list(shapes_of(model))
    mapped = dict(zip(_without_counters(theirs), _without_counters(ours), strict=True))
    counters = [[key for key in keys if is_counter(key)] for keys in (theirs, ours)]
    if len(counters[0]) == len(counters[1]):
        mapped |= dict(zip(*counters, strict=True))
    return {key: mapped[key] for key in theirs if key in mapped}


def _without_counters(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if not is_counter(key)]
