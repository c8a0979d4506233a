"""Read a checkpoint as an encoder, and put a classifier that came without a network onto it.

An encoder is a network whose output is features: one without a classifier, one whose classifier is taken off, or the
image tower of a CLIP model with its projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from fixify._values import counted
from fixify.catalogue.signature import is_counter
from fixify.checkpoints.learned import Original
from fixify.checkpoints.matrix import Matrix
from fixify.checkpoints.recognition import (
    explaining_parts,
    image_statistics,
    recognise,
    renamed,
    with_stated_pooling,
)
from fixify.checkpoints.remarks import remarks_on
from fixify.checkpoints.resolve import open_source
from fixify.checkpoints.source import Source, refuse_integers
from fixify.errors import ArchitectureError, SourceError
from fixify.models.architectures import Architecture, Preprocessing, build, parse_architecture, preprocessing
from fixify.models.classifiers import ClassifierSite, find_heads, is_auxiliary, is_projection
from fixify.models.projection import build_with, output_width

_SOME_CLASSES = 2


@dataclass(frozen=True)
class Encoder:
    """A checkpoint whose classifier, if it has one, is put aside.

    Attributes:
        source: The checkpoint as it was opened.
        architecture: Its architecture.
        tensors: Its state dict under the architecture's names, with its own last layer if it has one.
        preprocessing: timm's names and plain values.
        width: Width of the features without a classifier.
        projection: The last linear layer of a CLIP model's image tower, or None.
        notes: How it was recognised, for the user.
    """

    source: Source
    architecture: Architecture
    tensors: dict[str, Tensor]
    preprocessing: Preprocessing
    width: int
    projection: ClassifierSite | None
    notes: tuple[str, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that a classifier may have, the one of the embedding first."""
        own = () if self.projection is None else (self.projection.num_classes,)
        return tuple(dict.fromkeys((*own, self.width)))

    @property
    def widths_in_words(self) -> str:
        """What makes features of which width."""
        without = f"{self.width} values without a classifier"
        if self.projection is None:
            return without
        return f"{self.projection.num_classes} values with its projection ({self.projection.path}), and {without}"


def read_encoder(ref: str | Path, *, arch: str | None = None, ema: bool = False, meta: bool = False) -> Encoder:
    """Read a checkpoint as an encoder. How wide its features are is found by a forward pass without values.

    Args:
        ref: A file, a folder, or a model name.
        arch: The architecture, if the caller knows it. A checkpoint without a classifier does not show it by itself.
        ema: Read the moving average of the weights.
        meta: Read only names, shapes and dtypes.

    Raises:
        SourceError, ArchitectureError, AmbiguousArchitectureError: See `fixify.checkpoints.learned.read_original`.
        NoClassifierError: The file has no classifier and does not say what architecture it is of.
    """
    source = open_source(ref, ema=ema, meta=meta)
    if source.reference_code_head is not None:
        raise SourceError(f"{source.name} has a fixed classifier of the paper's published code; it cannot be replaced.")
    source, arch, left_out = _without_auxiliary(source, arch)
    found = _without_classifier(source, arch)
    if found is None:
        with explaining_parts(source):
            candidate, note = recognise(source, arch)
        candidate = with_stated_pooling(source, candidate)
        tensors = renamed(source.learned, candidate)
        architecture = candidate.architecture
        own = build(architecture, num_classes=candidate.num_classes, meta=True)
    else:
        (architecture, own), tensors, note = found, dict(source.tensors), None
    _refuse_incomplete(source, architecture, tensors, own)
    images = preprocessing(architecture, image_statistics(source))
    projection = find_heads(own, architecture)[0] if is_projection(own) else None
    if projection is not None and output_width(own, images["input_size"]) not in (None, projection.num_classes):
        projection = None
    return Encoder(
        source=source,
        architecture=architecture,
        tensors=tensors,
        preprocessing=images,
        width=_width(architecture, images),
        projection=projection,
        notes=(*([note] if note else []), *left_out, *remarks_on(source, 0)),
    )


def with_classifier(encoder: Encoder, matrix: Matrix) -> Original:
    """Put a classifier onto an encoder: behind the projection of a CLIP model, or in the place of the classifier.

    Raises:
        SourceError: The encoder does not make features of the classifier's width, or has several classifiers.
    """
    n, c = matrix.num_features, matrix.num_classes
    architecture, name = encoder.architecture, encoder.source.name
    site: ClassifierSite | None = None
    projection: str | None = None
    if encoder.projection is not None and n == encoder.projection.num_classes:
        projection = encoder.projection.path
        (site,) = find_heads(build_with(architecture, c, projection=projection, width=n, meta=True))
    elif n == encoder.width:
        sites = find_heads(build(architecture, num_classes=c, meta=True), architecture)
        if len(sites) > 1:
            raise SourceError(
                f"{architecture.ref} has {len(sites)} classifiers: {', '.join(site.path for site in sites)}.",
                hint="A classifier can be put onto an encoder that has one.",
            )
        site = sites[0] if sites[0].num_features == n else None
    if site is None:
        raise SourceError(
            f"{matrix.name} is a classifier of {counted(n, 'feature')}; {name} ({architecture.ref}) makes "
            f"{encoder.widths_in_words}.",
            hint="Give the text embeddings of the model that the encoder belongs to.",
        )
    kept = _kept(encoder, site, projection)
    weight = matrix.weight if site.channel_dim == -1 else matrix.weight[:, :, None, None]
    learned = {f"{site.path}.weight": weight}
    if matrix.bias is not None and projection is None:
        learned[f"{site.path}.bias"] = matrix.bias
    elif matrix.bias is not None:
        raise SourceError(
            f"{matrix.name} has a bias, and a classifier behind a projection has none.",
            hint="Name the matrix alone to leave the bias out: --key NAME",
        )
    has_bias = f"{site.path}.bias" in learned
    site = replace(site, has_bias=has_bias, num_parameters=c * n + (c if has_bias else 0))
    where = f"behind its projection {projection}" if projection else f"at {site.path}"
    return Original(
        source=encoder.source,
        architecture=architecture,
        num_classes=c,
        tensors={**kept, **learned},
        sites=(site,),
        preprocessing=encoder.preprocessing,
        labels=matrix.labels,
        notes=(*encoder.notes, *matrix.notes, f"Put {matrix.name} onto {architecture.ref}, {where}."),
        projection=projection,
    )


def _kept(encoder: Encoder, site: ClassifierSite, projection: str | None) -> dict[str, Tensor]:
    """Return the tensors of the encoder that the model with the new classifier has.

    Raises:
        SourceError: The model needs others.
    """
    c, n = site.num_classes, site.num_features
    model = build_with(encoder.architecture, c, projection=projection, width=n, meta=True)
    wanted = {key for key in model.state_dict() if not key.startswith(f"{site.path}.")}
    missing = sorted(key for key in wanted if key not in encoder.tensors and not is_counter(key))
    if missing:
        raise SourceError(
            f"{encoder.source.name} lacks {missing[0]}, which {encoder.architecture.ref} with a classifier has.",
            hint="Give a checkpoint of the whole network.",
        )
    return {key: tensor for key, tensor in encoder.tensors.items() if key in wanted}


def _without_auxiliary(source: Source, arch: str | None) -> tuple[Source, str | None, tuple[str, ...]]:
    """Leave out the auxiliary classifiers of torchvision, which run in training only; also return the note on that."""
    groups = sorted({key.partition(".")[0] for key in source.tensors if is_auxiliary(key)})
    if not groups:
        return source, arch, ()
    facts, without = source.facts, {"aux_logits": False}
    if arch is not None:
        named = parse_architecture(arch)
        arch = replace(named, kwargs={**named.kwargs, **without}).spelled
    elif facts.architecture is not None:
        facts = replace(facts, architecture_kwargs={**facts.architecture_kwargs, **without})
    tensors = {key: tensor for key, tensor in source.tensors.items() if not is_auxiliary(key)}
    note = f"Left out {' and '.join(groups)}: auxiliary classifiers, which run in training only."
    return replace(source, tensors=tensors, facts=facts), arch, (note,)


def _without_classifier(source: Source, arch: str | None) -> tuple[Architecture, nn.Module] | None:
    """Return the architecture without a classifier whose tensors a source has; None if it is another or not known."""
    name = arch or source.facts.architecture
    if name is None:
        return None
    architecture = parse_architecture(name, **(source.facts.architecture_kwargs if arch is None else {}))
    try:
        model = _headless(architecture)
    except (ArchitectureError, TypeError):
        return None
    return (architecture, model) if set(source.shapes) == set(model.state_dict()) else None


def _headless(architecture: Architecture) -> nn.Module:
    """Build a network without its classifier, on the meta device. torchvision's take no `num_classes=0`."""
    if architecture.library != "torchvision":
        return build(architecture, num_classes=0, meta=True)
    model = build(architecture, num_classes=_SOME_CLASSES, meta=True)
    for site in find_heads(model, architecture):
        parent, _, name = site.path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return model


def _width(architecture: Architecture, images: Preprocessing) -> int:
    """Return the width of the features: of the output with no classes, else of the classifier's input."""
    if architecture.library != "torchvision":
        model = build(architecture, num_classes=0, meta=True)
        found = output_width(model, images["input_size"])
        if found is not None:
            return found
    return find_heads(build(architecture, num_classes=_SOME_CLASSES, meta=True), architecture)[0].num_features


def _refuse_incomplete(
    source: Source, architecture: Architecture, tensors: Mapping[str, Tensor], own: nn.Module
) -> None:
    expected = own.state_dict()
    wrong = [
        key
        for key, tensor in expected.items()
        if not is_counter(key) and (key not in tensors or tensors[key].shape != tensor.shape)
    ]
    if wrong:
        raise SourceError(
            f"{source.name} is not a complete {architecture.ref}: {wrong[0]} is missing or has another shape."
        )
    refuse_integers(source.name, tensors, {key for key, tensor in expected.items() if tensor.is_floating_point()})
