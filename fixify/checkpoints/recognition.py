"""Find out which architecture a checkpoint is of, and put its tensors under that architecture's names.

Where only the header of a file was read and the index that ships with fixify knows the network, neither torch nor timm
is imported; the functions below import them when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fixify._values import counted
from fixify.catalogue.matches import Candidate, what_to_type
from fixify.catalogue.signature import is_counter
from fixify.catalogue.skeleton import ClassifierSite, Skeleton
from fixify.checkpoints.outline import AnyTensor
from fixify.checkpoints.reference_code import ReferenceCodeHead
from fixify.checkpoints.remarks import choose_labels, remarks_on
from fixify.checkpoints.resolve import open_source
from fixify.checkpoints.source import Source, refuse_integers
from fixify.description import Architecture, HeadRecord, Preprocessing
from fixify.errors import (
    AmbiguousArchitectureError,
    ArchitectureError,
    FixifyError,
    NoClassifierError,
    SourceError,
)
from fixify.lookup import fit, identify, parse_architecture, preprocessing_of, skeleton_of
from fixify.savings import under

REFERENCE_CODE = "of the paper's published code"


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A checkpoint whose architecture is known.

    Its classifier is learned, or is a fixed one of the paper's reference code.

    Attributes:
        source: The checkpoint as it was opened.
        architecture: Its architecture.
        num_classes: Number of classes of its classifier.
        tensors: Its state dict under the architecture's own names; values and dtypes as stored.
        sites: Its classifier layers.
        preprocessing: timm's names and plain values.
        labels: Class names, or None.
        notes: How it was recognised, for the user.
        reference_code_heads: Path -> head, for classifier layers that are fixed ones of the paper's reference code. For
            these, `tensors` holds the scale and the bias, and no weight.
    """

    source: Source
    architecture: Architecture
    num_classes: int
    tensors: dict[str, AnyTensor]
    sites: tuple[ClassifierSite, ...]
    preprocessing: Preprocessing
    labels: list[str] | None
    notes: tuple[str, ...]
    reference_code_heads: Mapping[str, ReferenceCodeHead] = field(default_factory=dict)

    @property
    def learned(self) -> dict[str, AnyTensor]:
        """`tensors` as if the classifier were learned, for counting bytes; such weights have no values."""
        scales = {f"{path}.scale" for path in self.reference_code_heads}
        stored = {key: tensor for key, tensor in self.tensors.items() if key not in scales}
        return stored | {f"{path}.weight": head.placeholder() for path, head in self.reference_code_heads.items()}

    def reference_code_record(self, site: ClassifierSite, *, fixed_scale: bool = False) -> HeadRecord:
        """Describe a head of the reference code that is kept, as a slim checkpoint does.

        Raises:
            SourceError, HeadSpecError: the head cannot be rebuilt; see `ReferenceCodeHead.spec`.
        """
        spec = self.reference_code_heads[site.path].spec(site.num_features, fixed_scale=fixed_scale)
        return HeadRecord(site.path, site.layer_type, site.channel_dim, spec)

    @property
    def reference_code_note(self) -> str | None:
        """What its head of the reference code is, or why that cannot be rebuilt; None without such a head."""
        for site in self.sites:
            if site.path in self.reference_code_heads:
                try:
                    self.reference_code_record(site)
                except FixifyError as error:
                    return error.message
                return f"{site.path} is fixed already, a Hadamard head {REFERENCE_CODE}: scale and bias, no weights."
        return None


@dataclass(frozen=True, kw_only=True)
class Outlined(Recognised):
    """A checkpoint whose architecture is known, and the size of that.

    Attributes:
        num_parameters: Elements of all parameters of the network, a shared parameter once.
    """

    num_parameters: int

    @property
    def recognised(self) -> dict[str, Any]:
        """The values of `Recognised`, by name."""
        return {each.name: getattr(self, each.name) for each in fields(Recognised)}


def read_outlined(ref: str | Path, *, arch: str | None = None, ema: bool = False, meta: bool = True) -> Outlined:
    """Read a checkpoint file or a model name, and determine its architecture.

    Args:
        ref: A file, a folder, or a model name.
        arch: The architecture, if the caller knows it; see `fixify.checkpoints.learned.read_original`.
        ema: Read the moving average of the weights.
        meta: Read only names, shapes and dtypes; see `open_source`.

    Raises:
        FixifyError: see `fixify.checkpoints.learned.read_original`.
    """
    source = open_source(ref, ema=ema, meta=meta)
    with explaining_parts(source):
        candidate, note = recognise(source, arch)
    candidate = with_stated_pooling(source, candidate)
    learned = renamed(source.learned, candidate)
    architecture, num_classes = candidate.architecture, candidate.num_classes
    skeleton = skeleton_of(candidate, source.shapes)
    _refuse_other_tensors(source, architecture, learned, skeleton)
    refuse_integers(source.name, learned, skeleton.floats)
    tensors, heads = _with_reference_code_head(source, candidate, learned)
    if source.extras.temperature is not None:
        tensors |= _divided(tensors, skeleton.sites, source.extras.temperature)
    labels = choose_labels(source.facts, num_classes)
    notes = [note] if note else []
    if labels is None and source.facts.labels is not None:
        names = counted(len(source.facts.labels), "class name")
        classes = counted(num_classes, "class", "classes")
        notes.append(f"The checkpoint has {names} for {classes}; the names are not used.")
    return Outlined(
        source=source,
        architecture=architecture,
        num_classes=num_classes,
        tensors=tensors,
        sites=skeleton.sites,
        preprocessing=preprocessing_of(candidate, image_statistics(source)),
        labels=labels,
        notes=(*notes, *remarks_on(source, num_classes)),
        reference_code_heads=heads,
        num_parameters=skeleton.num_parameters,
    )


@contextmanager
def explaining_parts(source: Source) -> Iterator[None]:
    """Name the two parts of a file in the error of a block, if no architecture is what they make together.

    Raises:
        ArchitectureError, NoClassifierError: the block raised it.
    """
    try:
        yield
    except (ArchitectureError, NoClassifierError) as error:
        if source.joined is None or isinstance(error, AmbiguousArchitectureError):
            raise
        network, head = source.joined
        raise type(error)(
            f"{source.name} holds two state dicts, {network} and {head}, and together they are no network that fixify "
            f"knows. {error.message}",
            hint="Save one state dict, with the classifier under the name that the network gives it (fc, head, ...): "
            f"torch.save({{**c[{network!r}], **{{'fc.' + k: v for k, v in c[{head!r}].items()}}}}, 'model.pth')",
        ) from error


def stated(source: Source) -> Candidate | None:
    """Return the architecture that a source names, in itself or in a file beside it, if its tensors fit; else None."""
    facts = source.facts
    if facts.architecture is None:
        return None
    try:
        return fit(parse_architecture(facts.architecture, **facts.architecture_kwargs), source.shapes)
    except ArchitectureError:  # the arguments are unsuitable, or the name leaves something open
        return None


def recognise(source: Source, arch: str | None) -> tuple[Candidate, str | None]:
    """Return the architecture that a source is of, and a note on how it was found unless it was named.

    Raises:
        SourceError, ArchitectureError, AmbiguousArchitectureError, NoClassifierError: See `read_original`.
    """
    candidate, note = _recognise(source, arch)
    _refuse_unnamed_tower(source, candidate)
    return candidate, note


def _refuse_unnamed_tower(source: Source, candidate: Candidate) -> None:
    """Refuse the tower of a CLIP model that has the names and shapes of a classifier, unless its weights are named.

    Raises:
        NoClassifierError: the last layer has the width of such weights, and zeros for a bias, which timm adds to them.
    """
    if all(tensor.is_meta for tensor in source.tensors.values()):
        return  # the values of the bias decide
    from fixify.models.classifiers import unnamed_tower

    architecture, width = candidate.architecture, candidate.num_classes
    tower = unnamed_tower(architecture, width)
    if tower is None:
        return
    path, tags = tower
    bias = renamed(source.learned, candidate).get(f"{path}.bias")
    if bias is None or bias.is_meta or bool(bias.any()):
        return
    raise NoClassifierError(
        f"{source.name} is {architecture.spelled} with {width} outputs and zeros as bias: {path} is a CLIP model's "
        f"projection to an embedding, as in timm's {', '.join(f'{architecture.name}.{tag}' for tag in tags)}.",
        hint=f"Name the weights, and put text embeddings behind them: --arch {architecture.ref}.{tags[0]} --classifier "
        f"FILE (a matrix of C x {width})",
    )


def with_stated_pooling(source: Source, candidate: Candidate) -> Candidate:
    """Return the candidate with the pooling that the file says it was trained with.

    Raises:
        ArchitectureError: with that pooling, the architecture has other tensors than the file.
    """
    said, architecture = source.facts.global_pool, candidate.architecture
    if said is None or architecture.library != "timm" or "global_pool" in architecture.kwargs:
        return candidate
    from fixify.models.pooling import with_pooling

    changed = with_pooling(architecture, candidate.num_classes, said, source.name)
    return candidate if changed is architecture else replace(candidate, architecture=changed, network=None)


def _recognise(source: Source, arch: str | None) -> tuple[Candidate, str | None]:
    name = arch or source.facts.architecture
    if name is None:
        return _identify(source)
    architecture = parse_architecture(name)
    if arch is None or _same_network(architecture, source.facts.architecture):
        # Arguments written in the name take precedence over those in the file.
        architecture = parse_architecture(name, **{**source.facts.architecture_kwargs, **architecture.kwargs})
    candidate = fit(architecture, source.shapes)
    if candidate is None:
        from fixify.models.identify import refuse_headless

        refuse_headless(architecture, source.shapes)
        raise _does_not_fit(source, architecture, named_by_file=arch is None)
    return candidate, " ".join(candidate.notes) or None


def _does_not_fit(source: Source, architecture: Architecture, *, named_by_file: bool) -> ArchitectureError:
    """Make the error for a checkpoint that is not of the named architecture: what differs, and what fits instead."""
    from fixify.models.identify import HAND_MADE_HEAD, explain

    try:
        fits = identify(source.shapes).candidates[0].architecture.spelled
    except (ArchitectureError, NoClassifierError):
        fits = None
    what = explain(architecture, source.shapes)
    if fits is not None:
        hint = f"Its tensors fit {fits}. If that is the network: --arch {fits}"
    elif "hand-made head" in what:
        hint = HAND_MADE_HEAD
    else:
        hint = (
            "No other architecture fits either. If the network was changed, build it in Python, load the file, and "
            "replace its classifier there: fixify.fix_classifier_(model)"
        )
    said = " The file, or its config.json, names that architecture." if named_by_file else ""
    return ArchitectureError(f"{source.name} is not a checkpoint of {architecture.spelled}.{said}\n{what}", hint=hint)


def _identify(source: Source) -> tuple[Candidate, str]:
    found = identify(source.shapes)
    if len(found.candidates) > 1:
        notes = "".join(f" {note}" for note in found.candidates[0].notes)
        raise AmbiguousArchitectureError(
            f"{source.name} fits several architectures.{notes}\n{found.describe()}",
            hint=what_to_type(found.choices),
            choices=found.choices,
        )
    candidate = found.candidates[0]
    how = "its shapes and the structure of its names" if found.by == "shapes" else "key names and shapes"
    if found.narrowed_by is not None:
        how += f" and {found.narrowed_by}"
    read = "".join(f" {note}" for note in candidate.notes)
    return candidate, f"Recognised as {candidate.architecture.spelled} from {how}.{read}"


def _divided(
    tensors: Mapping[str, AnyTensor], sites: Sequence[ClassifierSite], temperature: float
) -> dict[str, AnyTensor]:
    """Divide the logits by a temperature: return the weights, biases and scales of the classifiers, divided by it."""
    keys = [f"{site.path}.{name}" for site in sites for name in ("weight", "bias", "scale")]
    return {
        key: (tensors[key].double() / temperature).to(tensors[key].dtype)
        for key in keys
        if key in tensors and not tensors[key].is_meta
    }


def image_statistics(source: Source) -> dict[str, Any] | None:
    """Return the preprocessing that a file states, with the mean and std of an input normalisation of its own."""
    extras, stated_cfg = source.extras, source.facts.pretrained_cfg
    if extras.mean is None or extras.std is None:
        return stated_cfg
    return {**(stated_cfg or {}), "mean": list(extras.mean), "std": list(extras.std)}


def _same_network(architecture: Architecture, named: str | None) -> bool:
    if named is None:
        return False
    other = parse_architecture(named)
    return (architecture.library, architecture.name) == (other.library, other.name)


def renamed(tensors: Mapping[str, AnyTensor], candidate: Candidate) -> dict[str, AnyTensor]:
    """Put tensors under the names, and into the shapes, that an architecture gives them."""
    if candidate.key_map is None:
        return dict(tensors)
    renamed = {candidate.key_map[key]: tensor for key, tensor in tensors.items() if key in candidate.key_map}
    for key, tensor in renamed.items():
        if candidate.shapes.get(key, tensor.shape) != tensor.shape:
            renamed[key] = tensor.reshape(candidate.shapes[key])
        if key in candidate.unfolded and not renamed[key].is_meta:
            from fixify.models.openmmlab import patches_first

            renamed[key] = patches_first(renamed[key])
    return renamed


def _with_reference_code_head(
    source: Source, candidate: Candidate, learned: dict[str, AnyTensor]
) -> tuple[dict[str, AnyTensor], dict[str, ReferenceCodeHead]]:
    """Replace the placeholder weights of a head of the reference code by its stored scale; also return that head."""
    head = source.reference_code_head
    if head is None:
        return learned, {}
    key = head.weight_key if candidate.key_map is None else candidate.key_map[head.weight_key]
    path = key.rpartition(".")[0]
    stored = under(source.tensors, head.path)
    tensors = {name: tensor for name, tensor in learned.items() if name != key}
    if head.scale_name == "scale":
        tensors[f"{path}.scale"] = stored[f"{head.path}.scale"]
    return tensors, {path: head}


def _refuse_other_tensors(
    source: Source, architecture: Architecture, tensors: Mapping[str, AnyTensor], skeleton: Skeleton
) -> None:
    """Check that every tensor of the architecture is present with its shape, and that there are no others."""
    expected = skeleton.shapes
    problems = [f"lacks {key}" for key in expected if key not in tensors and not is_counter(key)]
    problems += [f"has {key}, which is unknown" for key in tensors if key not in expected]
    problems += [
        f"has {key} of shape {list(tensor.shape)}, not {list(expected[key])}"
        for key, tensor in tensors.items()
        if key in expected and tensor.shape != expected[key]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SourceError(f"{source.name} is not a complete {architecture.ref}: it {problems[0]}{more}.")
