"""From a head spec to its codes: which code each class gets, the codes as packed bits or floats, their digest.

Code space of a `hadamard` head with K blocks: code index = block * 2N + sign * N + row (sign 0 is +, 1 is -). The
code is the row of H_N, times the block's sign vector (block 0: all plus), times the sign, over sqrt(N).

All work on whole codebooks is done on packed bits: digesting a million codes of width 1280 takes about a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from fixify.errors import HeadSpecError
from fixify.heads import binary, dense, random
from fixify.heads.blocks import block_bits, construction_of
from fixify.heads.matrices import Construction, rows
from fixify.heads.truncated import packed_truncated_rows

if TYPE_CHECKING:
    from fixify.heads.spec import HeadSpec

_CHUNK_BYTES = 1 << 24


def min_blocks(num_features: int, num_classes: int) -> int:
    """Blocks of 2N codes that so many classes need."""
    return -(-num_classes // (2 * num_features))


def default_codes(num_features: int, num_classes: int) -> np.ndarray:
    """Code indices of an unmatched `hadamard` head, in class order: int64 [C].

    Fewer classes than features: rows 1 .. C, since features are non-negative after ReLU and pooling, and the all-ones
    row 0 would take most of every feature vector. Otherwise index c: the rows, their negatives, the next block.
    """
    return np.arange(num_classes, dtype=np.int64) + (1 if num_classes < num_features else 0)


def _packed_rows(construction: Construction, indices: np.ndarray, num_features: int) -> np.ndarray:
    """Rows of H as packed bits, 1 a minus sign: uint8 [k, ceil(N / 8)]."""
    packed = np.empty((len(indices), -(-num_features // 8)), dtype=np.uint8)
    step = max(1, _CHUNK_BYTES // num_features)
    for start in range(0, len(indices), step):
        part = slice(start, start + step)
        packed[part] = np.packbits(rows(construction, indices[part]) < 0, axis=1)
    return packed


def packed_codes(spec: HeadSpec, codes: np.ndarray) -> Iterator[np.ndarray]:
    """The codes of a `hadamard` head in class order, a chunk of classes at a time.

    Args:
        codes: Code indices, int64 [C].

    Yields:
        uint8 [k, ceil(N / 8)]: bit 1 is a minus sign, first feature in the highest bit of the first byte, unused bits
        of the last byte 0.
    """
    n = spec.num_features
    if spec.truncated:
        step = max(1, _CHUNK_BYTES // max(n, len(codes)))
        for start in range(0, len(codes), step):
            yield packed_truncated_rows(n, codes[start : start + step])
        return
    used_rows, row = np.unique(codes % n, return_inverse=True)
    used_blocks, block = np.unique(codes // (2 * n), return_inverse=True)
    row_bits = _packed_rows(construction_of(spec), used_rows, n)
    sign_bits = np.packbits(block_bits(spec, used_blocks), axis=1)
    all_minus = np.packbits(np.ones(n, dtype=np.uint8))
    negative = (codes // n % 2).astype(np.uint8)
    step = max(1, _CHUNK_BYTES // row_bits.shape[1])
    for start in range(0, len(codes), step):
        part = slice(start, start + step)
        yield row_bits[row[part]] ^ sign_bits[block[part]] ^ all_minus * negative[part, None]


def _refuse_duplicates(spec: HeadSpec, hashes: np.ndarray, codes: np.ndarray) -> None:
    """Two classes with one code can never be told apart: refused. Equal hashes are compared bit by bit."""
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    suspects = np.unique(np.concatenate((order[equal], order[equal + 1])))
    seen: dict[bytes, int] = {}
    start = 0
    for packed in packed_codes(spec, codes[suspects]) if len(suspects) else ():
        for i, code in enumerate(packed):
            first = seen.setdefault(code.tobytes(), int(suspects[start + i]))
            if first != suspects[start + i]:
                raise HeadSpecError(
                    f"Classes {first} and {suspects[start + i]} would get the same code: {spec.num_classes} codes of "
                    f"{spec.num_features} signs are not all different.",
                    hint="Use another `--seed`, or `--head orthogonal`.",
                )
        start += len(packed)


def fingerprint(spec: HeadSpec, codes: ArrayLike | None = None) -> str:
    """What tells this codebook from any other, for the spec's `digest`.

    `hadamard`: "sha256:" and the SHA-256 of the ASCII line "fixify-codebook:1:<C>x<N>\\n" followed by the packed codes
    (see `packed_codes`) in class order. For a matched head the codes are the stored ones, so the digest covers the
    whole map from class to code. `binary`: see `binary.fingerprint`. Other kinds are floating point: see
    `dense.sketch`.

    Raises:
        HeadSpecError: Two classes have the same code, or an index lies outside the code space.
    """
    if spec.kind == "binary":
        return binary.fingerprint(spec, codes)
    if spec.kind != "hadamard":
        return dense.sketch(dense.codes(spec.kind, spec.num_features, spec.num_classes, spec.seed))
    codes = checked_codes(spec, codes)
    digest = hashlib.sha256(f"fixify-codebook:1:{spec.num_classes}x{spec.num_features}\n".encode())
    words = -(-spec.num_features // 64)
    multipliers = random.raw(0, random.Purpose.SAMPLE, 0, words) | np.uint64(1)
    hashes = np.empty(spec.num_classes, dtype=np.uint64)
    start = 0
    for packed in packed_codes(spec, codes):
        digest.update(packed.data)
        padded = np.zeros((len(packed), words * 8), dtype=np.uint8)
        padded[:, : packed.shape[1]] = packed
        hashes[start : start + len(packed)] = (padded.view("<u8") * multipliers).sum(axis=1, dtype=np.uint64)
        start += len(packed)
    _refuse_duplicates(spec, hashes, codes)
    return f"sha256:{digest.hexdigest()}"


def checked_codes(spec: HeadSpec, codes: ArrayLike | None) -> np.ndarray:
    """The class -> code index map of a `hadamard` head: int64 [C], every index inside the spec's code space.

    Raises:
        HeadSpecError: A matched head without codes, an unmatched one with them, or codes that do not fit the spec.
    """
    if not spec.matched:
        if codes is not None:
            raise HeadSpecError("This head spec is not matched, so its codes are not stored; none can be given.")
        if spec.truncated:
            return np.arange(spec.num_classes, dtype=np.int64)
        return default_codes(spec.num_features, spec.num_classes)
    if codes is None:
        raise HeadSpecError("A matched head needs its stored code indices; none were given.")
    codes = np.asarray(codes)
    space = 2 * spec.num_features * (spec.blocks or 0)
    if codes.shape != (spec.num_classes,) or codes.dtype.kind not in "iu":
        raise HeadSpecError(
            f"Expected {spec.num_classes} integer code indices, got {codes.dtype} of shape {list(codes.shape)}."
        )
    if int(codes.min()) < 0 or int(codes.max()) >= space:
        raise HeadSpecError(f"Code indices must lie in 0 .. {space - 1}, got {codes.min()} .. {codes.max()}.")
    return codes.astype(np.int64)


def sign_codes(spec: HeadSpec, codes: ArrayLike | None = None) -> np.ndarray:
    """The codes of a `hadamard` head in class order as int8 [C, N] of +-1 (without the factor 1/sqrt(N))."""
    n = spec.num_features
    chunks = [np.unpackbits(packed, axis=1, count=n) for packed in packed_codes(spec, checked_codes(spec, codes))]
    return np.int8(1) - np.int8(2) * np.concatenate(chunks).astype(np.int8)


def codebook(spec: HeadSpec, codes: ArrayLike | None = None) -> np.ndarray:
    """All codes of a head, one unit-norm row a class. For export and analysis: the forward pass does not need it.

    Args:
        spec: The head spec.
        codes: What the head stores, if anything: code index of each class, integers [C], if matched; packed signs if
            binary.

    Returns:
        float32 [C, N].

    Raises:
        HeadSpecError: `codes` is missing, superfluous or does not fit.
    """
    if spec.kind == "hadamard":
        return sign_codes(spec, codes) * np.float32(spec.num_features**-0.5)
    if spec.kind == "binary":
        return binary.codebook(spec, codes)
    if codes is not None:
        raise HeadSpecError(f"A head of kind {spec.kind!r} has no code indices; none can be given.")
    return dense.codes(spec.kind, spec.num_features, spec.num_classes, spec.seed)
