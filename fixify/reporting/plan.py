"""Is it worth it? What each kind of head would cost and save on a model, from its header or its name alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fixify.errors import FormatError, HeadSpecError
from fixify.heads import Coherence, HeadSpec, coherence
from fixify.reporting.models import ModelReport, report

KINDS = ("hadamard", "orthogonal", "simplex")
# Above this many numbers the dense kinds take minutes to build, and nobody would choose them.
_MAX_DENSE = 1 << 25


@dataclass(frozen=True)
class KindPlan:
    """One kind of head on one model.

    Attributes:
        kind: As `--head` takes it.
        coherence: Cosines between the codes; None if this kind cannot be had, for the `reason`.
        reason: Why it cannot be had, or None.
    """

    kind: str
    coherence: Coherence | None
    reason: str | None


@dataclass(frozen=True)
class Plan:
    """What converting a model would give.

    Attributes:
        report: Parameters and bytes, before and after.
        kinds: Each kind of head.
        verdict: One sentence.
    """

    report: ModelReport
    kinds: tuple[KindPlan, ...]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "report": self.report.to_dict(),
            "kinds": [asdict(kind) for kind in self.kinds],
            "verdict": self.verdict,
        }


def plan(source: str | Path, *, arch: str | None = None) -> Plan:
    """Plan a conversion. Of a checkpoint only names and shapes are read; a model name needs no weights.

    Raises:
        FormatError: the source is a slim checkpoint already.
        ArchitectureError, SourceError, NoClassifierError: see `fixify.originals.read_original`.
    """
    found = report(source, arch=arch)
    if found.fixed:
        raise FormatError(f"{source} is a slim checkpoint already.", hint=f"fixify report {source}")
    kinds = tuple(_kind(kind, found.num_features, found.num_classes) for kind in KINDS)
    return Plan(report=found, kinds=kinds, verdict=_verdict(found))


def _kind(kind: str, num_features: int, num_classes: int) -> KindPlan:
    if kind != "hadamard" and num_features * num_classes > _MAX_DENSE:
        return KindPlan(kind, None, "not computed: a dense codebook of this size is impractical")
    try:
        spec = HeadSpec(kind=kind, num_features=num_features, num_classes=num_classes)
        return KindPlan(kind, coherence(spec), None)
    except HeadSpecError as error:
        return KindPlan(kind, None, error.message)


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
