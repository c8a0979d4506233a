"""The kinds of heads, one class each: which specs are valid, which codes they stand for, and what is stored.

A kind is a stateless object in `KINDS`. Its methods take the bare fields of a head spec. `HeadSpec` asks them, and
nothing else needs to compare the name of a kind.

Importing this module needs no NumPy, so that reading the header of a file is quick: what builds codes is imported when
they are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fixify._values import counted
from fixify.errors import HeadSpecError
from fixify.heads.base_kind import ITEM_BYTES, MAX_DENSE_NUMBERS, MAX_SIGNS, Kind, SpecFields, StoredTensor
from fixify.heads.constructions import (
    Construction,
    factorise,
    format_construction,
    is_constructible,
    parse_construction,
    power_of_two_from,
)
from fixify.heads.levels import LEVELS, PLANES, SIGNS, TRITS_PER_BYTE, Levels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    from fixify.heads.codes import (
        FeatureRows,
        HadamardRows,
        RealRows,
        Rotation,
        StoredLevels,
        StoredSigns,
        TruncatedRows,
    )
    from fixify.heads.projection import Projection

REFERENCE_CONSTRUCTION = "truncated-sylvester"
"""`construction` of a head as the paper's published code builds it."""
SHARED_BLOCKS = 8
"""Sign vectors tried by matching where all classes share one block (C <= N). More gain nothing: on EfficientNet-Lite0
(1000 x 1280) the mean cosine with the old class vectors is between 0.0954 and 0.0959 for every one of them."""
SEARCH_BLOCKS = 4096
"""Blocks searched by the wide search where classes do not share one (C > N)."""

_SEARCHED_COSINES = 4_000_000_000  # about a minute: fewer blocks are searched where C and N are large


class Hadamard(Kind):
    """Rows of an exact Hadamard matrix of order N, as +-1/sqrt(N) (paper, section 2.3).

    C <= N: exactly orthogonal. C <= 2N: +-rows, whose cosines are 0 or -1, Rankin's optimum. Beyond: blocks of
    sign-flipped matrices, of coherence 1/sqrt(N) where N = 4^k (Kerdock), and seeded elsewhere. The codes go to the
    classes in order, or are matched to an old classifier; then the code indices are stored.
    """

    name = "hadamard"
    summary = "rows of a Hadamard matrix, in class order"
    own_fields = frozenset({"matched", "blocks"})
    max_entries = MAX_SIGNS
    can_match = True
    has_sign_codebook = True

    def check(self, spec: SpecFields) -> None:
        """Check that the matrix exists, that there are enough codes, and that `blocks` fits.

        Raises:
            HeadSpecError: There is no such head.
        """
        n, c = spec.num_features, spec.num_classes
        construction_of(spec)  # raises if there is no such matrix
        if n < 64 and c > 2**n:
            raise HeadSpecError(
                f"There are only {2**n:,} different codes of {counted(n, 'sign')}, got "
                f"{counted(c, 'class', 'classes')}.",
                hint="Use `--head orthogonal`.",
            )
        needed = min_blocks(n, c)
        if spec.matched:
            if spec.blocks is None or spec.blocks < needed:
                raise HeadSpecError(f"A matched head of this size needs blocks >= {needed}, got {spec.blocks}.")
            if 2 * n * spec.blocks > 2**32:
                raise HeadSpecError(f"{counted(spec.blocks, 'block')} of {2 * n:,} codes are more than 2^32 codes.")
        elif spec.blocks not in (None, needed):
            raise HeadSpecError(f"An unmatched head of this size has {needed} block(s), got {spec.blocks}.")

    def uses_hadamard(self, spec: SpecFields) -> bool:
        """Check whether the features are multiplied with a Hadamard matrix: always."""
        return True

    def resolved_fields(self, spec: SpecFields) -> dict[str, Any]:
        """Return the construction and the number of blocks."""
        return {
            "construction": format_construction(construction_of(spec)),
            "blocks": spec.blocks or min_blocks(spec.num_features, spec.num_classes),
        }

    def stored_codes(self, spec: SpecFields) -> StoredTensor | None:
        """Describe the code indices of a matched head, in the smallest unsigned type that holds the code space."""
        if not spec.matched:
            return None
        # int64 in memory, since distributed training cannot broadcast unsigned buffers of 16 and 32 bits
        dtype = _index_dtype(spec.num_features, spec.blocks or 1)
        return StoredTensor("codes", (spec.num_classes,), dtype, memory_dtype="int64")

    def common_cosine(self, num_features: int, num_classes: int) -> float | None:
        """Return 0 for the rows of one matrix."""
        return 0.0 if num_classes <= num_features else None

    def codes(
        self, spec: SpecFields, stored: ArrayLike | None = None, projection: Projection | None = None
    ) -> HadamardRows:
        """Build the codes from the stored code indices of a matched head, else in class order.

        Raises:
            HeadSpecError: A matched head without indices, an unmatched one with them, or indices that do not fit.
        """
        from fixify.heads.codes import HadamardRows

        construction = construction_of(spec)
        if spec.matched:
            indices = self._checked_indices(spec, stored)
        elif stored is not None:
            raise HeadSpecError("This head spec is not matched, so its codes are not stored; none can be given.")
        else:
            indices = default_codes(spec.num_features, spec.num_classes)
        return HadamardRows(construction, spec.seed, indices)

    def _checked_indices(self, spec: SpecFields, stored: ArrayLike | None) -> np.ndarray:
        import numpy as np

        if stored is None:
            raise HeadSpecError("A matched head needs its stored code indices; none were given.")
        indices = np.asarray(stored)
        space = 2 * spec.num_features * (spec.blocks or 0)
        if indices.shape != (spec.num_classes,) or indices.dtype.kind not in "iu":
            raise HeadSpecError(
                f"Expected {spec.num_classes} integer code indices, got {indices.dtype} of shape {list(indices.shape)}."
            )
        if int(indices.min()) < 0 or int(indices.max()) >= space:
            raise HeadSpecError(f"Code indices must lie in 0 .. {space - 1}, got {indices.min()} .. {indices.max()}.")
        return indices.astype(np.int64)

    def description(self, spec: SpecFields) -> str:
        """Describe the codes and their size; matched codes have a size."""
        codes = "rows of a Hadamard matrix, matched to an old classifier" if spec.matched else self.summary
        return f"{codes} ({counted(self.bytes_per_class(spec), 'byte')} per class)"

    def planned_bytes_per_class(self, num_features: int, num_classes: int) -> int:
        """Compute the bytes of one code index, as matching stores it."""
        return ITEM_BYTES[_index_dtype(num_features, default_blocks(num_features, num_classes))]


class ReferenceHadamard(Kind):
    """The paper's own Hadamard head, as its published code builds it, for checkpoints trained with that code.

    github.com/eladhoffer/fix_your_classifier takes Sylvester's matrix of the next power of two M >= max(C, N), keeps
    the first C rows and N columns, and computes `logits = -scale * (H[:C, :N] @ (x / |x|)) + bias` (the sign is that of
    the code). In the terms of this package the code of class c is `-H[c, :N] / sqrt(N)`, and alpha is
    `sqrt(N) * scale`; `FixedClassifier` converts a scale of shape [1] when it is loaded.

    Truncated rows are not orthogonal, the all-ones row is among them, and two rows are equal if their numbers differ
    only in bits beyond the kept columns. New heads should use `hadamard`, which builds the matrix at the order N.
    """

    name = "hadamard"
    summary = "truncated Sylvester rows of the paper's published code, in class order"
    own_fields = Hadamard.own_fields  # `check` refuses them with a better message
    has_sign_codebook = True
    match_hint = "It is a trained head of the paper's published code; leave match out."

    def check(self, spec: SpecFields) -> None:
        """Check that all rows differ, and that the codes are in class order.

        Sylvester's first P rows differ in the first N columns, P the next power of two from N; further rows repeat.

        Raises:
            HeadSpecError: There is no such head.
        """
        different, c = power_of_two_from(spec.num_features), spec.num_classes
        if c > different:
            raise HeadSpecError(
                f"Cut to {spec.num_features} features, only {different} rows of a Sylvester matrix differ: of {c} "
                f"classes, class {different} would have the code of class 0, and {c - different} in all could never be "
                "told from another.",
                hint="Such a head (of the paper's published code) cannot be right. Use `--head hadamard`, which "
                "repeats no code, and train again.",
            )
        if spec.matched or spec.blocks is not None:
            raise HeadSpecError(
                f"A {REFERENCE_CONSTRUCTION} head has its codes in class order: neither matched nor blocks."
            )

    def uses_hadamard(self, spec: SpecFields) -> bool:
        """Check whether the features are multiplied with a Hadamard matrix: always."""
        return True

    def codes(
        self, spec: SpecFields, stored: ArrayLike | None = None, projection: Projection | None = None
    ) -> TruncatedRows:
        """Build the codes in class order.

        Raises:
            HeadSpecError: Stored codes are given.
        """
        import numpy as np

        from fixify.heads.codes import TruncatedRows

        if stored is not None:
            raise HeadSpecError("This head spec is not matched, so its codes are not stored; none can be given.")
        return TruncatedRows(spec.num_features, np.arange(spec.num_classes, dtype=np.int64))


class Orthogonal(Kind):
    """The paper's random orthonormal projection (section 2.2); see `fixify.heads.codes.orthogonal_codes`."""

    name = "orthogonal"
    summary = "random orthonormal rows"

    def common_cosine(self, num_features: int, num_classes: int) -> float | None:
        """Return 0 for orthonormal rows."""
        return 0.0 if num_classes <= num_features else None

    def codes(
        self, spec: SpecFields, stored: ArrayLike | None = None, projection: Projection | None = None
    ) -> RealRows:
        """Build the codes from the seed.

        Raises:
            HeadSpecError: Stored codes are given.
        """
        from fixify.heads.codes import RealRows, orthogonal_codes

        self._refuse_stored(stored)
        return RealRows(orthogonal_codes(spec.num_features, spec.num_classes, spec.seed))


class Simplex(Kind):
    """An equiangular tight frame: C <= N + 1 codes with all cosines -1/(C - 1)."""

    name = "simplex"
    summary = "corners of a regular simplex"

    def check(self, spec: SpecFields) -> None:
        """Check that there are at most N + 1 classes.

        Raises:
            HeadSpecError: There are more.
        """
        if spec.num_classes > spec.num_features + 1:
            raise HeadSpecError(
                f"A simplex in {counted(spec.num_features, 'feature')} has at most "
                f"{spec.num_features + 1:,} corners, got {counted(spec.num_classes, 'class', 'classes')}.",
                hint="Use `--head hadamard` or `--head orthogonal`.",
            )

    def common_cosine(self, num_features: int, num_classes: int) -> float | None:
        """Return -1/(C - 1), Rankin's bound."""
        return -1.0 / (num_classes - 1) if num_classes > 1 else None

    def codes(
        self, spec: SpecFields, stored: ArrayLike | None = None, projection: Projection | None = None
    ) -> RealRows:
        """Build the codes from the seed.

        Raises:
            HeadSpecError: Stored codes are given.
        """
        from fixify.heads.codes import RealRows, simplex_codes

        self._refuse_stored(stored)
        return RealRows(simplex_codes(spec.num_features, spec.num_classes, spec.seed))


class Binary(Kind):
    """Signs of the classifier being replaced, one bit per weight or fewer; or finer levels of it; stored packed.

    Not in the paper, whose codes do not depend on what they replace. With `bits_per_class` d < N the signs are those of
    the first d coordinates of rotated features. At d = N the features are rotated too where a Hadamard matrix of order
    N is known, and taken as they are elsewhere. With `bits_per_weight` there is a level per coordinate, at d = N. With
    `planes` the d signs are those of fewer coordinates, to which a stored projection maps the features.
    `fixify.heads.encoding.encode` chooses signs and levels.
    """

    name = "binary"
    summary = "signs of the old classifier"
    own_fields = frozenset({"bits_per_class", "bits_per_weight", "planes"})
    max_entries = MAX_SIGNS
    needs_classifier = True
    stored_noun = "signs"
    match_hint = "A binary head takes its signs from the old classifier anyway."

    def check(self, spec: SpecFields) -> None:
        """Check that d is between 1 and N, that d signs can tell the classes apart, and that a rotation exists.

        Raises:
            HeadSpecError: There is no such head.
        """
        bits, n = spec.bits_per_class, spec.num_features
        if spec.bits_per_weight is not None:
            self._check_levels(spec)
            return
        if type(bits) is not int or not 1 <= bits <= n:
            raise HeadSpecError(
                f"bits_per_class must be an integer from 1 to the {counted(n, 'feature')}, got {bits!r}."
            )
        if spec.num_classes > 2 ** min(bits, 63):
            raise HeadSpecError(
                f"There are only {2**bits:,} different codes of {counted(bits, 'sign')}, got "
                f"{counted(spec.num_classes, 'class', 'classes')}.",
                hint="Use more `--bits-per-class`.",
            )
        if spec.planes is not None:
            self._check_planes(spec, spec.planes)
        if self.uses_hadamard(spec):
            try:
                construction_of(spec)
            except HeadSpecError as error:
                raise HeadSpecError(
                    f"Fewer signs than features are taken of rotated features. {error.message}",
                    hint=f"Leave out `--bits-per-class`: of all {n} features signs can be taken as they are.",
                ) from error

    def _check_levels(self, spec: SpecFields) -> None:
        bits = spec.bits_per_weight
        if bits is None or type(bits) not in (int, float) or bits not in LEVELS:
            raise HeadSpecError(
                f"bits_per_weight must be one of {', '.join(map(str, LEVELS))}, got {bits!r}.",
                hint="One bit per weight is `bits_per_class` = the number of features, and fewer are less.",
            )
        if spec.bits_per_class is not None:
            raise HeadSpecError("bits_per_class counts signs, and bits_per_weight asks for levels; give one of them.")
        if not spec.gains:
            raise HeadSpecError("Levels need the step size of each class: a spec with bits_per_weight has gains.")
        if spec.planes is not None:
            raise HeadSpecError("planes divides the signs of bits_per_class, and bits_per_weight has none; drop one.")
        values = len(LEVELS[bits].values)
        if spec.num_features < 64 and spec.num_classes > values**spec.num_features:
            raise HeadSpecError(
                f"There are only {values**spec.num_features:,} different codes of "
                f"{counted(spec.num_features, 'level')}, got {counted(spec.num_classes, 'class', 'classes')}.",
                hint="Use more `--bits-per-weight`.",
            )

    def _check_planes(self, spec: SpecFields, planes: Any) -> None:
        n = spec.num_features
        if not (
            type(planes) is tuple
            and 1 <= len(planes) <= len(PLANES)
            and all(type(plane) is int and 1 <= plane <= n for plane in planes)
            and list(planes) == sorted(planes, reverse=True)
        ):
            raise HeadSpecError(
                f"planes must be 1 to {len(PLANES)} integers from {n} to 1 that do not increase, got {planes!r:.100}."
            )
        if sum(planes) != spec.bits_per_class:
            raise HeadSpecError(
                f"The planes have {sum(planes)} signs together, and bits_per_class says {spec.bits_per_class}."
            )
        if not spec.gains:
            raise HeadSpecError("Levels need the step size of each class: a spec with planes has gains.")
        if sum(planes) * n > MAX_DENSE_NUMBERS:
            raise HeadSpecError(
                f"A projection of {n:,} features for {sum(planes):,} signs is beyond the limit of "
                f"{MAX_DENSE_NUMBERS:,} entries."
            )

    def levels(self, spec: SpecFields) -> Levels:
        """Return the levels that a spec's weights have: signs, unless it has `bits_per_weight`."""
        return SIGNS if spec.bits_per_weight is None else LEVELS[spec.bits_per_weight]

    def uses_hadamard(self, spec: SpecFields) -> bool:
        """Check whether the features are rotated: for d < N, and for d = N where the matrix is known."""
        if spec.planes is not None:
            return False
        return self._num_signs(spec) != spec.num_features or is_constructible(spec.num_features)

    def resolved_fields(self, spec: SpecFields) -> dict[str, Any]:
        """Return the construction of the rotation, if there is one."""
        return {"construction": format_construction(construction_of(spec))} if self.uses_hadamard(spec) else {}

    def stored_codes(self, spec: SpecFields) -> StoredTensor:
        """Describe the packed signs or levels: uint8 [C, bytes], ceil(d / 8) for signs."""
        return StoredTensor("codes", (spec.num_classes, self.levels(spec).num_bytes(self._num_signs(spec))), "uint8")

    def stored_projection(self, spec: SpecFields) -> tuple[StoredTensor, ...]:
        """Describe the directions and steps of the projection of a spec with `planes`."""
        if spec.planes is None:
            return ()
        d = spec.planes[0]
        return StoredTensor("projection", (d, spec.num_features), "int8"), StoredTensor("projection_steps", (d,))

    def rotation(self, spec: SpecFields) -> Rotation | None:
        """Return the rotation of the features, or None if they are taken as they are."""
        from fixify.heads.codes import Rotation

        if not self.uses_hadamard(spec):
            return None
        return Rotation(construction_of(spec), spec.seed, self._num_signs(spec))

    def codes(
        self, spec: SpecFields, stored: ArrayLike | None = None, projection: Projection | None = None
    ) -> StoredSigns | StoredLevels:
        """Build the codes from the stored packed signs or levels, and the projection of a spec with `planes`.

        Raises:
            HeadSpecError: They are missing or do not fit.
        """
        import numpy as np

        from fixify.heads.codes import StoredLevels, StoredSigns

        if stored is None:
            raise HeadSpecError("A binary head needs its stored signs; none were given.")
        packed, count, shape = np.ascontiguousarray(stored), self._num_signs(spec), self.stored_codes(spec).shape
        if packed.shape != shape or packed.dtype != np.uint8:
            raise HeadSpecError(f"Expected packed signs uint8 {list(shape)}, got {packed.dtype} {list(packed.shape)}.")
        levels = self.levels(spec)
        if levels.num_planes:
            last = packed[:, shape[1] // levels.num_planes - 1 :: shape[1] // levels.num_planes]
            if count % 8 and bool((last & (0xFF >> count % 8)).any()):
                raise HeadSpecError("The unused bits of packed signs must be 0.")
        else:
            rest = count % TRITS_PER_BYTE
            if bool((packed >= 3**TRITS_PER_BYTE).any()) or (rest and bool((packed[:, -1] >= 3**rest).any())):
                raise HeadSpecError("Each byte of packed ternary levels holds five digits, and unused ones must be 0.")
        if levels is SIGNS:
            coordinates = self.rotation(spec) if spec.planes is None else self._checked_projection(spec, projection)
            return StoredSigns(spec.num_features, count, packed, coordinates)
        return StoredLevels(spec.num_features, levels, packed, self.rotation(spec))

    def _checked_projection(self, spec: SpecFields, projection: Projection | None) -> Projection:
        if projection is None:
            raise HeadSpecError("This binary head needs its stored projection; none was given.")
        if projection.planes != spec.planes or projection.directions.shape[1] != spec.num_features:
            raise HeadSpecError(
                f"Expected a projection of {spec.num_features} features with planes {spec.planes}, got one of "
                f"{projection.directions.shape[1]} with {projection.planes}."
            )
        return projection

    def num_stored_signs(self, spec: SpecFields) -> int:
        """Count the signs or levels stored in all classes together."""
        return self._num_signs(spec) * spec.num_classes

    def description(self, spec: SpecFields) -> str:
        """Describe the signs or levels and their size, as "88 bits per class (12 bytes with its length)"."""
        size, length = counted(self.bytes_per_class(spec), "byte"), " with its length" if spec.gains else ""
        if spec.bits_per_weight is not None:
            return f"{spec.bits_per_weight:g} bits per weight ({size} per class{length})"
        if spec.planes is not None:
            number = counted(self._num_signs(spec), "bit")
            return (
                f"{number} per class in {counted(spec.planes[0], 'projected coordinate')} ({size}{length} and its "
                "share of the projection)"
            )
        return f"{counted(self._num_signs(spec), 'bit')} per class ({size}{length})"

    def default_options(
        self,
        num_features: int,
        *,
        has_features: bool,
        bits_per_weight: float | None = None,
        bits_per_class: int | None = None,
    ) -> dict[str, Any]:
        """Return a sign or level per feature, stored row scales, and normalisation only of fewer signs with features.

        The old logits are nearest when the features are left as they are: their norm belongs to the logits' size. The
        errors of few signs grow with it too (2,965 kanji, N = 256, 64 signs: 68.0 % of the answers kept with the norm
        divided out, 64.7 without; one sign per weight: the other way round). With features only the mean is removed: a
        std from few scenes would amplify the features that these scenes happen not to use.
        """
        levels = bits_per_weight not in (None, 1)
        return {
            "gains": True,
            "bits_per_class": None if levels else bits_per_class or num_features,
            "bits_per_weight": bits_per_weight if levels else None,
            "normalize": has_features and (bits_per_class or num_features) < num_features,
            "standardize": "center" if has_features else False,
        }

    def planned_bytes_per_class(self, num_features: int, num_classes: int) -> int:
        """Compute the bytes of one sign per feature and the row scale."""
        return -(-num_features // 8) + 1

    @staticmethod
    def _num_signs(spec: SpecFields) -> int:
        return spec.bits_per_class or spec.num_features


class Identity(Kind):
    """Class c reads feature c: the classifier deleted, as in Qian et al., arXiv:2004.13587. A control.

    There is no multiplication and nothing to store; the backbone has to learn everything.
    """

    name = "identity"
    summary = "class c reads feature c"

    def check(self, spec: SpecFields) -> None:
        """Check that there are at most N classes.

        Raises:
            HeadSpecError: There are more.
        """
        if spec.num_classes > spec.num_features:
            raise HeadSpecError(
                f"An identity head reads one feature per class: {counted(spec.num_features, 'feature')} for at most "
                f"{counted(spec.num_features, 'class', 'classes')}, got {spec.num_classes:,}.",
                hint="Use `--head hadamard` or `--head orthogonal`.",
            )

    def common_cosine(self, num_features: int, num_classes: int) -> float | None:
        """Return 0 for rows of the identity."""
        return 0.0

    def codes(
        self, spec: SpecFields, stored: ArrayLike | None = None, projection: Projection | None = None
    ) -> FeatureRows:
        """Build the codes: the first C rows of the identity.

        Raises:
            HeadSpecError: Stored codes are given.
        """
        from fixify.heads.codes import FeatureRows

        self._refuse_stored(stored)
        return FeatureRows(spec.num_features, spec.num_classes)


BINARY = Binary()
REFERENCE_HADAMARD = ReferenceHadamard()
KINDS: Mapping[str, Kind] = MappingProxyType(
    {kind.name: kind for kind in (Hadamard(), Orthogonal(), Simplex(), BINARY, Identity())}
)
"""The kinds that a user can choose, by name. `REFERENCE_HADAMARD` is not among them: it only comes from checkpoints."""


def kind_of(spec: SpecFields) -> Kind:
    """Return the kind of a spec; `spec.kind` must be a name in `KINDS`."""
    if spec.kind == Hadamard.name and spec.construction == REFERENCE_CONSTRUCTION:
        return REFERENCE_HADAMARD
    return KINDS[spec.kind]


def construction_of(spec: SpecFields) -> Construction:
    """Return the Hadamard matrix of a spec: the one it records, or the one this version would choose.

    Raises:
        HeadSpecError: There is no such matrix.
    """
    if spec.construction is not None:
        return parse_construction(spec.construction, spec.num_features)
    return factorise(spec.num_features)


def codebook(spec: SpecFields, codes: ArrayLike | None = None, projection: Projection | None = None) -> np.ndarray:
    """Build all codes of a head, one unit-norm row per class, for export and analysis.

    The forward pass does not need it.

    Args:
        spec: The head spec.
        codes: What the head stores, if anything: code index of each class, integers [C], if matched; packed signs if
            binary.
        projection: The projection that the head stores, if any; its codes are then of other norms.

    Returns:
        float32 [C, N].

    Raises:
        HeadSpecError: `codes` is missing, superfluous or does not fit.

    >>> from fixify.heads import HeadSpec
    >>> codebook(HeadSpec("hadamard", num_features=4, num_classes=2))
    array([[ 0.5, -0.5,  0.5, -0.5],
           [ 0.5,  0.5, -0.5, -0.5]], dtype=float32)
    """
    return kind_of(spec).codes(spec, codes, projection).table()


def min_blocks(num_features: int, num_classes: int) -> int:
    """Count the blocks of 2N codes that C classes need."""
    return -(-num_classes // (2 * num_features))


def default_codes(num_features: int, num_classes: int) -> np.ndarray:
    """Return the code indices of an unmatched `hadamard` head, in class order: int64 [C].

    With fewer classes than features these are rows 1 .. C: features are non-negative after ReLU and pooling, so the
    all-ones row 0 would take most of every feature vector. Otherwise class c has index c: the rows, their negatives,
    the next block.
    """
    import numpy as np

    return np.arange(num_classes, dtype=np.int64) + (1 if num_classes < num_features else 0)


def default_blocks(num_features: int, num_classes: int) -> int:
    """Return the number of blocks that `match` searches by default.

    For C > N these are as few as leave each class about two codes to choose from, so the fast product stays: one
    transform per block.
    """
    n, c = num_features, num_classes
    if c <= n:
        return max(1, min(SHARED_BLOCKS, (1 << 16) // (2 * n)))
    return -(-c // n)


def wide_blocks(num_features: int, num_classes: int) -> int:
    """Return the number of blocks of the wide search: thousands for C > N.

    The codes are nearer to the old class vectors, but they lie in so many blocks that features are multiplied with the
    whole codebook. What that changes is measured in tests/benchmarks/README.md ("500 characters: the demo").
    """
    n, c = num_features, num_classes
    few = default_blocks(n, c)
    return few if c <= n else max(few, min(SEARCH_BLOCKS, _SEARCHED_COSINES // (c * n)))


def _index_dtype(num_features: int, blocks: int) -> str:
    """Name the smallest unsigned integer type that holds every index of the code space."""
    last = 2 * num_features * blocks - 1
    return "uint8" if last < 1 << 8 else "uint16" if last < 1 << 16 else "uint32"
