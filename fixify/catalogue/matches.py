"""Find the entries of an index that have the names and shapes of a state dict, and say what sets them apart.

Importing this module needs neither torch nor timm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fixify.catalogue.names import adapted_preprocessing, known_preprocessing
from fixify.catalogue.shipped import Entry, Network, is_current, load_index
from fixify.catalogue.signature import Shape, StateShapes, Trait
from fixify.description import Architecture, Preprocessing
from fixify.errors import AmbiguousArchitectureError

# How images are prepared for an architecture.
Images = Callable[[Architecture], Preprocessing]

# The class names of the modules: a long trait, and mostly a consequence of another trait that says it better.
_SHOWN_LAST = {".class"}
_MOST_SHOWN = 5
# Architectures that torchvision builds differently when it loads its own weights: it drops the auxiliary classifiers
# and normalises the input once more (`transform_input`).
_CHOOSING = {"torchvision/googlenet", "torchvision/inception_v3"}


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
        unfolded: See `fixify.models.readings.Reading`.
        network: What the shipped index knows of it; None if it has to be built to be counted.
    """

    architecture: Architecture
    num_classes: int
    key_map: Mapping[str, str] | None = None
    aliases: tuple[str, ...] = ()
    differences: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    unfolded: frozenset[str] = frozenset()
    network: Network | None = None


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
    def of(cls, library: str, traits: Mapping[str, Trait], preprocessing: Mapping[str, object]) -> Behaviour:
        """Combine the traits of an architecture with its preprocessing."""
        images = {key: _readable(value) for key, value in preprocessing.items()}
        return cls(library, dict(traits) | {key: (text, text) for key, text in images.items()})


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


@dataclass(frozen=True)
class Match:
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
        """The architecture with these choices."""
        arch = self.entry.architecture
        return replace(arch, kwargs={**arch.kwargs, **self.extra})

    def behaviour(self, images: Images) -> Behaviour:
        """Return what the architecture computes; `images` looks up its preprocessing."""
        arch = self.architecture
        return Behaviour.of(arch.library, self.entry.traits, images(arch))


def matches_of(state: StateShapes, entries: Iterable[Entry]) -> list[Match]:
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
            found.append(Match(entry, choices))
    return found


def plainest(matches: list[Match]) -> list[Match]:
    """Keep the matches with the fewest arguments: vit_base_patch16_384, not vit_base_patch16_224,img_size=384."""
    fewest = min((len(match.extra) for match in matches), default=0)
    return [match for match in matches if len(match.extra) == fewest]


def candidates_of(matches: Sequence[tuple[Match, Mapping[str, str] | None]], images: Images) -> tuple[Candidate, ...]:
    """Merge the matches that are the same network, and say what sets the others apart.

    Args:
        matches: Matches with the map of their names.
        images: Looks up the preprocessing of an architecture.
    """
    behaviours = [match.behaviour(images) for match, _ in matches]
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


def refuse_several(matches: Sequence[Match], images: Images, notes: Sequence[str] = ()) -> None:
    """Refuse several matches of one architecture.

    Raises:
        AmbiguousArchitectureError: there are several; it has what sets them apart.
    """
    if len(matches) > 1:
        apart = set_apart([match.behaviour(images) for match in matches])
        choices = {match.architecture.spelled: in_words(facts) for match, facts in zip(matches, apart, strict=True)}
        raise AmbiguousArchitectureError(
            " ".join([f"The checkpoint does not show which of these it is: {' or '.join(choices)}.", *notes]),
            hint=what_to_type(choices),
            choices=choices,
        )


def variants(arch: Architecture) -> list[Architecture]:
    """Return the ways to build an architecture that its name leaves open: for most, only itself.

    torchvision's GoogLeNet and Inception v3 have several: a checkpoint has auxiliary classifiers or not, and needs
    `transform_input` if its training started from torchvision's weights.

    >>> googlenet = Architecture("torchvision", "googlenet", {"aux_logits": False})
    >>> [variant.spelled for variant in variants(googlenet)]
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


def identify_by_keys(shapes: Mapping[str, Shape]) -> Identification | None:
    """Find the architectures of which a state dict has the names and the shapes, with the shipped index alone.

    Args:
        shapes: Name -> shape of each tensor.

    Returns:
        None if there is no such architecture, it needs arguments, or the index is not that of the installed libraries:
        `fixify.models.identify.identify` then looks further, and builds what it has to.
    """
    if not is_current():
        return None
    found = plainest(matches_of(StateShapes(shapes), load_index().entries))
    if not found or not all(map(_is_known, found)):
        return None
    networks = {match.architecture.spelled: _network(match, shapes) for match in found}
    made = candidates_of([(match, None) for match in found], _known_images)
    return Identification(tuple(replace(each, network=networks[each.architecture.spelled]) for each in made), "keys")


def fit_by_keys(arch: Architecture, shapes: Mapping[str, Shape]) -> Candidate | None:
    """Fit a state dict to an architecture by its names and shapes, with the shipped index alone.

    Args:
        arch: The architecture.
        shapes: Name -> shape of each tensor.

    Returns:
        None if the index does not show that it fits; `fixify.models.identify.fit` then looks further.

    Raises:
        AmbiguousArchitectureError: it fits in several ways that no shape tells apart (`variants`).
    """
    if not is_current():
        return None
    entries = [shipped_entry(variant) for variant in variants(arch)]
    if None in entries:
        return None
    found = matches_of(StateShapes(shapes), [entry for entry in entries if entry is not None])
    if not found or not all(map(_is_known, found)):
        return None
    refuse_several(found, _known_images)
    return Candidate(found[0].architecture, found[0].choices["num_classes"], network=_network(found[0], shapes))


def shipped_entry(arch: Architecture) -> Entry | None:
    """Look an architecture up in the shipped index, by its name and arguments; None if it is not there."""
    for entry in load_index().entries:
        known = entry.architecture
        if (known.library, known.name, known.kwargs) == (arch.library, arch.name, arch.kwargs):
            return replace(entry, architecture=arch)
    return None


def _is_known(match: Match) -> bool:
    return not match.extra and known_preprocessing(match.architecture) is not None


def _known_images(arch: Architecture) -> Preprocessing:
    return adapted_preprocessing(known_preprocessing(arch) or {}, arch)


def _network(match: Match, shapes: Mapping[str, Shape]) -> Network | None:
    network = match.entry.network
    return None if network is None or network.may_be_another(match.architecture, shapes) else network


def _readable(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_readable(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
