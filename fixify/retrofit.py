"""Surgery: the classifier layers of a model are replaced, in place, by fixed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fixify.errors import FormatError, HeadSpecError, NoClassifierError
from fixify.heads import FixedClassifier, HeadSpec, choose_kind
from fixify.zoo.architectures import Architecture
from fixify.zoo.classifiers import ClassifierSite, find_classifiers


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
    keep_bias: bool = False,
    arch: Architecture | None = None,
    **options: Any,
) -> nn.Module:
    """Replace the classifier of a model by a fixed one, in place. Weights of the old one are dropped.

    Every classifier layer of the model is replaced (`zoo.classifiers.find_classifiers`); the new one has the old one's
    device and floating type, and a bias if the old one had. After that `model.get_classifier()` is the fixed head, or
    contains it where it is more than a linear layer (RepVit's BatchNorm + Linear). `reset_classifier()` gives the model
    a learned classifier again. Merging BatchNorm into the classifier (`fuse()` of LeViT, RepVit and the like) is no
    longer possible: a fixed classifier has no weights to merge it into.

    All heads of a model get the same seed, so heads of the same width share one codebook: distilled models average the
    logits of their heads, and the two features of a class are then drawn to the same code.

    Args:
        model: A timm or torchvision classification model, or one with a layer named like torchvision's.
        kind: "hadamard", "orthogonal", "simplex", "auto" (Hadamard where a matrix of that order is known); or a head
            spec, whose numbers of features and classes must be the model's.
        seed: Seed of the codebook.
        scale: Initial alpha; default: where softmax reaches 0.95 at cosine 1.
        keep_bias: Start from the old classifier's bias instead of zero.
        arch: Named in messages.
        options: Further fields of `HeadSpec`, for example `standardize=True`.

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
    heads = {}
    for site in find_classifiers(model, arch):
        spec = kind if isinstance(kind, HeadSpec) else _spec_for(site, kind, seed, options)
        heads[site.path] = _head(model, site, spec, scale)
        if keep_bias:
            _copy_bias(model.get_submodule(site.path), heads[site.path])
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


def _spec_for(site: ClassifierSite, kind: str, seed: int, options: Mapping[str, Any]) -> HeadSpec:
    known = {field.name for field in dataclasses.fields(HeadSpec)} - {"kind", "num_features", "num_classes", "seed"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise HeadSpecError(f"Unknown option {unknown[0]!r}; a head spec has {', '.join(sorted(known))}.")
    if kind == "auto":
        kind, _ = choose_kind(site.num_features, site.num_classes)
    return HeadSpec(
        kind=kind,
        num_features=site.num_features,
        num_classes=site.num_classes,
        seed=seed,
        **{"bias": site.has_bias, **options},
    )


def _head(model: nn.Module, site: ClassifierSite, spec: HeadSpec, scale: float | None = None) -> FixedClassifier:
    if (spec.num_features, spec.num_classes) != (site.num_features, site.num_classes):
        raise HeadSpecError(
            f"The head spec is for {spec.num_features} features and {spec.num_classes} classes; the classifier "
            f"{site.path} has {site.num_features} and {site.num_classes}."
        )
    old = model.get_submodule(site.path)
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    head = FixedClassifier(spec, scale=scale, channel_dim=site.channel_dim, device=weight.device, dtype=weight.dtype)
    return head.train(old.training)


def _copy_bias(old: nn.Module, head: FixedClassifier) -> None:
    if not isinstance(old.bias, torch.Tensor) or head.bias is None:
        raise HeadSpecError("There is no bias to keep: the old classifier or the new one has none.")
    with torch.no_grad():
        head.bias.copy_(old.bias)
