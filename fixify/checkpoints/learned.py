"""Read and write ordinary checkpoints: networks with a learned classifier.

`read_original` finds out which architecture a checkpoint is of and puts its tensors under that architecture's names.
`save_ordinary` writes what fixify trains: a `.safetensors` file of the network's state dict. Its metadata names the
architecture, the classes and the preprocessing with the keys of timm's config.json (`architecture`, `num_classes`,
`model_args`, `pretrained_cfg`, `label_names`). fixify reads them back; other programs see a plain safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixify._files import refuse_existing
from fixify._values import counted
from fixify.checkpoints.reference_code import ReferenceCodeHead
from fixify.checkpoints.remarks import choose_labels, remarks_on
from fixify.checkpoints.resolve import open_source
from fixify.checkpoints.slim import write_safetensors
from fixify.checkpoints.source import Source, refuse_integers
from fixify.errors import (
    AmbiguousArchitectureError,
    ArchitectureError,
    FixifyError,
    NoClassifierError,
    SourceError,
)
from fixify.models.architectures import Architecture, Preprocessing, build, parse_architecture, preprocessing
from fixify.models.build import is_counter, load_weights
from fixify.models.classifiers import (
    ClassifierSite,
    find_classifiers,
    find_heads,
    is_projection,
    refuse_projection,
    tower_tags,
)
from fixify.models.identify import HAND_MADE_HEAD, Candidate, explain, fit, identify, refuse_headless, what_to_type
from fixify.models.openmmlab import patches_first
from fixify.models.projection import build_with
from fixify.models.signature import shapes_of
from fixify.savings import under
from fixify.surgery import HeadRecord, apply_heads_

SUFFIX = ".safetensors"
REFERENCE_CODE = "of the paper's published code"


@dataclass(frozen=True)
class Original:
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
        projection: The layer whose output goes to the classifier, if that was put behind it; else None.
    """

    source: Source
    architecture: Architecture
    num_classes: int
    tensors: dict[str, torch.Tensor]
    sites: tuple[ClassifierSite, ...]
    preprocessing: Preprocessing
    labels: list[str] | None
    notes: tuple[str, ...]
    reference_code_heads: Mapping[str, ReferenceCodeHead] = field(default_factory=dict)
    projection: str | None = None

    def build(self, *, meta: bool = False) -> nn.Module:
        """Build the model with its learned classifier, without values."""
        model = build_with(
            self.architecture,
            self.num_classes,
            projection=self.projection,
            width=self.sites[0].num_features,
            meta=meta,
            blank=not meta,
        )
        for site in self.sites:
            if not site.has_bias:  # a classifier that was put in the place of one with a bias
                model.get_submodule(site.path).register_parameter("bias", None)
        return model

    @property
    def learned(self) -> dict[str, torch.Tensor]:
        """`tensors` as if the classifier were learned, for counting bytes; such weights are on the meta device."""
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

    def model(self) -> nn.Module:
        """Build the model and load its weights (float32, eval mode).

        Raises:
            SourceError: the tensors do not fit, which is rare because `read_original` compares all shapes; or a head of
                the reference code cannot be rebuilt.
            HeadSpecError: see `ReferenceCodeHead.spec`.
        """
        model = self.build()
        heads = [self.reference_code_record(site) for site in self.sites if site.path in self.reference_code_heads]
        apply_heads_(model, heads)
        try:
            load_weights(model, self.tensors)
        except RuntimeError as error:
            raise SourceError(f"{self.source.name} does not fit {self.architecture.ref}: {error}") from error
        return model.eval()


def read_original(ref: str | Path, *, arch: str | None = None, ema: bool = False, meta: bool = False) -> Original:
    """Read a checkpoint file or a model name, and determine its architecture.

    The architecture is `arch` if given, else the one that the file names, else the one that its names and shapes fit.

    Args:
        ref: A file, a folder, or a model name.
        arch: The architecture, if the caller knows it.
        ema: Read the moving average of the weights.
        meta: Read only names, shapes and dtypes; the tensors are on the meta device.

    Raises:
        SourceError: the checkpoint cannot be read, or holds integers where the architecture has floating point.
        ArchitectureError: no architecture fits, the given or named one does not, or it cannot pool as the file says.
        AmbiguousArchitectureError: several architectures fit; the message lists what differs.
        NoClassifierError: the model has no classifier, or is the image tower of a CLIP model.
    """
    source = open_source(ref, ema=ema, meta=meta)
    with explaining_parts(source):
        candidate, note = recognise(source, arch)
    candidate = with_stated_pooling(source, candidate)
    learned = renamed(source.learned, candidate)
    architecture, num_classes = candidate.architecture, candidate.num_classes
    skeleton = build(architecture, num_classes=num_classes, meta=True)
    refuse_projection(skeleton, architecture)
    _refuse_other_tensors(source, architecture, learned, skeleton)
    refuse_integers(source.name, learned, skeleton.state_dict())
    tensors, heads = _with_reference_code_head(source, candidate, learned)
    sites = tuple(find_classifiers(skeleton, architecture))
    if source.extras.temperature is not None:
        tensors |= _divided(tensors, sites, source.extras.temperature)
    labels = choose_labels(source.facts, num_classes)
    notes = [note] if note else []
    if labels is None and source.facts.labels is not None:
        names = counted(len(source.facts.labels), "class name")
        classes = counted(num_classes, "class", "classes")
        notes.append(f"The checkpoint has {names} for {classes}; the names are not used.")
    return Original(
        source=source,
        architecture=architecture,
        num_classes=num_classes,
        tensors=tensors,
        sites=sites,
        preprocessing=preprocessing(architecture, image_statistics(source)),
        labels=labels,
        notes=(*notes, *remarks_on(source, num_classes)),
        reference_code_heads=heads,
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


def save_ordinary(
    model: nn.Module,
    path: Path | str,
    architecture: Architecture,
    *,
    num_classes: int,
    preprocessing: Preprocessing,
    labels: list[str] | None = None,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a network as an ordinary checkpoint; the file is replaced in one step.

    Args:
        model: The network.
        path: The file to write.
        architecture: The network's architecture.
        num_classes: Number of classes of its classifier.
        preprocessing: timm's names; see `fixify.models.architectures.preprocessing`.
        labels: Class names in class order.
        training: How it was trained; JSON-safe.
        force: Replace an existing file.

    Raises:
        OutputExistsError: the file exists and `force` is not given.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    found = {
        "model_args": dict(architecture.kwargs),
        "pretrained_cfg": dict(preprocessing),
        "label_names": labels,
        "training": None if training is None else dict(training),
    }
    metadata = {
        "format": "pt",  # required by Hugging Face's loaders
        "architecture": architecture.ref,
        "num_classes": str(num_classes),
        **{key: json.dumps(value, allow_nan=False) for key, value in found.items() if value is not None},
    }
    write_safetensors(path, model.state_dict(), metadata)
    return path


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
    architecture, width = candidate.architecture, candidate.num_classes
    tags = tower_tags(architecture, width)
    if not tags:
        return
    model = build(architecture, num_classes=width, meta=True)
    if is_projection(model):
        return
    path = find_heads(model, architecture)[0].path
    bias = renamed(source.learned, candidate).get(f"{path}.bias")
    if bias is None or bias.is_meta or bool(bias.any()):
        return
    raise NoClassifierError(
        f"{source.name} is {architecture.spelled} with {width} outputs and zeros as bias: {path} is a CLIP model's "
        f"projection to an embedding, as in timm's {', '.join(f'{architecture.name}.{tag}' for tag in tags)}.",
        hint=f"Name the weights, and put text embeddings behind them: --arch {architecture.ref}.{tags[0]} --classifier "
        f"FILE (a matrix of C x {width})",
    )


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
        refuse_headless(architecture, source.shapes)
        raise _does_not_fit(source, architecture, named_by_file=arch is None)
    return candidate, " ".join(candidate.notes) or None


def _does_not_fit(source: Source, architecture: Architecture, *, named_by_file: bool) -> ArchitectureError:
    """Make the error for a checkpoint that is not of the named architecture: what differs, and what fits instead."""
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


def with_stated_pooling(source: Source, candidate: Candidate) -> Candidate:
    """Return the candidate with the pooling that the file says it was trained with.

    Raises:
        ArchitectureError: with that pooling, the architecture has other tensors than the file.
    """
    said, architecture = source.facts.global_pool, candidate.architecture
    if said is None or architecture.library != "timm" or "global_pool" in architecture.kwargs:
        return candidate
    own = build(architecture, num_classes=candidate.num_classes, meta=True)
    if _pooling_of(own) in (None, said) or (said == "token" and "cls_token" not in own.state_dict()):
        return candidate
    changed = replace(architecture, kwargs={**architecture.kwargs, "global_pool": said})
    try:
        other = shapes_of(build(changed, num_classes=candidate.num_classes, meta=True))
    except ArchitectureError:
        other = {}
    if other != shapes_of(own):
        raise ArchitectureError(
            f"{source.name} says that it was trained with global_pool={said}; {architecture.ref} pools with "
            f"{_pooling_of(own)}, and has other tensors with global_pool={said}.",
            hint=f"If it pools with {_pooling_of(own)}: --arch {architecture.ref},global_pool={_pooling_of(own)}",
        )
    return replace(candidate, architecture=changed)


def _pooling_of(model: nn.Module) -> str | None:
    """Return timm's name of a model's pooling, or None."""
    for module in model.modules():
        pooling = getattr(module, "global_pool", None)
        kind = pooling if isinstance(pooling, str) else getattr(pooling, "pool_type", None)
        if isinstance(kind, str) and kind:
            return kind
    return None


def _divided(
    tensors: Mapping[str, torch.Tensor], sites: Sequence[ClassifierSite], temperature: float
) -> dict[str, torch.Tensor]:
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


def renamed(tensors: Mapping[str, torch.Tensor], candidate: Candidate) -> dict[str, torch.Tensor]:
    """Put tensors under the names, and into the shapes, that an architecture gives them."""
    if candidate.key_map is None:
        return dict(tensors)
    renamed = {candidate.key_map[key]: tensor for key, tensor in tensors.items() if key in candidate.key_map}
    for key, tensor in renamed.items():
        if candidate.shapes.get(key, tensor.shape) != tensor.shape:
            renamed[key] = tensor.reshape(candidate.shapes[key])
        if key in candidate.unfolded:
            renamed[key] = patches_first(renamed[key])
    return renamed


def _with_reference_code_head(
    source: Source, candidate: Candidate, learned: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, ReferenceCodeHead]]:
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
    source: Source, architecture: Architecture, tensors: dict[str, torch.Tensor], skeleton: nn.Module
) -> None:
    """Check that every tensor of the architecture is present with its shape, and that there are no others."""
    expected = {key: tensor.shape for key, tensor in skeleton.state_dict().items()}
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
