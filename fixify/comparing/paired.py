"""Compare two classifiers on the same images: an interval of the difference, and the probability of chance."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from scipy.stats import binomtest, norm

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """The difference between two classifiers that answered for the same images.

    Attributes:
        gained: Images that only the second one gets right.
        lost: Images that only the first one gets right ("negative flips").
        difference: Accuracy of the second minus that of the first, in percentage points.
        low: Lower end of the difference's 95 % interval.
        high: Its upper end.
        p_value: McNemar's exact test: the probability of a split at least as uneven if both were equally good.
    """

    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p_value: float

    @property
    def decided(self) -> bool:
        """Whether the test rejects that both are equally good, at 5 %."""
        return self.p_value < 1 - _CONFIDENCE

    def to_dict(self) -> dict[str, float | int]:
        """Return plain values for JSON."""
        return asdict(self)


def paired(gained: int, lost: int, num_images: int) -> Paired:
    """Compute the difference from the images that only one of the two gets right.

    The interval is that of Bonett & Price, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data" (2012), equation 3: it stays sound for few images.

    Args:
        gained: Images that only the second classifier gets right.
        lost: Images that only the first one gets right.
        num_images: All images.

    >>> found = paired(gained=2, lost=10, num_images=100)
    >>> found.difference, round(found.low, 1), round(found.high, 1), round(found.p_value, 3)
    (-8.0, -14.9, -0.8, 0.039)
    """
    more, fewer = (gained + 1) / (num_images + 2), (lost + 1) / (num_images + 2)
    middle = more - fewer
    half = float(norm.ppf(0.5 + _CONFIDENCE / 2)) * math.sqrt((more + fewer - middle**2) / (num_images + 2))
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Paired(gained, lost, 100 * (gained - lost) / num_images, 100 * low, 100 * high, p_value)
