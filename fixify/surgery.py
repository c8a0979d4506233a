"""Surgery: the classifier layers of a model are replaced, in place, by fixed ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fixify.errors import FormatError, HeadSpecError, NoClassifierError
from fixify.heads import FixedClassifier, HeadSpec, choose_kind, replacement
from fixify.models.architectures import Architecture
from fixify.models.classifiers import ClassifierSite, find_classifiers

_NO_BIAS = "There is no bias to keep: the old classifier or the new one has none."


@dataclass(frozen=True)
class HeadRecord:
    """One fixed head of a model, as a slim checkpoint describes it.

    Attributes:
        path: The layer's name in `model.named_modules()`.
        layer_type: Type of the layer that was replaced.
        channel_dim: -1 for features, 1 for feature maps (the layer was a 1x1 convolution).
        spec: From which the head is rebuilt.
    """

    path: str
    layer_type: str
    channel_dim: int
    spec: HeadSpec

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": self.path,
            "layer_type": self.layer_type,
            "channel_dim": self.channel_dim,
            "spec": self.spec.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadRecord:
        """The inverse of `to_dict`, for values from outside.

        Raises:
            FormatError: a missing or unknown key, or a value of the wrong type.
            HeadSpecError: the spec is not one.
        """
        fields = {"path": str, "layer_type": str, "channel_dim": int, "spec": Mapping}
        if set(values) != set(fields) or not all(isinstance(values[key], kind) for key, kind in fields.items()):
            raise FormatError(f"Not a head record: expected {', '.join(fields)}, got {', '.join(map(str, values))}.")
        return cls(values["path"], values["layer_type"], values["channel_dim"], HeadSpec.from_dict(values["spec"]))


@contextlib.contextmanager
def naming_head(path: str, sites: Sequence[ClassifierSite]) -> Iterator[None]:
    """Within the block, a `HeadSpecError` says which classifier layer it is about, if there are several."""
    try:
        yield
    except HeadSpecError as error:
        if len(sites) == 1:
            raise
        raise HeadSpecError(f"{path}: {error.message}", hint=error.hint) from error


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` where `model.get_submodule(path)` is."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def fix_classifier_(
    model: nn.Module,
    kind: str | HeadSpec = "hadamard",
    *,
    seed: int = 0,
    scale: float | None = None,
    match: bool = False,
    features: Mapping[str, torch.Tensor] | None = None,
    keep_bias: bool | None = None,
    arch: Architecture | None = None,
    **options: Any,
) -> nn.Module:
    """Replace the classifier of a model by a fixed one, in place. Weights of the old one are dropped.

    The codes of a `binary` head, and of a Hadamard one with `match`, are chosen by those weights, which keeps what a
    trained model knows: most of it with signs, a part with Hadamard codes. Other codes go to the classes in order, as
    in the paper.

    Every classifier layer of the model is replaced (`zoo.classifiers.find_classifiers`); the new one has the old one's
    device and floating type, and a bias if the old one had. After that `model.get_classifier()` is the fixed head, or
    contains it where it is more than a linear layer (RepVit's BatchNorm + Linear). `reset_classifier()` gives the model
    a learned classifier again. Merging BatchNorm into the classifier (`fuse()` of LeViT, RepVit and the like) is no
    longer possible: a fixed classifier has no weights to merge it into.

    All heads of a model get the same seed, so heads of the same width share one codebook: distilled models average the
    logits of their heads, and the two features of a class are then drawn to the same code.

    Args:
        model: A timm or torchvision classification model, or one with a layer named like torchvision's.
        kind: "hadamard", "orthogonal", "simplex", "binary" (signs of the old classifier), "auto" (Hadamard where a
            matrix of that order is known); or a head spec, whose numbers of features and classes must be the model's.
            If a spec of stored codes has a digest already, or the model is on the meta device, they are not chosen:
            they come with `load_state_dict`.
        seed: Seed of the codebook.
        scale: Initial alpha; default: where softmax reaches 0.95 at cosine 1, or for signs where the new logits are
            nearest to the old ones.
        match: Give each class the Hadamard code nearest to its old class vector (`fixify.heads.match`).
        features: For matched and binary heads: what a classifier layer is given, by its path, [S, N] in random order
            (no labels needed). Codes are then chosen by what the layer sees, center and spread are set, and scale and
            bias are fitted to the old answers.
        keep_bias: Start from the old classifier's bias instead of zero; default: where codes are chosen by its weights.
        arch: Named in messages.
        options: Further fields of `HeadSpec`, for example `standardize=True` or `bits_per_class=64`. A binary head
            neither standardises nor normalises unless there are features or you say so: its logits are the old ones'.

    Returns:
        `model`.

    Raises:
        NoClassifierError: the model has no classifier, or it is fixed already.
        HeadSpecError: no such codebook, a spec of other sizes than the model's, or no bias to keep. The model is as it
            was.
    """
    if isinstance(kind, HeadSpec) and (seed or options):
        raise HeadSpecError("A HeadSpec already holds seed and options; give one or the other.")
    if any(isinstance(module, FixedClassifier) for module in model.modules()):
        raise NoClassifierError(
            f"The classifier of this {type(model).__name__} is fixed already.",
            hint="model.reset_classifier(num_classes) gives a timm model a learned one again.",
        )
    features = {} if features is None else features
    sites = find_classifiers(model, arch)
    unknown = sorted(set(features) - {site.path for site in sites})
    if unknown:
        raise HeadSpecError(
            f"There is no classifier at {unknown[0]}; this model's: {', '.join(site.path for site in sites)}."
        )
    heads = {}
    for site in sites:
        given = features.get(site.path)
        with naming_head(site.path, sites):
            spec = kind if isinstance(kind, HeadSpec) else _spec_for(site, kind, seed, options, given is not None)
            heads[site.path] = _new_head(model, site, spec, scale, match=match, features=given, keep_bias=keep_bias)
    for path, head in heads.items():
        replace_module(model, path, head)
    return model


def apply_heads_(model: nn.Module, records: Iterable[HeadRecord]) -> nn.Module:
    """Replace classifier layers by the heads that a slim checkpoint records, in place.

    Raises:
        FormatError: the model has no classifier at a recorded path, or one of another size.
        CodebookMismatchError: a codebook rebuilt here is not the recorded one. The model is as it was.
    """
    sites = {site.path: site for site in find_classifiers(model)}
    heads = {}
    for record in records:
        site = sites.get(record.path)
        if site is None:
            raise FormatError(f"There is no classifier at {record.path}; this model's: {', '.join(sites)}.")
        sizes = (site.num_features, site.num_classes, site.channel_dim)
        if sizes != (record.spec.num_features, record.spec.num_classes, record.channel_dim):
            raise FormatError(f"The head recorded for {record.path} does not have the size of the model's classifier.")
        heads[record.path] = _head(model, site, record.spec)
    for path, head in heads.items():
        replace_module(model, path, head)
    return model


def _spec_for(site: ClassifierSite, kind: str, seed: int, options: Mapping[str, Any], has_features: bool) -> HeadSpec:
    known = {field.name for field in dataclasses.fields(HeadSpec)} - {"kind", "num_features", "num_classes", "seed"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise HeadSpecError(f"Unknown option {unknown[0]!r}; a head spec has {', '.join(sorted(known))}.")
    if kind == "auto":
        kind, _ = choose_kind(site.num_features, site.num_classes)
    defaults: dict[str, Any] = {"bias": site.has_bias}
    if kind == "binary":
        defaults |= {"gains": True, "normalize": has_features, "standardize": "center" if has_features else False}
        options = {key: value for key, value in options.items() if (key, value) != ("bits_per_class", None)}
        defaults["bits_per_class"] = site.num_features
    return HeadSpec(
        kind=kind, num_features=site.num_features, num_classes=site.num_classes, seed=seed, **defaults | dict(options)
    )


def _new_head(
    model: nn.Module,
    site: ClassifierSite,
    spec: HeadSpec,
    scale: float | None,
    *,
    match: bool,
    features: torch.Tensor | None,
    keep_bias: bool | None,
) -> FixedClassifier:
    """A head for a classifier layer: with codes that are chosen by its weights, or in class order."""
    if match and spec.kind != "hadamard":
        raise HeadSpecError(
            f"Codes of a {spec.kind} head are not matched: match belongs to kind 'hadamard'.",
            hint="A binary head takes its signs from the old classifier anyway."
            if spec.kind == "binary"
            else "Leave match out, or use kind 'hadamard'.",
        )
    taken = match or spec.stores_codes
    if features is not None and not taken:
        raise HeadSpecError("Features are for a head that is fitted to the old classifier: match=True, or 'binary'.")
    old = model.get_submodule(site.path)
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    if not taken or spec.digest is not None or weight.is_meta:
        head = _head(model, site, spec, scale)
        if keep_bias:
            _copy_bias(old, head)
        return head
    _check_sizes(site, spec)
    bias = old.bias if isinstance(old.bias, torch.Tensor) else None
    if keep_bias and (bias is None or not spec.bias):
        raise HeadSpecError(_NO_BIAS)
    made = replacement(
        spec,
        weight,
        bias if keep_bias is not False else None,
        features=features,
        scale=scale,
        channel_dim=site.channel_dim,
    )
    return made.head.to(device=weight.device, dtype=weight.dtype).train(old.training)


def _head(model: nn.Module, site: ClassifierSite, spec: HeadSpec, scale: float | None = None) -> FixedClassifier:
    _check_sizes(site, spec)
    old = model.get_submodule(site.path)
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    head = FixedClassifier(spec, scale=scale, channel_dim=site.channel_dim, device=weight.device, dtype=weight.dtype)
    return head.train(old.training)


def _check_sizes(site: ClassifierSite, spec: HeadSpec) -> None:
    if (spec.num_features, spec.num_classes) != (site.num_features, site.num_classes):
        raise HeadSpecError(
            f"The head spec is for {spec.num_features} features and {spec.num_classes} classes; the classifier "
            f"{site.path} has {site.num_features} and {site.num_classes}."
        )


def _copy_bias(old: nn.Module, head: FixedClassifier) -> None:
    if not isinstance(old.bias, torch.Tensor) or head.bias is None:
        raise HeadSpecError(_NO_BIAS)
    with torch.no_grad():
        head.bias.copy_(old.bias)
