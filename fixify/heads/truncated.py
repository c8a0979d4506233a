"""The paper's own Hadamard head, as its published code builds it: for checkpoints that were trained with it.

github.com/eladhoffer/fix_your_classifier takes Sylvester's matrix of the next power of two M >= max(C, N), keeps its
first C rows and of these the first N columns, and computes `logits = -scale * (H[:C, :N] @ (x / |x|)) + bias` (the sign
is its own). In the terms of this package the code of class c is `-H[c, :N] / sqrt(N)`, and alpha is
`sqrt(N) * scale`: a loaded scale of its shape, [1], is multiplied when it is loaded into such a head.

Rows that are cut short are not orthogonal, the all-ones row is among them, and two rows whose numbers differ only in
bits beyond the columns that are left are one: for new heads `hadamard` builds the matrix at the order N itself.
"""

from __future__ import annotations

import numpy as np

from fixify.errors import HeadSpecError
from fixify.heads.matrices import Factor, rows

TRUNCATED = "truncated-sylvester"
"""What `HeadSpec.construction` says."""


def _power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()


def refuse_duplicate_rows(num_features: int, num_classes: int) -> None:
    """Of Sylvester's rows only the first P differ in the first N columns, P the next power of two from N.

    Raises:
        HeadSpecError: more classes than that: class P would have the code of class 0, and so on.
    """
    different = _power_of_two_from(num_features)
    if num_classes > different:
        raise HeadSpecError(
            f"Cut to {num_features} features, only {different} rows of a Sylvester matrix differ: of {num_classes} "
            f"classes, class {different} would have the code of class 0, and {num_classes - different} in all could "
            "never be told from another.",
            hint="Such a head (of the paper's published code) cannot be right. Use `--head hadamard`, which repeats no "
            "code, and train again.",
        )


def packed_truncated_rows(num_features: int, classes: np.ndarray) -> np.ndarray:
    """The codes of some classes as packed bits, 1 a minus sign: uint8 [k, ceil(N / 8)]."""
    order = _power_of_two_from(max(num_features, int(classes.max()) + 1))
    signs = rows((Factor("sylvester", order),), classes)[:, :num_features]
    return np.packbits(signs > 0, axis=1)
