"""What every kind of head has to answer: which specs are valid, which codes they stand for, and what is stored.

The kinds themselves are in `fixify.heads.kinds`. Importing this module needs no NumPy, so that reading the header of a
file is quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fixify._values import counted
from fixify.errors import HeadSpecError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from fixify.heads.codes import Codes
    from fixify.heads.projection import Projection

VERSION = 1
"""Version of the head spec record."""
GAIN_STEPS = 255
"""Row scales are stored in this many steps of the longest."""

# Head specs come from files. These limits keep a hostile one from filling the memory or running for hours.
MAX_SIGNS = 1 << 34
MAX_DENSE_NUMBERS = 1 << 27

ITEM_BYTES = {"int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "int64": 8}


@dataclass(frozen=True)
class SpecFields:
    """The fields of a head spec, without any check. `fixify.heads.HeadSpec` describes and validates them."""

    kind: str
    num_features: int
    num_classes: int
    seed: int = 0
    normalize: bool = True
    bias: bool = True
    standardize: bool | Literal["center"] = False
    fixed_scale: bool = False
    matched: bool = False
    blocks: int | None = None
    bits_per_class: int | None = None
    bits_per_weight: float | None = None
    planes: tuple[int, ...] | None = None
    gains: bool = False
    version: int = VERSION
    construction: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a head keeps in a state dict.

    Attributes:
        name: Its key.
        shape: Its shape.
        dtype: NumPy's name of its type in a file; None: the floating-point type of the model.
        memory_dtype: The type that the layer holds it in, if that is another one. Then any integer type is loaded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    memory_dtype: str | None = None

    def num_bytes(self, float_bytes: int = 4) -> int:
        """Compute its size in a file; `float_bytes` is the size of the model's floating-point type."""
        return prod(self.shape) * (float_bytes if self.dtype is None else ITEM_BYTES[self.dtype])


class Kind(ABC):
    """What a kind of head needs, stores and can do. Subclasses are the kinds; none of them has state."""

    name: ClassVar[str]
    """The `kind` of a head spec, and what `--head` takes."""
    summary: ClassVar[str]
    """The codes, in a few words."""
    own_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of a head spec that only this kind takes: `matched`, `blocks`, `bits_per_class`, `bits_per_weight`,
    `planes`."""
    max_entries: ClassVar[int] = MAX_DENSE_NUMBERS
    """Largest size C x N of a codebook."""
    can_match: ClassVar[bool] = False
    """Whether `match` can choose the code of each class by an old classifier."""
    needs_classifier: ClassVar[bool] = False
    """Whether the codes are derived from an old classifier, so there are none without it."""
    has_sign_codebook: ClassVar[bool] = False
    """Whether all codes are +-1/sqrt(N), so that the codebook is exact in integers."""
    stored_noun: ClassVar[str] = "code indices"
    """What `codes` holds if a head of this kind stores it."""
    match_hint: ClassVar[str] = "Leave match out, or use kind 'hadamard'."
    """What to do instead of matching where `can_match` is false."""

    @property
    def can_fit(self) -> bool:
        """Whether `replacement` can choose the codes by an old classifier, by matching or by its signs."""
        return self.can_match or self.needs_classifier

    def check(self, spec: SpecFields) -> None:  # noqa: B027  # some kinds have nothing to check
        """Check the fields of a spec of this kind against each other; types and ranges have been checked.

        Raises:
            HeadSpecError: There is no such head.
        """

    def uses_hadamard(self, spec: SpecFields) -> bool:
        """Check whether the features are multiplied with a Hadamard matrix, so `construction` may be set."""
        return False

    def resolved_fields(self, spec: SpecFields) -> dict[str, Any]:
        """Return the fields that `HeadSpec.resolve` fills in, apart from the digest."""
        return {}

    def stored_codes(self, spec: SpecFields) -> StoredTensor | None:
        """Describe the stored tensor `codes`, or return None if the codes follow from the spec alone."""
        return None

    def stored_projection(self, spec: SpecFields) -> tuple[StoredTensor, ...]:
        """Describe the tensors of a stored projection of the features, or return none."""
        return ()

    @abstractmethod
    def codes(self, spec: SpecFields, stored: ArrayLike | None = None, projection: Projection | None = None) -> Codes:
        """Build the codes of a spec.

        Args:
            spec: The head spec.
            stored: What the head stores in `codes`, if anything.
            projection: The projection that the head stores, if any.

        Raises:
            HeadSpecError: `stored` is missing, superfluous or does not fit.
        """

    def common_cosine(self, num_features: int, num_classes: int) -> float | None:
        """Return the cosine that any two codes in class order have, if the construction makes it the same for all."""
        return None

    def bytes_per_class(self, spec: SpecFields) -> int:
        """Compute the bytes that are stored for each class: its code, its row scale, its share of a projection.

        The share is rounded up to whole bytes.
        """
        stored, shared = self.stored_codes(spec), sum(tensor.num_bytes() for tensor in self.stored_projection(spec))
        own = (0 if stored is None else stored.num_bytes() // spec.num_classes) + spec.gains
        return own + -(-shared // spec.num_classes)

    def num_stored_signs(self, spec: SpecFields) -> int:
        """Count the signs, or finer levels, stored in all classes together; 0 for kinds that store none."""
        return 0

    def description(self, spec: SpecFields) -> str:
        """Describe the codes and their size, for example "88 bits per class (12 bytes with its length)"."""
        return f"{self.summary} ({counted(self.bytes_per_class(spec), 'byte')} per class)"

    def default_options(
        self,
        num_features: int,
        *,
        has_features: bool,
        bits_per_weight: float | None = None,
        bits_per_class: int | None = None,
    ) -> dict[str, Any]:
        """Return the fields that surgery sets for this kind unless the caller sets them.

        Args:
            num_features: N.
            has_features: Whether features are at hand to calibrate the head with.
            bits_per_weight: The rate that the caller wants, for kinds that have rates.
            bits_per_class: The number of signs that the caller wants, for kinds that store signs.
        """
        return {}

    def planned_bytes_per_class(self, num_features: int, num_classes: int) -> int:
        """Compute the bytes per class as `fixify convert` stores them by default; no such head need exist."""
        return 0

    def planned_bytes(self, num_features: int, num_classes: int, *, bias: bool = True) -> int:
        """Compute the bytes of a head's tensors as `fixify convert` stores them by default, in float32.

        These are the scale, the bias, the running statistics (mean, std and the count of batches) and the codes.

        Args:
            num_features: N.
            num_classes: C.
            bias: Whether the head has a bias.
        """
        options = self.default_options(num_features, has_features=False)
        statistics = 8 * num_features + 8 if options.get("standardize", True) else 0
        codes = num_classes * self.planned_bytes_per_class(num_features, num_classes)
        return 4 * (1 + (num_classes if bias else 0)) + statistics + codes

    def _refuse_stored(self, stored: ArrayLike | None) -> None:
        if stored is not None:
            raise HeadSpecError(f"A head of kind {self.name!r} has no code indices; none can be given.")
