"""The head spec: the small record from which a fixed classifier is rebuilt."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import ArrayLike

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import dense
from fixify.heads.blocks import construction_of
from fixify.heads.codebooks import fingerprint, min_blocks
from fixify.heads.kerdock import has_kerdock_set
from fixify.heads.matrices import MAX_ORDER, format_construction, is_constructible
from fixify.heads.truncated import TRUNCATED, refuse_duplicate_rows

KINDS = ("hadamard", "orthogonal", "simplex", "binary")
VERSION = 1

# Head specs come from files. These bounds keep a hostile one from filling the memory or the day.
MAX_FEATURES = MAX_ORDER
MAX_CLASSES = 1 << 24
MAX_BLOCKS = 1 << 16
MAX_SIGNS = 1 << 34
MAX_DENSE_NUMBERS = 1 << 27

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sketch:-?[0-9]{1,8}\.[0-9]{5}(,-?[0-9]{1,8}\.[0-9]{5}){31}")


@dataclass(frozen=True)
class HeadSpec:
    """A fixed classifier, in a few bytes.

    Args:
        kind: "hadamard", "orthogonal", "simplex" or "binary".
        num_features: Width N of the last representation.
        num_classes: Number of classes C.
        seed: Seed of everything random in the codebook, 0 <= seed < 2^64.
        normalize: Per-sample L2 norm of the features (paper, equation 1).
        bias: Learned bias of each class.
        standardize: Features are first centered and divided by their deviation (running statistics, stored). "center":
            they are only centered.
        fixed_scale: The scale alpha is a buffer instead of a parameter.
        matched: The code index of each class is stored (`codes`); otherwise it follows from the class number.
        blocks: Sign-flipped Hadamard blocks in the code space; None: as few as the classes need.
        bits_per_class: Length d of the codes of a `binary` head, 1 <= d <= N; None for other kinds.
        gains: The length of every class's code is stored too, in one byte (`gains`); otherwise all have length 1.
        version: Version of this record.
        construction: How the Hadamard matrix is built, for example "sylvester-64*paley1-20"; None: filled in by
            `resolve`. "truncated-sylvester": the codes of the paper's published code (`fixify.heads.truncated`).
        digest: Fingerprint of the codebook ("sha256:..." or "sketch:..."); None: filled in by `resolve`.

    Raises:
        HeadSpecError: A value of the wrong type or out of range, or values that do not go together.
    """

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
    gains: bool = False
    version: int = VERSION
    construction: str | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_sizes()
        if self.kind == "hadamard":
            self._check_hadamard()
        elif self.matched or self.blocks is not None:
            raise HeadSpecError(f"matched and blocks belong to kind 'hadamard', not {self.kind!r}.")
        if self.kind == "binary":
            self._check_binary()
        elif self.bits_per_class is not None:
            raise HeadSpecError(f"bits_per_class belongs to kind 'binary', not {self.kind!r}.")
        if self.construction is not None and not self.needs_matrix:
            raise HeadSpecError("A construction belongs to a head that multiplies with a Hadamard matrix.")
        if self.kind == "simplex" and self.num_classes > self.num_features + 1:
            raise HeadSpecError(
                f"A simplex in {self.num_features} features has at most {self.num_features + 1} corners, got "
                f"{self.num_classes} classes.",
                hint="Use `--head hadamard` or `--head orthogonal`.",
            )

    def _check_types(self) -> None:
        if type(self.version) is not int or self.version < 1:
            raise HeadSpecError(f"The version of a head spec is a positive integer, got {self.version!r}.")
        if self.version > VERSION:
            raise HeadSpecError(
                f"This head spec is of version {self.version}; this fixify knows up to {VERSION}.",
                hint="Upgrade it: pip install --upgrade fixify",
            )
        if self.kind not in KINDS:
            raise HeadSpecError(f"Unknown kind of head {self.kind!r}; known: {', '.join(KINDS)}.{_nearest(self.kind)}")
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
        signs = self.kind in ("hadamard", "binary") and not self.truncated
        limit = MAX_SIGNS if signs else MAX_DENSE_NUMBERS
        if self.num_features * self.num_classes > limit:
            raise HeadSpecError(
                f"A {self.kind} codebook of {self.num_classes} classes by {self.num_features} features is beyond the "
                f"limit of {limit} entries."
            )

    def _check_truncated(self) -> None:
        refuse_duplicate_rows(self.num_features, self.num_classes)
        if self.matched or self.blocks is not None:
            raise HeadSpecError(f"A {TRUNCATED} head has its codes in class order: neither matched nor blocks.")

    def _check_hadamard(self) -> None:
        if self.truncated:
            self._check_truncated()
            return
        construction_of(self)  # raises if there is no such matrix
        if self.num_features < 64 and self.num_classes > 2**self.num_features:
            raise HeadSpecError(
                f"There are only {2**self.num_features} different codes of {self.num_features} signs, got "
                f"{self.num_classes} classes.",
                hint="Use `--head orthogonal`.",
            )
        needed = min_blocks(self.num_features, self.num_classes)
        if self.matched:
            if self.blocks is None or self.blocks < needed:
                raise HeadSpecError(f"A matched head of this size needs blocks >= {needed}, got {self.blocks}.")
            if 2 * self.num_features * self.blocks > 2**32:
                raise HeadSpecError(f"{self.blocks} blocks of {2 * self.num_features} codes are more than 2^32 codes.")
        elif self.blocks not in (None, needed):
            raise HeadSpecError(f"An unmatched head of this size has {needed} block(s), got {self.blocks}.")

    def _check_binary(self) -> None:
        bits, n = self.bits_per_class, self.num_features
        if type(bits) is not int or not 1 <= bits <= n:
            raise HeadSpecError(f"bits_per_class must be an integer from 1 to the {n} features, got {bits!r}.")
        if self.num_classes > 2 ** min(bits, 63):
            raise HeadSpecError(
                f"There are only {2**bits} different codes of {bits} signs, got {self.num_classes} classes.",
                hint="Use more `--bits-per-class`.",
            )
        if self.needs_matrix:
            try:
                construction_of(self)
            except HeadSpecError as error:
                raise HeadSpecError(
                    f"Fewer signs than features are taken of rotated features. {error.message}",
                    hint=f"Leave out `--bits-per-class`: of all {n} features signs can be taken as they are.",
                ) from error

    @property
    def stores_codes(self) -> bool:
        """Whether the class codes cannot be had from the spec alone: code indices if matched, signs if binary."""
        return self.matched or self.kind == "binary"

    @property
    def truncated(self) -> bool:
        """Whether its codes are rows of a larger matrix that are cut to N columns, as in the paper's published code."""
        return self.kind == "hadamard" and self.construction == TRUNCATED

    @property
    def needs_matrix(self) -> bool:
        """Whether features are multiplied with a Hadamard matrix: as codes, or to rotate before signs are taken.

        At d = N signs can be taken of the features themselves, and are where no matrix of that order is known.
        """
        binary = self.kind == "binary"
        return self.kind == "hadamard" or (
            binary and (self.bits_per_class != self.num_features or is_constructible(self.num_features))
        )

    def resolve(self, codes: ArrayLike | None = None) -> HeadSpec:
        """This spec with construction, blocks and digest filled in; what was given already is verified.

        Args:
            codes: What the head stores: code index of each class, integers [C], if matched; packed signs, uint8
                [C, ceil(d / 8)], if binary. Without them the digest, which covers them, is left and not verified.

        Raises:
            CodebookMismatchError: The codebook that this spec gives here is not the one it was written for.
            HeadSpecError: Two classes have the same code, or `codes` does not fit.
        """
        spec = self
        if self.needs_matrix and not self.truncated:
            spec = dataclasses.replace(spec, construction=format_construction(construction_of(self)))
        if self.kind == "hadamard" and not self.truncated:
            spec = dataclasses.replace(spec, blocks=self.blocks or min_blocks(self.num_features, self.num_classes))
        if spec.stores_codes and codes is None:
            return spec
        digest = fingerprint(spec, codes)
        if self.digest is None:
            return dataclasses.replace(spec, digest=digest)
        if not _same_digest(self.digest, digest, self.num_classes):
            stored = "signs are" if spec.kind == "binary" else "code indices are"
            what = f"stored {stored}" if spec.stores_codes else "codebook is"
            raise CodebookMismatchError(
                f"The {what} not what this head was written for: the spec says {self.digest[:30]}..., rebuilt here: "
                f"{digest[:30]}...",
                hint="The file is damaged or was edited, or another program wrote it. Convert the original again.",
            )
        return spec

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe dictionary; unset (None) entries are left out, and `gains` if there are none (older readers)."""
        entries = dataclasses.asdict(self)
        return {key: value for key, value in entries.items() if value is not None and (key, value) != ("gains", False)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeadSpec:
        """The spec that `to_dict` wrote. Checked strictly, since it may come from a file.

        Raises:
            HeadSpecError: An unknown or missing key, an unknown kind or version, or a bad value.
        """
        if not isinstance(data, Mapping):
            raise HeadSpecError(f"A head spec is a JSON object, got {type(data).__name__}.")
        version = data.get("version", VERSION)
        if type(version) is int and version > VERSION:  # before the keys: a newer version may have new ones
            raise HeadSpecError(
                f"This head spec is of version {version}; this fixify knows up to {VERSION}.",
                hint="Upgrade it: pip install --upgrade fixify",
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise HeadSpecError(f"Unknown entry {str(key)[:60]!r} in a head spec.{_nearest(key, known)}")
        missing = [key for key in ("kind", "num_features", "num_classes") if key not in data]
        if missing:
            raise HeadSpecError(f"A head spec needs {', '.join(missing)}.")
        return cls(**data)


def _nearest(name: object, known: tuple[str, ...] | list[str] = KINDS) -> str:
    matches = difflib.get_close_matches(str(name)[:60], known, n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _same_digest(first: str, second: str, num_classes: int) -> bool:
    if first.startswith("sketch:") and second.startswith("sketch:"):
        return dense.same_sketch(first, second, num_classes)
    return first == second


def choose_kind(num_features: int, num_classes: int) -> tuple[str, str]:
    """The kind of head that `--head auto` means, and why.

    Returns:
        ("hadamard" or "orthogonal", one sentence).
    """
    if not is_constructible(num_features):
        return "orthogonal", f"no Hadamard matrix of order {num_features} is known here"
    structured = num_classes <= (num_features**2 if has_kerdock_set(num_features) else 2 * num_features)
    if not structured and num_classes**2 > 2 ** max(num_features - 10, 0):  # the birthday problem of seeded blocks
        return "orthogonal", f"{num_classes} random codes of only {num_features} signs are likely to repeat one"
    if num_classes <= num_features:
        return "hadamard", f"{num_classes} classes fit into one Hadamard matrix of order {num_features}: orthogonal"
    if num_classes <= 2 * num_features:
        return "hadamard", f"{num_classes} classes are +-rows of one Hadamard matrix of order {num_features}"
    blocks = min_blocks(num_features, num_classes)
    return "hadamard", f"{num_classes} classes are +-rows of {blocks} Hadamard matrices of order {num_features}"
