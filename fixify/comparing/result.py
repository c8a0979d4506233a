"""What a comparison of a fixed head with other small classifiers found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fixify.comparing.paired import Paired
from fixify.metrics import Metrics


@dataclass(frozen=True)
class Row:
    """One classifier on the images.

    Attributes:
        name: "original", the name of the slim file, or that of an alternative.
        calibrated: Whether an alternative knows the features of some images; None for the other two.
        head_bytes: Bytes of the classifier in a file.
        memory_bytes: Bytes that it holds while it runs.
        seconds: Seconds per batch of the classifier alone, by the size of the batch; None where PyTorch has no product
            for the small form, so that it runs as float32, like the original.
        metrics: What it gets right. Without labels the original's answers are taken for the labels.
        agreement: Percent of the images for which its most probable class is the original's.
        against_original: The difference to the original on the same images; None for the original.
        against_fixed: The difference of an alternative to the fixed head; None for the other two.
    """

    name: str
    calibrated: bool | None
    head_bytes: int
    memory_bytes: int
    seconds: dict[int, float] | None
    metrics: Metrics
    agreement: float
    against_original: Paired | None
    against_fixed: Paired | None

    @property
    def label(self) -> str:
        """Its name; an alternative that knows images is marked."""
        return f"{self.name}, calibrated" if self.calibrated else self.name

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        measured = self.metrics.to_dict()
        del measured["seconds"]
        return {**asdict(self), "metrics": measured}


@dataclass(frozen=True)
class ClassChange:
    """A class, and how many of its images the original and the fixed head get right."""

    name: str
    images: int
    original_right: int
    fixed_right: int


@dataclass(frozen=True)
class Compared:
    """The result of `compare`.

    Attributes:
        data: Name of the data.
        labelled: Whether the data has labels; without, accuracy is agreement with the original.
        num_images: Images that all classifiers answered for.
        calibrated_on: Images without labels that the calibrated alternatives know; 0 without any.
        rows: The original, the fixed head, then the alternatives.
        worst: The classes that lose most, at most 10.
        winners: What beats the fixed head, in sentences; empty if nothing does.
        notes: What a person should know of the comparison.
    """

    data: str
    labelled: bool
    num_images: int
    calibrated_on: int
    rows: tuple[Row, ...]
    worst: tuple[ClassChange, ...]
    winners: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def original(self) -> Row:
        """The row of the original."""
        return self.rows[0]

    @property
    def fixed(self) -> Row:
        """The row of the fixed head."""
        return self.rows[1]

    def to_dict(self) -> dict[str, Any]:
        """Return what `fixify compare --json` prints."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}


def winners(rows: Sequence[Row]) -> Iterator[str]:
    """Say which alternatives beat the fixed head: as small and better, or larger and better beyond chance."""
    fixed, larger = rows[1], []
    for row in sorted(rows[2:], key=lambda row: row.head_bytes):
        found = row.against_fixed
        if found is None or found.difference <= 0:
            continue
        if row.head_bytes > fixed.head_bytes:
            larger += [row] if found.decided else []
        else:
            chance = "" if found.decided else f", which may be chance (p = {found.p_value:.2f})"
            yield f"{row.label} takes no more bytes and is {found.difference:.2f} points better{chance}."
    if larger and larger[0].against_fixed is not None:
        times = larger[0].head_bytes / fixed.head_bytes
        points = larger[0].against_fixed.difference
        others = (
            ""
            if len(larger) == 1
            else f"; so {'is another one' if len(larger) == 2 else f'are {len(larger) - 1} others'}"
        )
        yield f"{larger[0].label} takes {times:.1f} times the bytes and is {points:.2f} points better{others}."
