"""Parameters and bytes of one model: what its classifier costs, and what fixing it saves or has saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fixify.checkpoint import is_slim, read_info
from fixify.counts import Savings, count_bytes, project, under
from fixify.originals import Original, read_original
from fixify.sources import named_model
from fixify.zoo.architectures import build, default_num_classes
from fixify.zoo.classifiers import ClassifierSite, find_classifiers


@dataclass(frozen=True)
class ModelReport:
    """One row of `fixify report`.

    Attributes:
        name: As it was given (a file's name without its folder).
        architecture: "library/name", or the class name of a module.
        fixed: Whether the classifier is fixed already; if so "after" is what is, else what `fixify convert` would give.
        num_features: Width of the last representation; of the first head if there are several.
        num_classes: Number of classes.
        savings: Parameters and bytes, before and after.
        heads: Features and classes of each classifier layer of a model that is not fixed.
        note: What is peculiar about it, one sentence, or None.
    """

    name: str
    architecture: str
    fixed: bool
    num_features: int
    num_classes: int
    savings: Savings
    heads: tuple[tuple[int, int], ...] = ()
    note: str | None = None

    @property
    def removable(self) -> int:
        """Classifier weights that a fixed head makes superfluous."""
        return self.savings.removed

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"savings": self.savings.to_dict()}


def report(model: nn.Module | str | Path, *, arch: str | None = None) -> ModelReport:
    """Count the parameters of a model and of its classifier.

    Args:
        model: A module, a checkpoint (slim or ordinary), or the name of an architecture. A name needs no weights.
        arch: The architecture of an ordinary checkpoint, if it cannot be told from the file.

    Raises:
        ArchitectureError, SourceError, FormatError, NoClassifierError: it is none of these, or has no classifier.
    """
    if isinstance(model, nn.Module):
        return _of_module(model)
    if is_slim(model):
        info = read_info(model)
        spec = info.heads[0].spec
        return ModelReport(
            name=Path(model).name,
            architecture=info.architecture.ref,
            fixed=True,
            num_features=spec.num_features,
            num_classes=spec.num_classes,
            savings=Savings.from_dict(info.savings),
        )
    architecture = named_model(model)
    if architecture is not None:
        skeleton = build(architecture, num_classes=default_num_classes(architecture), meta=True)
        return _learned(str(model), architecture.ref, skeleton, find_classifiers(skeleton, architecture))
    original = read_original(model, arch=arch, meta=True)
    skeleton = build(original.architecture, num_classes=original.num_classes, meta=True)
    found = _learned(
        original.source.name, original.architecture.ref, skeleton, list(original.sites), tensors=original.learned
    )
    return found if original.published_note is None else _of_published(found, original, original.published_note)


def _of_module(model: nn.Module) -> ModelReport:
    name = type(model).__name__
    info = getattr(model, "fixify_info", None)
    if info is not None:
        spec = info.heads[0].spec
        return ModelReport(
            name, info.architecture.ref, True, spec.num_features, spec.num_classes, Savings.from_dict(info.savings)
        )
    return _learned(name, name, model, find_classifiers(model))


def _of_published(found: ModelReport, original: Original, note: str) -> ModelReport:
    """The report of a checkpoint whose classifier is fixed already: "after" is what it stores."""
    stored = sum(count_bytes(under(original.tensors, site.path).values()) for site in original.sites)
    savings = replace(found.savings, bytes_after=count_bytes(original.tensors.values()), classifier_bytes_after=stored)
    return replace(found, fixed=True, savings=savings, note=note)


def _learned(
    name: str,
    architecture: str,
    model: nn.Module,
    sites: list[ClassifierSite],
    tensors: Mapping[str, Tensor] | None = None,
) -> ModelReport:
    return ModelReport(
        name=name,
        architecture=architecture,
        fixed=False,
        num_features=sites[0].num_features,
        num_classes=sites[0].num_classes,
        savings=project(model, sites, tensors),
        heads=tuple((site.num_features, site.num_classes) for site in sites),
    )
