"""Is it worth it? What each kind of head would cost and save on a model, from its header or its name alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fixify.counts import head_bytes
from fixify.errors import FormatError, HeadSpecError
from fixify.heads import KINDS, Coherence, HeadSpec, coherence
from fixify.reporting.models import ModelReport, report

# Above this many numbers the dense kinds take minutes to build, and nobody would choose them.
_MAX_DENSE = 1 << 25


@dataclass(frozen=True)
class KindPlan:
    """One kind of head on one model.

    Attributes:
        kind: As `--head` takes it.
        stored: Bytes of all its heads' tensors in the slim checkpoint; None if it cannot be had.
        saved: Bytes of the classifier's tensors now, less `stored`.
        coherence: Cosines between the codes, of the least spread head if there are several; None if this kind cannot
            be had or the cosines are not known, for the `note`.
        note: Why not, or how they are meant.
    """

    kind: str
    stored: int | None
    saved: int | None
    coherence: Coherence | None
    note: str | None


@dataclass(frozen=True)
class Plan:
    """What converting a model would give.

    Attributes:
        report: Parameters and bytes, before and after.
        kinds: Each kind of head; none if the classifier is fixed already, by the paper's published code.
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
    if found.note is not None:
        return Plan(report=found, kinds=(), verdict=f"{found.name}: {found.note}")
    if found.fixed:
        raise FormatError(f"{source} is a slim checkpoint already.", hint=f"fixify report {source}")
    kinds = tuple(_kind(kind, found) for kind in KINDS)
    return Plan(report=found, kinds=kinds, verdict=_verdict(found))


def _kind(kind: str, found: ModelReport) -> KindPlan:
    stored = sum(head_bytes(kind, n, c) for n, c in found.heads)
    saved = found.savings.classifier_bytes_before - stored
    sizes = dict.fromkeys(found.heads)
    if kind == "binary":
        return KindPlan(
            kind, stored, saved, None, "one sign a weight, fewer with --bits-per-class; cosines as in the old"
        )
    try:
        specs = [HeadSpec(kind=kind, num_features=n, num_classes=c) for n, c in sizes]
        if kind != "hadamard" and any(n * c > _MAX_DENSE for n, c in sizes):
            return KindPlan(kind, stored, saved, None, "a codebook this large is impractical; its cosines are left out")
        spread = [coherence(spec) for spec in specs]
    except HeadSpecError as error:
        return KindPlan(kind, None, None, None, error.message)
    note = (
        "of codes in order; those that convert matches are less spread"
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
