"""Choose the smallest fixed head that answers as the original does on enough of some held-out images.

The candidates are tried from the largest to the smallest, in an order that does not depend on the images, and the first
one that falls below the target ends the walk. So the bound of the chosen head holds with the confidence of a single
test, however many heads were tried (fixed-sequence testing: Angelopoulos et al., "Learn then Test", 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import betaincinv

from fixify._watch import OnProgress, unwatched
from fixify.checkpoints.learned import Original
from fixify.conversion_options import ConvertOptions, HeadConfig
from fixify.errors import CheckFailed
from fixify.features import Observation
from fixify.heads import is_constructible
from fixify.heads.levels import LEVELS
from fixify.models.classifiers import ClassifierSite
from fixify.surgery import NewHead, make_heads

CONFIDENCE = 0.95
"""The bound of the agreement on other images like these holds with this probability."""
_HELD_OUT = 4
"""Images that are held out, in units of the fewest that can show the agreement. With 4, a head that disagrees half as
often as allowed still passes in most draws."""
_SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)
"""Signs per class that are tried, as shares of the number of features."""
_LARGEST_INDEX = 4
"""Bytes of a Hadamard head's code index; signs have to take more to be tried before it."""


@dataclass(frozen=True)
class Candidate:
    """A head that was tried.

    Attributes:
        flags: The options of `fixify convert` that make it.
        bytes_per_class: Stored bytes per class for codes, row scales and its share of projections, in all classifier
            layers together.
        same: Held-out images on which the answer was the original's.
        held_out: Held-out images.
        bound: Percent of other images like these on which it is at least, with 95 % confidence (Clopper-Pearson).
        reached: Whether the bound reaches the target.
    """

    flags: str
    bytes_per_class: int
    same: int
    held_out: int
    bound: float
    reached: bool

    @property
    def agreement(self) -> float:
        """Percent of the held-out images on which the answer was the original's."""
        return 100.0 * self.same / self.held_out

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"agreement": self.agreement}


@dataclass(frozen=True)
class Choice:
    """The heads that were tried, largest first, and the smallest that reached the target.

    Attributes:
        target: Percent of images on which the original's answer is wanted.
        walked: The heads that were tried.
    """

    target: float
    walked: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The smallest head that reached the target; None if not even the largest did."""
        return next((candidate for candidate in reversed(self.walked) if candidate.reached), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "target": self.target,
            "confidence": CONFIDENCE,
            "walked": [candidate.to_dict() for candidate in self.walked],
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
        }


class AgreementNotReached(CheckFailed):
    """No fixed head answers as the original does on enough images.

    Args:
        choice: The heads that were tried.
    """

    def __init__(self, choice: Choice) -> None:
        best = choice.walked[0]
        super().__init__(
            f"No fixed head reaches {choice.target:g} % agreement: {best.flags} keeps {best.same} of {best.held_out} "
            f"answers, which shows {best.bound:.2f} % with {100 * CONFIDENCE:.0f} % confidence.",
            hint="Give more images (--calibrate-images), or a lower --agree. Nothing was written.",
        )
        self.choice = choice


def lower_bound(same: int, count: int) -> float:
    """Compute what a share is at least, with 95 % confidence (Clopper and Pearson, 1934), in percent.

    Args:
        same: Successes.
        count: Independent trials, at least one.

    >>> round(lower_bound(299, 299), 3), lower_bound(0, 5)
    (99.003, 0.0)
    """
    if not same:
        return 0.0
    return 100.0 * float(betaincinv(same, count - same + 1, 1.0 - CONFIDENCE))


def fewest_images(target: float) -> int:
    """Count the images on which all answers have to be the original's to show an agreement.

    Args:
        target: Percent, below 100.

    >>> fewest_images(99), fewest_images(95)
    (299, 59)
    """
    return math.ceil(math.log(1.0 - CONFIDENCE) / math.log(target / 100.0))


def images_to_hold_out(target: float) -> int:
    """Return how many images are held out to show an agreement of `target` percent, if there are so many."""
    return _HELD_OUT * fewest_images(target)


def choose_head(
    original: Original, options: ConvertOptions, observed: Observation, on_progress: OnProgress = unwatched
) -> tuple[list[NewHead], Choice]:
    """Make the smallest fixed heads that answer as the original does on at least `options.agree` percent of images.

    Args:
        original: The checkpoint.
        options: Options with `agree`.
        observed: The original on images to fit heads to, and on others.
        on_progress: See `fixify.heads.replacement`.

    Returns:
        One head per classifier layer, and what was tried.

    Raises:
        AgreementNotReached: Not even the largest head does.
    """
    target = options.agree or 0.0
    walked: list[Candidate] = []
    chosen: list[NewHead] = []
    for flags, config in candidates(original.sites, options):
        heads = make_heads(
            original.sites, original.tensors, config, features=observed.features, on_progress=on_progress
        )
        same = observed.same_answers({head.record.path: head.module for head in heads})
        bound = lower_bound(same, observed.num_held_out)
        size = sum(head.record.spec.bytes_per_class for head in heads)
        walked.append(Candidate(flags, size, same, observed.num_held_out, bound, bound >= target))
        if bound < target:
            break
        chosen = heads
    choice = Choice(target, tuple(walked))
    if choice.chosen is None:
        raise AgreementNotReached(choice)
    return chosen, choice


def candidates(sites: Sequence[ClassifierSite], options: ConvertOptions) -> Iterator[tuple[str, HeadConfig]]:
    """List the heads to try, largest first: levels, signs, fewer signs, and the codes of Hadamard heads.

    Signs are those of a stored projection where `make_heads` finds that better.

    Codes in class order are not among them: without training they agree by chance only.

    Args:
        sites: The classifier layers.
        options: Everything but the kind of the head.

    Yields:
        The flags that make a head, and its config.
    """
    common = {name: getattr(options, name) for name in HeadConfig.model_fields}

    def made(flags: str, **changes: Any) -> tuple[str, HeadConfig]:
        return flags, HeadConfig.create(**common | changes)

    for bits in reversed(LEVELS):
        yield made(f"--head binary --bits-per-weight {bits:g}", head="binary", bits_per_weight=bits)
    widths = {site.num_features for site in sites}
    if len(widths) == 1 and any(site.num_classes > site.num_features for site in sites):  # or a projection in its place
        signs = widths.pop()
        yield made(f"--head binary --bits-per-class {signs}", head="binary", bits_per_class=signs)
    else:
        yield made("--head binary --bits-per-weight 1", head="binary", bits_per_weight=1)
    if not all(is_constructible(site.num_features) for site in sites):
        return
    width, most = min(site.num_features for site in sites), max(site.num_classes for site in sites)
    for signs in dict.fromkeys(int(share * width) // 8 * 8 for share in _SHARES):
        if signs // 8 + 1 > _LARGEST_INDEX and 2 ** min(signs, 63) >= most:
            yield made(f"--head binary --bits-per-class {signs}", head="binary", bits_per_class=signs)
    if all(site.num_features >= 64 or site.num_classes <= 2**site.num_features for site in sites):
        if any(site.num_classes > site.num_features for site in sites):
            yield made("--head hadamard --wide-search", head="hadamard", wide_search=True)
        yield made("--head hadamard", head="hadamard")
