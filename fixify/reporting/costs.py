"""Count what the classifier of one model costs, and plan what each kind of fixed head would save.

Of a safetensors file only the header is read. If the index that ships with fixify knows its network, neither torch nor
timm is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixify.catalogue.skeleton import ClassifierSite
from fixify.checkpoints.locate import find_slim, short_name
from fixify.checkpoints.recognition import Outlined, read_outlined
from fixify.checkpoints.resolve import named_model
from fixify.description import Architecture
from fixify.errors import FormatError, HeadSpecError
from fixify.heads.cosines import Coherence, planned_coherence
from fixify.heads.kinds import KINDS
from fixify.heads.spec import HeadSpec
from fixify.savings import Savings, Sized, count_bytes, count_parameters, under

if TYPE_CHECKING:
    from torch import nn

_MAX_DENSE = 1 << 25
"""Elements of a dense codebook above which it takes minutes to build."""


@dataclass(frozen=True)
class ModelReport:
    """One row of `fixify report`.

    Attributes:
        name: The name that was given; for a file, without its folder.
        architecture: "library/name", or the class name of a module.
        fixed: Whether the classifier is fixed already. If so, "after" in `savings` is the model as it is, else what
            `fixify convert` would give.
        num_features: Width of the last representation; of the first head if there are several.
        num_classes: Number of classes.
        savings: Parameters and bytes, before and after.
        heads: Features and classes of each classifier layer of a model that is not fixed.
        note: A remark, one sentence, or None.
        notes: How a checkpoint was recognised, and what was read of it and what was left out, for the user.
    """

    name: str
    architecture: str
    fixed: bool
    num_features: int
    num_classes: int
    savings: Savings
    heads: tuple[tuple[int, int], ...] = ()
    note: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def removable(self) -> int:
        """Classifier weights that a fixed head makes superfluous."""
        return self.savings.removed

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify report --json` prints."""
        return asdict(self) | {"savings": self.savings.to_dict()}


def report(model: nn.Module | str | Path, *, arch: str | None = None) -> ModelReport:
    """Count the parameters of a model and of its classifier.

    Args:
        model: A module, a checkpoint (slim or ordinary), or the name of an architecture. A name needs no weights.
        arch: The architecture of an ordinary checkpoint, if the file does not show it.

    Raises:
        ArchitectureError, SourceError, FormatError, NoClassifierError: it is none of these, or has no classifier.

    >>> report("resnet50").removable
    2048000
    """
    if not isinstance(model, (str, os.PathLike)):
        return _of_module(model)
    slim = find_slim(model)
    if slim is not None:
        from fixify.checkpoints.slim import read_info

        info = read_info(slim)
        spec = info.heads[0].spec
        return ModelReport(
            name=short_name(model),
            architecture=info.architecture.ref,
            fixed=True,
            num_features=spec.num_features,
            num_classes=spec.num_classes,
            savings=Savings.from_dict(info.savings),
        )
    architecture = named_model(model)
    if architecture is not None:
        return _of_name(str(model), architecture)
    original = read_outlined(model, arch=arch)
    found = _learned(
        original.source.name, original.architecture.ref, original.num_parameters, original.sites, original.learned
    )
    found = replace(found, notes=original.notes)
    return (
        found
        if original.reference_code_note is None
        else _of_reference_code(found, original, original.reference_code_note)
    )


def _of_module(model: nn.Module) -> ModelReport:
    name = type(model).__name__
    info = getattr(model, "fixify_info", None)
    if info is not None:
        spec = info.heads[0].spec
        return ModelReport(
            name, info.architecture.ref, True, spec.num_features, spec.num_classes, Savings.from_dict(info.savings)
        )
    from fixify.models.classifiers import find_classifiers

    return _learned(name, name, count_parameters(model), find_classifiers(model), model.state_dict())


def _of_name(name: str, architecture: Architecture) -> ModelReport:
    from fixify.models.architectures import build, default_num_classes
    from fixify.models.classifiers import find_classifiers

    model = build(architecture, num_classes=default_num_classes(architecture), meta=True)
    sites = find_classifiers(model, architecture)
    return _learned(name, architecture.ref, count_parameters(model), sites, model.state_dict())


def _of_reference_code(found: ModelReport, original: Outlined, note: str) -> ModelReport:
    """Count a checkpoint whose classifier is fixed already: "after" is what it stores."""
    stored = sum(count_bytes(under(original.tensors, site.path).values()) for site in original.sites)
    savings = replace(found.savings, bytes_after=count_bytes(original.tensors.values()), classifier_bytes_after=stored)
    return replace(found, fixed=True, savings=savings, note=note)


def _learned(
    name: str,
    architecture: str,
    num_parameters: int,
    sites: Sequence[ClassifierSite],
    tensors: Mapping[str, Sized],
) -> ModelReport:
    return ModelReport(
        name=name,
        architecture=architecture,
        fixed=False,
        num_features=sites[0].num_features,
        num_classes=sites[0].num_classes,
        savings=Savings.project(num_parameters, sites, tensors),
        heads=tuple((site.num_features, site.num_classes) for site in sites),
    )


@dataclass(frozen=True)
class KindPlan:
    """What one kind of head would give on one model.

    Attributes:
        kind: The kind, as `--head` takes it.
        stored: Bytes of all its heads' tensors in the slim checkpoint; None if this kind is not possible.
        saved: Bytes of the classifier's tensors now, less `stored`.
        coherence: Cosines between the codes, of the least spread head if there are several; None if this kind is not
            possible or the cosines are unknown, for the reason in `note`.
        note: A remark, or None.
    """

    kind: str
    stored: int | None
    saved: int | None
    coherence: Coherence | None
    note: str | None


@dataclass(frozen=True)
class Plan:
    """What converting a model would save.

    Attributes:
        report: Parameters and bytes, before and after.
        kinds: Each kind of head; empty if the paper's published code has fixed the classifier already.
        verdict: How much the classifier weighs, one sentence.
    """

    report: ModelReport
    kinds: tuple[KindPlan, ...]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify plan --json` prints."""
        return {
            "report": self.report.to_dict(),
            "kinds": [asdict(kind) for kind in self.kinds],
            "verdict": self.verdict,
        }


def plan(source: str | Path, *, arch: str | None = None) -> Plan:
    """Estimate the savings of each kind of head. Only names and shapes of a checkpoint are read.

    Raises:
        FormatError: the source is a slim checkpoint already.
        ArchitectureError, SourceError, NoClassifierError: see `fixify.checkpoints.learned.read_original`.
    """
    found = report(source, arch=arch)
    if found.note is not None:
        return Plan(report=found, kinds=(), verdict=f"{found.name}: {found.note}")
    if found.fixed:
        raise FormatError(f"{source} is a slim checkpoint already.", hint=f"fixify report {source}")
    kinds = tuple(_kind(kind, found) for kind in KINDS)
    return Plan(report=found, kinds=kinds, verdict=_verdict(found))


def _kind(kind: str, found: ModelReport) -> KindPlan:
    stored = sum(KINDS[kind].planned_bytes(n, c) for n, c in found.heads)
    saved = found.savings.classifier_bytes_before - stored
    sizes = dict.fromkeys(found.heads)
    if kind == "binary":
        return KindPlan(
            kind, stored, saved, None, "one sign a weight, fewer with --bits-per-class, levels with --bits-per-weight"
        )
    try:
        specs = [HeadSpec(kind=kind, num_features=n, num_classes=c) for n, c in sizes]
        if kind != "hadamard" and any(n * c > _MAX_DENSE for n, c in sizes):
            return KindPlan(
                kind, stored, saved, None, "a codebook this large is impractical; its cosines are not computed"
            )
        spread = [planned_coherence(spec) for spec in specs]
    except HeadSpecError as error:
        return KindPlan(kind, None, None, None, error.message)
    note = (
        "cosines of codes in class order; matched codes are less spread"
        if kind == "hadamard" and any(c > n for n, c in sizes)
        else None
    )
    return KindPlan(kind, stored, saved, max(spread, key=lambda facts: facts.max_cosine), note)


def _verdict(found: ModelReport) -> str:
    share = 100 * found.savings.removed_share
    if share < 5:
        judgement = "hardly worth it"
    elif share < 15:
        judgement = "worth it where every megabyte counts"
    elif share < 40:
        judgement = "worth it"
    else:
        judgement = "the classifier dominates this model; do it"
    return f"{found.name}: the classifier's weights are {share:.1f} % of the parameters: {judgement}."
