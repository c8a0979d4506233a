"""The heads that benchmarks measure: what a kind is called, and a head of it for any size without any training."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixify.errors import HeadSpecError, UsageError
from fixify.heads import FixedClassifier, HeadSpec, default_blocks
from fixify.heads.kinds import BINARY

KINDS = ("hadamard", "matched", "binary", "binary-64")
"""The kinds that are measured by default."""
_KNOWN = re.compile(r"hadamard|matched|orthogonal|simplex|identity|binary(-[1-9][0-9]{0,5})?")
_SIZE = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Size:
    """The size of a classifier: N features and C classes."""

    num_features: int
    num_classes: int

    def __str__(self) -> str:
        return f"{self.num_features}x{self.num_classes}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read "NxC".

        Raises:
            UsageError: it is something else.

        >>> Size.parse("2048x1000")
        Size(num_features=2048, num_classes=1000)
        """
        found = _SIZE.fullmatch(text)
        if found is None:
            raise UsageError(f"A size is features x classes, got {text!r}.", hint="For example: --size 2048x1000")
        return cls(int(found[1]), int(found[2]))


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Check the names of kinds.

    Raises:
        UsageError: one is unknown.
    """
    for kind in kinds:
        if not _KNOWN.fullmatch(kind):
            raise UsageError(
                f"There is no kind {kind!r} to measure.",
                hint="Known: hadamard, matched (a Hadamard head with stored code indices), orthogonal, simplex, "
                "identity, binary, and binary-64 for 64 signs per class.",
            )


def sample_head(kind: str, size: Size, *, seed: int = 0) -> FixedClassifier | None:
    """Make a head of a size, as `fixify convert` makes it for a network to be fine-tuned.

    Its stored codes are drawn at random: the time of a product does not depend on them. It is in training mode.

    Args:
        kind: See `check_kinds`.
        size: Its size.
        seed: Seed of the stored codes.

    Returns:
        The head, or None if there is no such head at this size.
    """
    n, c = size.num_features, size.num_classes
    rng = np.random.default_rng(seed)
    try:
        if kind == "matched":
            spec = HeadSpec("hadamard", n, c, standardize=True, matched=True, blocks=default_blocks(n, c))
            return FixedClassifier(spec, codes=_code_indices(spec, rng))
        if kind.startswith("binary"):
            signs = int(kind.partition("-")[2] or n)
            spec = HeadSpec("binary", n, c, **BINARY.default_options(n, has_features=True, bits_per_class=signs))
            packed = rng.integers(0, 256, (c, -(-signs // 8)), dtype=np.uint8)
            packed[:, -1] &= 0xFF << -signs % 8 & 0xFF  # the unused bits are 0
            gains = torch.from_numpy(rng.integers(128, 256, c, dtype=np.uint8))
            return FixedClassifier(spec, codes=torch.from_numpy(packed), gains=gains)
        return FixedClassifier(HeadSpec(kind, n, c, standardize=True))
    except HeadSpecError:
        return None


def _code_indices(spec: HeadSpec, rng: np.random.Generator) -> Tensor:
    """Draw different code indices of a matched head: within one block if C <= N, as matching does."""
    n, c, blocks = spec.num_features, spec.num_classes, spec.blocks or 1
    if c <= n:
        rows, negative = rng.permutation(n)[:c], rng.integers(0, 2, c)
        return torch.from_numpy(int(rng.integers(blocks)) * 2 * n + rows + n * negative)
    return torch.from_numpy(rng.choice(2 * n * blocks, c, replace=False))
