"""The head spec: the small record from which a fixed classifier is rebuilt.

Importing this module needs no NumPy, so that reading the header of a file is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fixify._values import counted
from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads.base_kind import VERSION, SpecFields, StoredTensor
from fixify.heads.constructions import MAX_ORDER, has_kerdock_set, is_constructible
from fixify.heads.kinds import KINDS, REFERENCE_HADAMARD, kind_of, min_blocks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from fixify.heads.projection import Projection

# Head specs come from files; these are limits like those in `fixify.heads.kinds`.
MAX_FEATURES = MAX_ORDER
MAX_CLASSES = 1 << 24
MAX_BLOCKS = 1 << 16

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sketch:-?[0-9]{1,8}\.[0-9]{5}(,-?[0-9]{1,8}\.[0-9]{5}){31}")
_UNSET = {
    "matched": False,
    "blocks": None,
    "bits_per_class": None,
    "bits_per_weight": None,
    "planes": None,
}  # the fields that belong to some kinds only


AVERAGE_WITHOUT_BUFFERS = (
    "Average without buffers: torch's AveragedModel(model, use_buffers=False), or timm's ModelEmaV3."
)
DAMAGED_CODES = (
    "The file is damaged or was edited, or another program wrote it. Convert the original again. If the weights are a "
    f"moving average, the codes may have been averaged too. {AVERAGE_WITHOUT_BUFFERS}"
)
"""What to do if stored codes are not those that a head was written for."""


@dataclass(frozen=True)
class HeadSpec(SpecFields):
    """A fixed classifier in a few bytes. Every instance is valid: the fields are checked when it is made.

    Questions about the kind of head are answered by the properties, so callers need not compare `kind`.

    Args:
        kind: A name in `KINDS`: "hadamard", "orthogonal", "simplex", "binary" or "identity".
        num_features: Width N of the last representation.
        num_classes: Number of classes C.
        seed: Seed of everything random in the codebook, 0 <= seed < 2^64.
        normalize: Whether features are divided by their L2 norm, per sample (paper, equation 1).
        bias: Whether each class has a learned bias.
        standardize: Whether features are standardised first, with running statistics that are stored: True: with mean
            and std; "center": only the mean is subtracted.
        fixed_scale: Whether the scale alpha is a buffer instead of a parameter.
        matched: Whether the code index of each class is stored (`codes`); else it follows from the class number.
        blocks: Number of sign-flipped Hadamard blocks in the code space; None: as few as the classes need.
        bits_per_class: Number of signs d per class of a `binary` head, 1 <= d <= N; None for other kinds.
        bits_per_weight: Levels of a `binary` head instead of signs, one per feature: 1.58 (-1, 0, 1), 2, 3 or 4 bits.
            Such a head has no `bits_per_class`, and has `gains`.
        planes: With a stored projection of the features (a `binary` head with `gains`): how many of the projected
            coordinates have a first sign, a second, ... up to a sixth. Their sum is `bits_per_class`.
        gains: Whether a row scale, the length of the class's code, is stored per class, in one byte (`gains`); else all
            codes have length 1.
        version: Version of this record.
        construction: How the Hadamard matrix is built, for example "sylvester-64*paley1-20"; None: filled in by
            `resolve`. "truncated-sylvester": the codes of the paper's published code
            (`fixify.heads.kinds.ReferenceHadamard`).
        digest: Fingerprint of the codebook ("sha256:..." or "sketch:..."); None: filled in by `resolve`.

    Raises:
        HeadSpecError: A value has the wrong type or is out of range, or values contradict each other.

    >>> spec = HeadSpec("binary", num_features=256, num_classes=1000, bits_per_class=88, gains=True)
    >>> spec.description
    '88 bits per class (12 bytes with its length)'
    >>> HeadSpec.from_dict(spec.to_dict()) == spec
    True
    """

    def __post_init__(self) -> None:
        if type(self.planes) is list:  # JSON has no tuples
            object.__setattr__(self, "planes", tuple(self.planes))
        self._check_types()
        self._check_sizes()
        kind = kind_of(self)
        for name, unset in _UNSET.items():
            if name not in kind.own_fields and getattr(self, name) is not unset:
                owner = next(other.name for other in KINDS.values() if name in other.own_fields)
                raise HeadSpecError(f"{name} belongs to kind {owner!r}, not {self.kind!r}.")
        kind.check(self)
        if self.construction is not None and not kind.uses_hadamard(self):
            raise HeadSpecError("A construction belongs to a head that multiplies with a Hadamard matrix.")

    def _check_types(self) -> None:
        if type(self.version) is not int or self.version < 1:
            raise HeadSpecError(f"The version of a head spec is a positive integer, got {self.version!r}.")
        if self.version > VERSION:
            raise _too_new(self.version)
        if type(self.kind) is not str or self.kind not in KINDS:
            raise HeadSpecError(
                f"Unknown kind of head {self.kind!r}; known: {', '.join(KINDS)}.{_did_you_mean(self.kind, KINDS)}"
            )
        if self.standardize != "center" and type(self.standardize) is not bool:
            raise HeadSpecError(f'standardize must be true, false or "center", got {self.standardize!r}.')
        for name in ("normalize", "bias", "fixed_scale", "matched", "gains"):
            if type(getattr(self, name)) is not bool:
                raise HeadSpecError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if self.construction is not None and type(self.construction) is not str:
            raise HeadSpecError(f"construction must be a string, got {self.construction!r}.")
        if self.digest is not None and not (type(self.digest) is str and _DIGEST.fullmatch(self.digest)):
            raise HeadSpecError(f"Not a codebook digest: {str(self.digest)[:60]!r}.")

    def _check_sizes(self) -> None:
        for name, low, high in (
            ("num_features", 1, MAX_FEATURES),
            ("num_classes", 1, MAX_CLASSES),
            ("seed", 0, 2**64 - 1),
            ("blocks", 1, MAX_BLOCKS),
        ):
            value = getattr(self, name)
            if name == "blocks" and value is None:
                continue
            if type(value) is not int or not low <= value <= high:
                raise HeadSpecError(f"{name} must be an integer from {low} to {high}, got {value!r}.")
        limit = kind_of(self).max_entries
        if self.num_features * self.num_classes > limit:
            raise HeadSpecError(
                f"A {self.kind} codebook of {counted(self.num_classes, 'class', 'classes')} by "
                f"{counted(self.num_features, 'feature')} is beyond the limit of {limit:,} entries."
            )

    @property
    def stores_codes(self) -> bool:
        """Whether the codes do not follow from the spec alone: code indices are stored, or signs."""
        return self.stored_codes is not None

    @property
    def stored_codes(self) -> StoredTensor | None:
        """The stored tensor `codes`, or None if the codes follow from the spec alone."""
        return kind_of(self).stored_codes(self)

    @property
    def stored_tensors(self) -> tuple[StoredTensor, ...]:
        """All tensors that a head of this spec keeps in a state dict."""
        c, n = (self.num_classes,), (self.num_features,)
        tensors = [
            StoredTensor("scale", ()),
            StoredTensor("bias", c) if self.bias else None,
            StoredTensor("center", n) if self.standardize else None,
            StoredTensor("spread", n) if self.standardize is True else None,
            StoredTensor("num_batches_tracked", (), "int64") if self.standardize else None,
            self.stored_codes,
            StoredTensor("gains", c, "uint8") if self.gains else None,
            *kind_of(self).stored_projection(self),
        ]
        return tuple(tensor for tensor in tensors if tensor is not None)

    @property
    def row_scales(self) -> bool:
        """Whether a row scale per class is stored; the field and the stored tensor are called `gains`."""
        return self.gains

    @property
    def bytes_per_class(self) -> int:
        """Bytes stored per class: code, row scale, share of a projection; 0 if codes are rebuilt from the spec."""
        return kind_of(self).bytes_per_class(self)

    @property
    def num_stored_signs(self) -> int:
        """Number of signs, or of levels, stored in all classes together; 0 if none are stored."""
        return kind_of(self).num_stored_signs(self)

    @property
    def description(self) -> str:
        """The codes and their size in words, for example "88 bits per class (12 bytes with its length)"."""
        return kind_of(self).description(self)

    @property
    def is_reference(self) -> bool:
        """Whether the codes are those of the paper's published code (truncated Sylvester rows)."""
        return kind_of(self) is REFERENCE_HADAMARD

    @property
    def can_match(self) -> bool:
        """Whether the code of each class can be chosen by matching with an old classifier."""
        return kind_of(self).can_match

    @property
    def match_hint(self) -> str:
        """What to do instead of matching where `can_match` is false."""
        return kind_of(self).match_hint

    @property
    def needs_classifier(self) -> bool:
        """Whether the codes are derived from an old classifier, so there are none without it."""
        return kind_of(self).needs_classifier

    @property
    def can_fit(self) -> bool:
        """Whether `replacement` can choose the codes by an old classifier."""
        return kind_of(self).can_fit

    @property
    def has_sign_codebook(self) -> bool:
        """Whether all codes are +-1/sqrt(N), so that the codebook is exact in integers."""
        return kind_of(self).has_sign_codebook

    def resolve(self, codes: ArrayLike | None = None, projection: Projection | None = None) -> HeadSpec:
        """Fill in construction, blocks and digest, and verify those that are given.

        Args:
            codes: What the head stores: code index of each class, integers [C], if matched; packed signs, uint8
                [C, ceil(d / 8)], if binary. Without them the digest, which covers them, is neither filled in nor
                verified.
            projection: The projection that the head stores, if any. The digest covers its directions.

        Raises:
            CodebookMismatchError: The codebook of this spec, built here, is not the one it was written for.
            HeadSpecError: Two classes have the same code, or `codes` does not fit.
        """
        from fixify.heads.codes import same_digest

        kind = kind_of(self)
        spec = dataclasses.replace(self, **kind.resolved_fields(self))
        if spec.stores_codes and codes is None:
            return spec
        try:
            digest = kind.codes(spec, codes, projection).digest()
        except HeadSpecError as error:
            if self.digest is None or not spec.stores_codes:
                raise
            raise HeadSpecError(error.message, hint=DAMAGED_CODES) from error
        if self.digest is None:
            return dataclasses.replace(spec, digest=digest)
        if not same_digest(self.digest, digest, self.num_classes):
            what = f"stored {kind.stored_noun} are" if spec.stores_codes else "codebook is"
            raise CodebookMismatchError(
                f"The {what} not what this head was written for: the spec says {self.digest[:30]}..., rebuilt here: "
                f"{digest[:30]}...",
                hint=DAMAGED_CODES,
            )
        return spec

    def to_dict(self) -> dict[str, Any]:
        """Write the spec as a JSON-safe dictionary.

        Fields that are None are left out, and `gains` if it is false, so that older readers know all keys.
        """
        entries = dataclasses.asdict(self)
        if self.planes is not None:
            entries["planes"] = list(self.planes)
        return {key: value for key, value in entries.items() if value is not None and (key, value) != ("gains", False)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadSpec:
        """Read what `to_dict` wrote. The data is checked strictly, since it may come from a file.

        Raises:
            HeadSpecError: An unknown or missing key, an unknown kind or version, or a bad value.
        """
        if not isinstance(data, Mapping):
            raise HeadSpecError(f"A head spec is a JSON object, got {type(data).__name__}.")
        version = data.get("version", VERSION)
        if type(version) is int and version > VERSION:  # before the keys: a newer version may have new ones
            raise _too_new(version)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise HeadSpecError(f"Unknown entry {str(key)[:60]!r} in a head spec.{_did_you_mean(key, known)}")
        missing = [key for key in ("kind", "num_features", "num_classes") if key not in data]
        if missing:
            raise HeadSpecError(f"A head spec needs {', '.join(missing)}.")
        return cls(**data)


def choose_kind(num_features: int, num_classes: int) -> tuple[str, str]:
    """Choose the kind of head that `--head auto` stands for.

    Returns:
        "hadamard" or "orthogonal", and the reason as a sentence.

    >>> choose_kind(386, 1000)
    ('orthogonal', 'no Hadamard matrix of order 386 is known here')
    """
    n, c = num_features, num_classes
    if not is_constructible(n):
        return "orthogonal", f"no Hadamard matrix of order {n} is known here"
    structured = c <= (n**2 if has_kerdock_set(n) else 2 * n)
    if not structured and c**2 > 2 ** max(n - 10, 0):  # seeded blocks may repeat a code: the birthday problem
        return "orthogonal", f"{c:,} random codes of only {counted(n, 'sign')} are likely to repeat one"
    if c <= n:
        fit = "1 class fits" if c == 1 else f"{c:,} classes fit"
        return "hadamard", f"{fit} into one Hadamard matrix of order {n}: orthogonal"
    if c <= 2 * n:
        return "hadamard", f"{c:,} classes are +-rows of one Hadamard matrix of order {n}"
    return "hadamard", f"{c:,} classes are +-rows of {min_blocks(n, c)} Hadamard matrices of order {n}"


def _too_new(version: int) -> HeadSpecError:
    return HeadSpecError(
        f"This head spec is of version {version}; this fixify knows up to {VERSION}.",
        hint="Upgrade it: pip install --upgrade fixify",
    )


def _did_you_mean(name: object, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(name)[:60], list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
