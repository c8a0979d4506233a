"""Which classes a model confuses, without a matrix of C x C: it works for 10 classes and for 10,000."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORST = 20
_MOST_TAKEN_FOR = 3


@dataclass(frozen=True)
class WorstClass:
    """A class that a model gets wrong.

    Attributes:
        label: Its number.
        taken_for: The (number, images) of the classes that its images were taken for most often, most often first.
    """

    label: int
    taken_for: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Confusions:
    """What a model answered on a data set, class by class.

    Attributes:
        images: Images of each class, C numbers.
        right: Those that the model got right, C numbers.
        worst: The classes with the smallest share of right answers, smallest first, at most 20; of equal shares the
            class with more images. Classes without a wrong answer are not among them.
    """

    images: tuple[int, ...]
    right: tuple[int, ...]
    worst: tuple[WorstClass, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Confusions:
        """Read back what `to_dict` wrote; raises ValueError, KeyError or TypeError if it is something else."""
        images, right = (tuple(int(count) for count in values[name]) for name in ("images", "right"))
        if len(images) != len(right):
            raise ValueError("as many classes with images as with answers are expected")
        worst = tuple(
            WorstClass(int(row["label"]), tuple((int(label), int(count)) for label, count in row["taken_for"]))
            for row in values["worst"]
        )
        named = {row.label for row in worst} | {label for row in worst for label, _ in row.taken_for}
        if not all(0 <= label < len(images) for label in named):
            raise ValueError(f"a class beyond the {len(images)} is named")
        return cls(images, right, worst)


class Answers:
    """The label and the answer of every image, collected on the device and read once at the end.

    Eight bytes an image: of a million images less than one batch takes.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, labels: Tensor, guesses: Tensor) -> None:
        """Add a batch: int64 [B] and [B], on the same device."""
        self._batches.append(torch.stack([labels, guesses]).to(torch.int32))

    def pairs(self) -> Tensor:
        """Every (label, answer) so far, int32 [2, images], on the CPU."""
        return torch.cat(self._batches, dim=1).cpu() if self._batches else torch.zeros(2, 0, dtype=torch.int32)


def confusions(pairs: np.ndarray, num_classes: int, *, worst: int = WORST) -> Confusions:
    """Count the answers to each class.

    Args:
        pairs: (label, answer) of every image, integers [2, images].
        num_classes: C.
        worst: For how many classes what they were taken for is kept.
    """
    labels, guesses = pairs.astype(np.int64)
    wrong = labels != guesses
    images = np.bincount(labels, minlength=num_classes)
    missed = np.bincount(labels[wrong], minlength=num_classes)
    candidates = np.flatnonzero(missed)
    share = (images - missed)[candidates] / images[candidates]
    chosen = candidates[np.lexsort((candidates, -images[candidates], share))][:worst]
    rows = []
    for label in chosen:
        taken, counts = np.unique(guesses[wrong & (labels == label)], return_counts=True)
        most = np.lexsort((taken, -counts))[:_MOST_TAKEN_FOR]
        rows.append(WorstClass(int(label), tuple(zip(taken[most].tolist(), counts[most].tolist(), strict=True))))
    return Confusions(tuple(images.tolist()), tuple((images - missed).tolist()), tuple(rows))
