"""The codes of a head as data: how they are held, written out as numbers, and recognised by a digest.

`fixify.heads.kinds` says which codes a head spec stands for; `fixify.heads.product` multiplies with them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fixify._values import counted
from fixify.errors import HeadSpecError
from fixify.heads import streams
from fixify.heads.constructions import Construction, Factor, order_of, power_of_two_from
from fixify.heads.levels import SIGNS, TRIT_POWERS, Levels
from fixify.heads.matrices import block_bits, block_signs, rows
from fixify.heads.projection import Projection

SKETCH_NUMBERS = 32
SKETCH_TOLERANCE = 1e-4
"""In units of sqrt(C), the standard deviation of a sketch's numbers. Two LAPACKs differ by 1e-6 at most in float32. A
codebook of another seed agrees in one number by chance once in 10,000, and in all 32 never."""

_CHUNK_BYTES = 1 << 20
_ROTATION_BLOCK = 1


class Codes(ABC):
    """The codes of all classes of one head: Q [C, N] with rows of norm 1."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Number of classes C and of features N."""

    @abstractmethod
    def table(self) -> np.ndarray:
        """Build the codebook: float32 [C, N]. It may be read-only."""

    @abstractmethod
    def digest(self) -> str:
        """Compute the fingerprint of the codebook for `HeadSpec.digest`.

        Raises:
            HeadSpecError: Two classes have the same code.
        """


class SignRows(Codes):
    """Codes of +-1/sqrt(N), handled as packed bits: a million codes of width 1280 take about a second."""

    @abstractmethod
    def packed(self) -> Iterator[np.ndarray]:
        """Build the codes in class order, a chunk of classes at a time.

        Yields:
            uint8 [k, ceil(N / 8)]: bit 1 is a minus sign, first feature in the highest bit of the first byte, unused
            bits of the last byte 0.
        """

    @abstractmethod
    def select(self, classes: np.ndarray) -> SignRows:
        """Return the codes of some classes, integers [k]."""

    def signs(self) -> np.ndarray:
        """Build the codes without the factor 1/sqrt(N): int8 [C, N] of +-1."""
        n = self.shape[1]
        return np.concatenate([_unpack(packed, n) for packed in self.packed()])

    def table(self) -> np.ndarray:
        """Build the codebook: float32 [C, N]."""
        return self.signs() * np.float32(self.shape[1] ** -0.5)

    def digest(self) -> str:
        r"""Compute "sha256:" and the SHA-256 of the line "fixify-codebook:1:<C>x<N>\n" and the packed codes.

        Raises:
            HeadSpecError: Two classes have the same code.
        """
        c, n = self.shape
        digest = hashlib.sha256(f"fixify-codebook:1:{c}x{n}\n".encode())
        hashes = np.empty(c, dtype=np.uint64)
        start = 0
        for packed in self.packed():
            digest.update(packed.data)
            hashes[start : start + len(packed)] = row_hashes(packed)
            start += len(packed)
        self._refuse_duplicates(hashes)
        return f"sha256:{digest.hexdigest()}"

    def _refuse_duplicates(self, hashes: np.ndarray) -> None:
        """Refuse equal codes, which could never be told apart. Codes with equal hashes are compared bit by bit."""
        suspects = _with_equal_hashes(hashes)
        seen: dict[bytes, int] = {}
        start = 0
        for packed in self.select(suspects).packed() if len(suspects) else ():
            for i, code in enumerate(packed):
                first = seen.setdefault(code.tobytes(), int(suspects[start + i]))
                if first != suspects[start + i]:
                    c, n = self.shape
                    raise HeadSpecError(
                        f"Classes {first} and {suspects[start + i]} would get the same code: "
                        f"{c:,} codes of {counted(n, 'sign')} are not all different.",
                        hint="Use another `--seed`, or `--head orthogonal`.",
                    )
            start += len(packed)


@dataclass(frozen=True, eq=False)
class HadamardRows(SignRows):
    """Signed rows of the blocks of one Hadamard matrix.

    Code index = block * 2N + sign * N + row, with sign 0 for + and 1 for -. The code is that row of H, times the sign
    vector of the block (`fixify.heads.matrices.block_bits`), times the sign, over sqrt(N).

    Attributes:
        construction: The Hadamard matrix H, of order N.
        seed: Seed of the block signs.
        indices: Code index of each class, int64 [C].
    """

    construction: Construction
    seed: int
    indices: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Number of classes C and of features N."""
        return len(self.indices), order_of(self.construction)

    @property
    def row(self) -> np.ndarray:
        """Row of H of each class, int64 [C]."""
        return self.indices % self.shape[1]

    @property
    def is_negative(self) -> np.ndarray:
        """1 for each class whose row is negated, else 0: int64 [C]."""
        return self.indices // self.shape[1] % 2

    @property
    def block(self) -> np.ndarray:
        """Block of each class, int64 [C]."""
        return self.indices // (2 * self.shape[1])

    def packed(self) -> Iterator[np.ndarray]:
        """Build the codes in class order, a chunk of classes at a time; see `SignRows.packed`."""
        used_rows, row = np.unique(self.row, return_inverse=True)
        used_blocks, block = np.unique(self.block, return_inverse=True)
        row_bits = self._packed_rows(used_rows)
        sign_bits = np.packbits(block_bits(self.construction, self.seed, used_blocks), axis=1)
        all_minus = np.packbits(np.ones(self.shape[1], dtype=np.uint8))
        negative = self.is_negative.astype(np.uint8)
        step = max(1, _CHUNK_BYTES // row_bits.shape[1])
        for start in range(0, len(self.indices), step):
            part = slice(start, start + step)
            yield row_bits[row[part]] ^ sign_bits[block[part]] ^ all_minus * negative[part, None]

    def _packed_rows(self, indices: np.ndarray) -> np.ndarray:
        """Build rows of H as packed bits: uint8 [k, ceil(N / 8)]."""
        n = self.shape[1]
        packed = np.empty((len(indices), -(-n // 8)), dtype=np.uint8)
        step = max(1, _CHUNK_BYTES // n)
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            packed[part] = np.packbits(rows(self.construction, indices[part]) < 0, axis=1)
        return packed

    def select(self, classes: np.ndarray) -> HadamardRows:
        """Return the codes of some classes, integers [k]."""
        return HadamardRows(self.construction, self.seed, self.indices[classes])


@dataclass(frozen=True, eq=False)
class TruncatedRows(SignRows):
    """Rows of a larger Sylvester matrix, cut to N columns and negated: the codes of the paper's published code.

    Attributes:
        num_features: Number of columns N.
        classes: Row of each class, int64 [C].
    """

    num_features: int
    classes: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Number of classes C and of features N."""
        return len(self.classes), self.num_features

    def packed(self) -> Iterator[np.ndarray]:
        """Build the codes in class order, a chunk of classes at a time; see `SignRows.packed`."""
        step = max(1, _CHUNK_BYTES // max(self.shape))
        for start in range(0, len(self.classes), step):
            part = self.classes[start : start + step]
            order = power_of_two_from(max(self.num_features, int(part.max()) + 1))
            signs = rows((Factor("sylvester", order),), part)[:, : self.num_features]
            yield np.packbits(signs > 0, axis=1)

    def select(self, classes: np.ndarray) -> TruncatedRows:
        """Return the codes of some classes, integers [k]."""
        return TruncatedRows(self.num_features, self.classes[classes])


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of the features: a sign-flipped Hadamard matrix, of which the first d outputs are kept.

    It costs one fast transform. It spreads every class vector evenly over the directions, and lets other signs make
    up for the error of one sign even where the features are uncorrelated.

    Attributes:
        construction: The Hadamard matrix, of order N.
        seed: Seed of the signs.
        num_kept: d.
    """

    construction: Construction
    seed: int
    num_kept: int

    def signs(self) -> np.ndarray:
        """Build the signs that multiply the features before the Hadamard matrix: +-1, float32 [N]."""
        return block_signs(self.construction, self.seed, np.array([_ROTATION_BLOCK]))[0]

    def basis(self) -> np.ndarray:
        """Build the d directions in which features are measured: float32 [N, d], orthonormal columns."""
        kept = rows(self.construction, np.arange(self.num_kept)) * self.signs()
        return kept.T * np.float32(order_of(self.construction) ** -0.5)


@dataclass(frozen=True, eq=False)
class StoredSigns(Codes):
    """Stored signs of d (rotated or projected) features, d <= N, over sqrt(d).

    With a projection, several signs are of one coordinate, and the codes are of other norms than 1.

    Attributes:
        num_features: N.
        num_signs: d.
        packed: uint8 [C, ceil(d / 8)]; bit 1 is a minus sign, first sign in the highest bit, unused bits 0.
        rotation: Applied to the features first; None: the features are taken as they are, and d = N.
    """

    num_features: int
    num_signs: int
    packed: np.ndarray
    rotation: Rotation | Projection | None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of classes C and of features N."""
        return len(self.packed), self.num_features

    @property
    def levels(self) -> Levels:
        """The levels that signs are: +1 and -1."""
        return SIGNS

    @property
    def count(self) -> int:
        """Number of signs per class, d."""
        return self.num_signs

    def signs(self) -> np.ndarray:
        """Unpack the signs: int8 [C, d] of +-1."""
        return _unpack(self.packed, self.num_signs)

    def table(self) -> np.ndarray:
        """Build the codebook in the coordinates of the features: float32 [C, N]."""
        return _in_features(self.signs(), self.num_signs**-0.5, self.rotation)

    def digest(self) -> str:
        r"""Compute "sha256:" and the SHA-256 of the line "fixify-signs:1:<C>x<d>\n" and the packed signs.

        With a projection the line is "fixify-projected:1:<C>x<N>:<planes, with commas>\n", and the directions follow.

        Raises:
            HeadSpecError: Two classes have the same signs.
        """
        if isinstance(self.rotation, Projection):
            planes = ",".join(map(str, self.rotation.planes))
            line = f"fixify-projected:1:{len(self.packed)}x{self.num_features}:{planes}"
            return _digest_of(self.packed, line, "signs", self.rotation.directions)
        return _digest_of(self.packed, f"fixify-signs:1:{len(self.packed)}x{self.num_signs}", "signs")


@dataclass(frozen=True, eq=False)
class StoredLevels(Codes):
    """Stored levels of N (rotated) features, over the root of N times their mean square.

    Unlike those of other heads, these codes are of norms near 1, not of norm 1: levels that differ between classes
    leave the norm free, and the row scale of a class, which is stored anyway, stands for its step size.

    Attributes:
        num_features: N.
        levels: Which levels they are.
        packed: uint8 [C, levels.num_bytes(N)]; see `fixify.heads.signs.pack_levels`.
        rotation: Applied to the features first; None: the features are taken as they are.
    """

    num_features: int
    levels: Levels
    packed: np.ndarray
    rotation: Rotation | None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of classes C and of features N."""
        return len(self.packed), self.num_features

    @property
    def count(self) -> int:
        """Number of levels per class, N."""
        return self.num_features

    @property
    def unit(self) -> float:
        """The factor that makes codes of levels."""
        return float((self.num_features * self.levels.mean_square) ** -0.5)

    def numbers(self) -> np.ndarray:
        """Unpack the levels: int8 [C, N]."""
        return unpacked_levels(self.packed, self.num_features, self.levels)

    def table(self) -> np.ndarray:
        """Build the codebook in the coordinates of the features: float32 [C, N]."""
        return _in_features(self.numbers(), self.unit, self.rotation)

    def digest(self) -> str:
        r"""Compute "sha256:" and the SHA-256 of the line "fixify-levels:1:<C>x<N>:<bits>\n" and the packed levels.

        Raises:
            HeadSpecError: Two classes have the same levels.
        """
        line = f"fixify-levels:1:{len(self.packed)}x{self.num_features}:{self.levels.bits:g}"
        return _digest_of(self.packed, line, "levels")


def _in_features(numbers: np.ndarray, unit: float, rotation: Rotation | Projection | None) -> np.ndarray:
    """Turn stored signs or levels [C, d] into codes in the coordinates of the features, float32 [C, N]."""
    codes = numbers.astype(np.float32) * np.float32(unit)
    return codes if rotation is None else codes @ rotation.basis().T


def _digest_of(packed: np.ndarray, line: str, what: str, *others: np.ndarray) -> str:
    """Hash a line, the packed signs or levels [C, bytes], and other arrays.

    Raises:
        HeadSpecError: Two classes have the same.
    """
    repeated = first_repeated(packed)
    if repeated is not None:
        raise HeadSpecError(
            f"Classes {repeated[0]} and {repeated[1]} have the same {what} and could never be told apart."
        )
    hashed = hashlib.sha256(line.encode() + b"\n")
    for array in (packed, *others):
        hashed.update(np.ascontiguousarray(array).data)
    return f"sha256:{hashed.hexdigest()}"


@dataclass(frozen=True, eq=False)
class RealRows(Codes):
    """Codes of real numbers from floating-point linear algebra, whose last bits differ between machines.

    They are recognised by a sketch that is compared within a tolerance, and not by a hash.

    Attributes:
        codes: float32 [C, N], unit rows.
    """

    codes: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Number of classes C and of features N."""
        return self.codes.shape[0], self.codes.shape[1]

    def table(self) -> np.ndarray:
        """Return the codebook: float32 [C, N], read-only."""
        return self.codes

    def digest(self) -> str:
        """Compute the sketch: 32 numbers u^T Q v with fixed sign vectors u and v, as "sketch:1.2345,..."."""
        c, n = self.shape
        numbers = [
            _sketch_signs(2 * i, c) @ (self.codes @ _sketch_signs(2 * i + 1, n).astype(np.float32)).astype(np.float64)
            for i in range(SKETCH_NUMBERS)
        ]
        return "sketch:" + ",".join(f"{number:.5f}" for number in numbers)


@dataclass(frozen=True)
class FeatureRows(Codes):
    """Class c reads feature c: the first C rows of the identity of order N.

    Attributes:
        num_features: N.
        num_classes: C <= N.
    """

    num_features: int
    num_classes: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of classes C and of features N."""
        return self.num_classes, self.num_features

    def table(self) -> np.ndarray:
        """Build the codebook: float32 [C, N]."""
        return np.eye(self.num_classes, self.num_features, dtype=np.float32)

    def digest(self) -> str:
        r"""Compute "sha256:" and the SHA-256 of the line "fixify-identity:1:<C>x<N>\n", which says it all."""
        line = f"fixify-identity:1:{self.num_classes}x{self.num_features}\n".encode()
        return f"sha256:{hashlib.sha256(line).hexdigest()}"


@lru_cache(maxsize=2)  # a head needs its codes twice in a row: to verify the spec, and to multiply with
def orthogonal_codes(num_features: int, num_classes: int, seed: int) -> np.ndarray:
    """Make a seeded Gaussian matrix orthonormal: the paper's random projection (section 2.2).

    C <= N: orthonormal rows. C > N: orthonormal columns, then rows rescaled to unit norm.

    Returns:
        float32 [C, N], unit rows, read-only.
    """
    n, c = num_features, num_classes
    result = _orthonormal_columns(streams.gaussian(seed, streams.Purpose.GAUSSIAN, 0, (max(n, c), min(n, c))))
    return _frozen(result.T if c <= n else result / np.linalg.norm(result, axis=1, keepdims=True))


@lru_cache(maxsize=2)
def simplex_codes(num_features: int, num_classes: int, seed: int) -> np.ndarray:
    """Place C <= N + 1 unit vectors with all cosines -1/(C - 1) in a seeded random orientation.

    This is the smallest possible largest cosine (Rankin, 1955).

    Returns:
        float32 [C, N], unit rows, read-only.
    """
    from scipy.linalg import helmert  # takes a tenth of a second, and is needed here only

    n, c = num_features, num_classes
    axes = _orthonormal_columns(streams.gaussian(seed, streams.Purpose.GAUSSIAN, 0, (n, max(c - 1, 1))))
    corners = helmert(c).T * np.sqrt(c / (c - 1)) if c > 1 else np.ones((1, 1))
    return _frozen(corners @ axes.T)


def first_repeated(packed: np.ndarray) -> tuple[int, int] | None:
    """Find the first row that repeats an earlier one; rows with equal hashes are compared byte by byte.

    Args:
        packed: uint8 [k, bytes].

    Returns:
        The numbers of the earlier row and of its repetition, or None if all rows differ.

    >>> first_repeated(np.array([[1], [2], [1], [2]], dtype=np.uint8))
    (0, 2)
    """
    step = max(1, _CHUNK_BYTES // packed.shape[1])
    hashes = np.concatenate([row_hashes(packed[start : start + step]) for start in range(0, len(packed), step)])
    seen: dict[bytes, int] = {}
    for row in _with_equal_hashes(hashes).tolist():
        first = seen.setdefault(packed[row].tobytes(), row)
        if first != row:
            return first, row
    return None


def row_hashes(packed: np.ndarray) -> np.ndarray:
    """Hash each row of bytes: uint8 [k, bytes] to uint64 [k]. Equal rows have equal hashes, others almost never."""
    words = -(-packed.shape[1] // 8)
    multipliers = streams.raw(0, streams.Purpose.SAMPLE, 0, words) | np.uint64(1)
    padded = np.zeros((len(packed), words * 8), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    hashes: np.ndarray = (padded.view("<u8") * multipliers).sum(axis=1, dtype=np.uint64)
    return hashes


def _with_equal_hashes(hashes: np.ndarray) -> np.ndarray:
    """Return the numbers of the rows whose hash another row has too, in ascending order: int64 [k]."""
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    return np.unique(np.concatenate((order[equal], order[equal + 1])))


def same_digest(first: str, second: str, num_classes: int) -> bool:
    """Check whether two digests are of the same codebook; sketches may differ by rounding."""
    if not (first.startswith("sketch:") and second.startswith("sketch:")):
        return first == second
    a, b = (np.array([float(x) for x in text.removeprefix("sketch:").split(",")]) for text in (first, second))
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= SKETCH_TOLERANCE * num_classes**0.5))


def unpacked_levels(packed: np.ndarray, count: int, kind: Levels = SIGNS) -> np.ndarray:
    """Unpack levels without torch: uint8 [k, bytes], of `fixify.heads.signs.pack_levels`, to int8 [k, count]."""
    if not kind.num_planes:
        powers = np.array(TRIT_POWERS, dtype=np.uint8)
        digits = (packed[:, :, None] // powers % 3).reshape(len(packed), -1)
        return digits[:, :count].astype(np.int8) - np.int8(1)
    levels = np.zeros((len(packed), count), dtype=np.int8)
    for plane in np.split(packed, kind.num_planes, axis=1):
        levels *= 2
        levels += _unpack(plane, count)
    return levels


def _unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Unpack signs: uint8 [k, ceil(count / 8)] to int8 [k, count] of +-1; bit 1 is a minus sign."""
    bits = np.unpackbits(packed, axis=1, count=count)
    return np.int8(1) - np.int8(2) * bits.astype(np.int8)


def _orthonormal_columns(matrix: np.ndarray) -> np.ndarray:
    """Orthonormalise the columns. A positive diagonal of R fixes the signs, so the result is unique."""
    q, r = np.linalg.qr(matrix)
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)


def _frozen(codes: np.ndarray) -> np.ndarray:
    """Convert to a read-only float32 array, which a cache may share."""
    result = np.ascontiguousarray(codes, dtype=np.float32)
    result.flags.writeable = False
    return result


def _sketch_signs(index: int, count: int) -> np.ndarray:
    return 1.0 - 2.0 * streams.sign_bits(0, streams.Purpose.SKETCH, index, count)
