import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.heads import codebook, dense
from fixify.heads.dense import same_sketch, sketch
from fixify.heads.spec import HeadSpec


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 96), st.integers(1, 200), st.integers(0, 2**64 - 1))
def test_orthogonal(n, c, seed):
    book = codebook(HeadSpec("orthogonal", n, c, seed=seed)).astype(np.float64)
    assert book.shape == (c, n)
    assert np.allclose(np.linalg.norm(book, axis=1), 1, atol=1e-6)
    if c <= n:
        assert np.allclose(book @ book.T, np.eye(c), atol=1e-5)


def test_more_classes_than_features_are_rescaled_rows_of_orthonormal_columns():
    book = dense.codes("orthogonal", 8, 40, 0).astype(np.float64)
    # undo the rescaling: row norms r with sum over c of r_c^2 q_c q_c^T = I
    products = np.stack([np.outer(row, row).ravel() for row in book], axis=1)
    squared_norms, *_ = np.linalg.lstsq(products, np.eye(8).ravel(), rcond=None)
    assert np.allclose(products @ squared_norms, np.eye(8).ravel(), atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 96), st.data())
def test_simplex_is_equiangular_at_rankins_bound(n, data):
    c = data.draw(st.integers(1, n + 1))
    book = codebook(HeadSpec("simplex", n, c)).astype(np.float64)
    expected = np.eye(c) if c == 1 else (c * np.eye(c) - 1) / (c - 1)
    assert np.allclose(book @ book.T, expected, atol=1e-5)


def test_codes_are_read_only_and_seeded():
    book = dense.codes("orthogonal", 8, 5, 0)
    with pytest.raises(ValueError, match="read-only"):
        book[0, 0] = 0
    assert not np.allclose(book, dense.codes("orthogonal", 8, 5, 1))


def test_result_does_not_depend_on_the_sign_convention_of_lapack(monkeypatch):
    expected = dense.codes("orthogonal", 16, 10, 5)
    qr = np.linalg.qr
    monkeypatch.setattr("numpy.linalg.qr", lambda matrix: tuple(-part for part in qr(matrix)))
    assert np.allclose(dense.codes.__wrapped__("orthogonal", 16, 10, 5), expected, atol=1e-7)


def test_sketch_tells_codebooks_apart_but_not_rounding():
    book = dense.codes("orthogonal", 256, 1000, 0)
    noise = np.random.default_rng(0).normal(scale=2e-7, size=book.shape).astype(np.float32)
    assert same_sketch(sketch(book), sketch(book + noise), 1000)
    assert not same_sketch(sketch(book), sketch(dense.codes("orthogonal", 256, 1000, 1)), 1000)
    swapped = book[np.r_[1, 0, 2:1000]]
    assert not same_sketch(sketch(book), sketch(swapped), 1000)
    flipped = book * np.where(np.arange(256) == 9, -1, 1).astype(np.float32)
    assert not same_sketch(sketch(book), sketch(flipped), 1000)
