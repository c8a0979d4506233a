"""Codes as data: written out as signs, numbers and packed bits, and recognised by their digests."""

import hashlib

import numpy as np
import pytest
import scipy.linalg

from fixify.errors import HeadSpecError
from fixify.heads import codes as module
from fixify.heads import hadamard
from fixify.heads.codes import (
    FeatureRows,
    HadamardRows,
    RealRows,
    Rotation,
    StoredSigns,
    TruncatedRows,
    orthogonal_codes,
    same_digest,
    simplex_codes,
)
from fixify.heads.constructions import factorise
from fixify.heads.matrices import block_bits


def hadamard_rows(n, indices, seed=0):
    return HadamardRows(factorise(n), seed, np.asarray(indices, dtype=np.int64))


def stored_signs(c, d, n=None, seed=0):
    signs = np.random.default_rng(seed).integers(0, 2, (c, d))
    rotation = None if n is None else Rotation(factorise(n), 0, d)
    return StoredSigns(n or d, d, np.packbits(signs, axis=1), rotation)


ALL = [
    hadamard_rows(28, range(70)),
    TruncatedRows(48, np.arange(60)),
    stored_signs(30, 13),
    stored_signs(30, 13, n=64),
    RealRows(orthogonal_codes(24, 40, 0)),
    RealRows(simplex_codes(24, 25, 0)),
    FeatureRows(24, 10),
]


@pytest.mark.parametrize("codes", ALL, ids=lambda codes: type(codes).__name__)
def test_table_is_unit_rows_in_float32(codes):
    book = codes.table()
    assert book.dtype == np.float32
    assert book.shape == codes.shape
    np.testing.assert_allclose(np.linalg.norm(book, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("codes", [ALL[0], ALL[1]], ids=lambda codes: type(codes).__name__)
def test_table_of_sign_rows_is_their_signs(codes):
    signs = codes.signs()
    assert signs.dtype == np.int8
    np.testing.assert_allclose(codes.table(), signs / codes.shape[1] ** 0.5, rtol=1e-6)
    some = np.array([5, 0, 17])
    assert np.array_equal(codes.select(some).signs(), signs[some])


def test_code_index_is_block_sign_row():
    n = 20
    signs, matrix = hadamard_rows(n, range(100)).signs(), hadamard(n)
    flips = 1 - 2 * block_bits(factorise(n), 0, np.arange(3)).astype(np.int8)
    for code in range(100):
        block, sign, row = code // (2 * n), code // n % 2, code % n
        assert np.array_equal(signs[code], matrix[row] * flips[block] * (1 - 2 * sign))


def test_truncated_rows_are_those_of_scipys_matrix():
    assert np.array_equal(TruncatedRows(48, np.arange(60)).signs(), -scipy.linalg.hadamard(64)[:60, :48])


@pytest.mark.parametrize("codes", [ALL[0], ALL[1]], ids=lambda codes: type(codes).__name__)
def test_packed_codes_are_the_same_in_any_chunks(codes, monkeypatch):
    (whole,), digest = list(codes.packed()), codes.digest()
    monkeypatch.setattr(module, "_CHUNK_BYTES", 70)
    parts = list(codes.packed())
    assert len(parts) > 3
    assert np.array_equal(whole, np.concatenate(parts))
    assert codes.digest() == digest


# --- Digests


@pytest.mark.parametrize(("n", "c"), [(12, 11), (20, 100), (64, 64), (256, 600)])
def test_digest_of_sign_rows_is_sha256_of_a_line_and_the_packed_signs(n, c):
    codes = hadamard_rows(n, range(c))
    packed = np.packbits(codes.signs() == -1, axis=1)
    expected = hashlib.sha256(f"fixify-codebook:1:{c}x{n}\n".encode() + packed.tobytes()).hexdigest()
    assert codes.digest() == f"sha256:{expected}"


def test_digest_of_stored_signs_is_sha256_of_a_line_and_the_signs():
    codes = stored_signs(30, 13)
    expected = hashlib.sha256(b"fixify-signs:1:30x13\n" + codes.packed.tobytes()).hexdigest()
    assert codes.digest() == f"sha256:{expected}"


def test_digest_of_features_is_sha256_of_a_line():
    expected = hashlib.sha256(b"fixify-identity:1:10x24\n").hexdigest()
    assert FeatureRows(24, 10).digest() == f"sha256:{expected}"


def test_equal_codes_are_refused_and_named():
    with pytest.raises(HeadSpecError, match=r"Classes 1 and 3 .* 64 signs"):
        hadamard_rows(64, [5, 300, 7, 300]).digest()
    packed = np.zeros((3, 1), np.uint8)
    with pytest.raises(HeadSpecError, match="Classes 0 and 1 "):
        StoredSigns(16, 5, packed, None).digest()


def test_equal_hashes_are_compared_bit_by_bit(monkeypatch):
    monkeypatch.setattr("fixify.heads.streams.raw", lambda *_: np.zeros(1, dtype=np.uint64))
    assert hadamard_rows(12, range(1, 7)).digest()  # few different hashes, yet no false alarm


def test_sketch_tells_codebooks_apart_but_not_rounding():
    book = orthogonal_codes(256, 1000, 0)
    noise = np.random.default_rng(0).normal(scale=2e-7, size=book.shape).astype(np.float32)
    digest = RealRows(book).digest()
    assert digest.startswith("sketch:")
    assert same_digest(digest, RealRows(book + noise).digest(), 1000)
    swapped = book[np.r_[1, 0, 2:1000]]
    flipped = book * np.where(np.arange(256) == 9, -1, 1).astype(np.float32)
    for other in (orthogonal_codes(256, 1000, 1), swapped, flipped):
        assert not same_digest(digest, RealRows(other).digest(), 1000)


# --- Real codes


def test_more_classes_than_features_are_rescaled_rows_of_orthonormal_columns():
    book = orthogonal_codes(8, 40, 0).astype(np.float64)
    # undo the rescaling: row norms r with sum over c of r_c^2 q_c q_c^T = I
    products = np.stack([np.outer(row, row).ravel() for row in book], axis=1)
    squared_norms, *_ = np.linalg.lstsq(products, np.eye(8).ravel(), rcond=None)
    assert np.allclose(products @ squared_norms, np.eye(8).ravel(), atol=1e-6)


@pytest.mark.parametrize("build", [orthogonal_codes, simplex_codes])
def test_codes_are_read_only_and_seeded(build):
    book = build(8, 5, 0)
    with pytest.raises(ValueError, match="read-only"):
        book[0, 0] = 0
    assert not np.allclose(book, build(8, 5, 1))


@pytest.mark.parametrize("build", [orthogonal_codes, simplex_codes])
def test_result_does_not_depend_on_the_sign_convention_of_lapack(build, monkeypatch):
    expected, qr = build(16, 10, 5), np.linalg.qr
    monkeypatch.setattr("numpy.linalg.qr", lambda matrix: tuple(-part for part in qr(matrix)))
    assert np.allclose(build.__wrapped__(16, 10, 5), expected, atol=1e-7)


def test_rotation_is_orthonormal_and_seeded():
    first, second = (Rotation(factorise(20), seed, 12).basis() for seed in (0, 1))
    np.testing.assert_allclose(first.T @ first, np.eye(12), atol=1e-6)
    assert not np.array_equal(first, second)
