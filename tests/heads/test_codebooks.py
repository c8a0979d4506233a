import dataclasses
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import HeadSpec, codebook, hadamard, is_constructible, welch_bound
from fixify.heads.codebooks import block_bits, checked_codes, default_codes, min_blocks, packed_codes, sign_codes

HERE = Path(__file__).parent
WIDTHS = [n for n in json.loads((HERE / "timm_widths.json").read_text())["widths"] if is_constructible(n) and n <= 2560]
GOLDEN = json.loads((HERE / "golden.json").read_text())


def integer_gram(spec, codes=None):
    """Exact inner products of the sign codes; float32 holds them, being integers of magnitude at most N < 2^24."""
    signs = sign_codes(spec, codes).astype(np.float32)
    return signs @ signs.T


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(WIDTHS), st.data())
def test_up_to_n_classes_are_exactly_orthogonal(n, data):
    c = data.draw(st.integers(1, min(n, 600)))
    spec = HeadSpec("hadamard", n, c)
    assert np.array_equal(integer_gram(spec), n * np.eye(c))
    if c < n:
        assert not np.all(sign_codes(spec) == 1, axis=1).any(), "the all-ones row is skipped"


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([n for n in WIDTHS if n <= 512]), st.data())
def test_up_to_2n_classes_reach_rankins_optimum(n, data):
    c = data.draw(st.integers(n + 1, 2 * n))
    gram = integer_gram(HeadSpec("hadamard", n, c))
    off_diagonal = gram - n * np.eye(c)
    assert off_diagonal.max() <= 0
    assert set(np.unique(off_diagonal)) <= {-n, 0}
    assert (off_diagonal == -n).sum() == 2 * (c - n)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([n for n in WIDTHS if n <= 448]), st.data())
def test_beyond_2n_classes_no_two_codes_are_equal_and_coherence_is_possible(n, data):
    c = data.draw(st.integers(2 * n + 1, 5 * n))
    seed = data.draw(st.integers(0, 2**64 - 1))
    spec = HeadSpec("hadamard", n, c, seed=seed)
    off_diagonal = integer_gram(spec) - n * np.eye(c)
    assert off_diagonal.max() < n
    assert np.abs(off_diagonal).max() / n >= welch_bound(n, c)
    assert len(np.unique(sign_codes(spec), axis=0)) == c


@pytest.mark.parametrize(("n", "c"), [(4, 16), (16, 256), (64, 1500), (256, 2965)])
def test_kerdock_blocks_meet_at_one_over_sqrt_n(n, c):
    off_diagonal = integer_gram(HeadSpec("hadamard", n, c)) - n * np.eye(c)
    assert set(np.unique(np.abs(off_diagonal))) == {0, n**0.5, n}
    assert off_diagonal.max() == n**0.5


def test_code_index_is_block_sign_row():
    n, blocks = 20, 3
    spec = HeadSpec("hadamard", n, 100)
    signs = sign_codes(spec)
    matrix = hadamard(n)
    flips = 1 - 2 * block_bits(spec, np.arange(blocks)).astype(np.int8)
    for code in range(100):
        block, sign, row = code // (2 * n), code // n % 2, code % n
        assert np.array_equal(signs[code], matrix[row] * flips[block] * (1 - 2 * sign))


@pytest.mark.parametrize("n", [16, 20])
def test_blocks_depend_on_seed_and_number_alone(n):
    some, all_of_them = HeadSpec("hadamard", n, n), HeadSpec("hadamard", n, 30 * n)
    few, many = block_bits(some, np.array([0, 3, 12])), block_bits(all_of_them, np.arange(15))
    assert np.array_equal(few, many[[0, 3, 12]])
    assert not many[0].any()
    other = block_bits(HeadSpec("hadamard", n, n, seed=1), np.arange(15))
    changed = [not np.array_equal(a, b) for a, b in zip(many, other, strict=True)]
    # Kerdock's vectors, blocks 0 .. 7 at N = 16, do not depend on the seed
    assert changed == [(n == 20 and i > 0) or (n == 16 and i >= 8) for i in range(15)]


def test_a_given_construction_is_rebuilt_even_where_another_would_be_chosen():
    spec = HeadSpec("hadamard", 1280, 50, construction="paley1-1280").resolve()
    assert spec.construction == "paley1-1280"
    assert spec.digest != HeadSpec("hadamard", 1280, 50).resolve().digest
    assert np.array_equal(integer_gram(spec), 1280 * np.eye(50))


def test_default_codes():
    assert default_codes(4, 3).tolist() == [1, 2, 3]
    assert default_codes(4, 4).tolist() == [0, 1, 2, 3]
    assert default_codes(4, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert [min_blocks(4, c) for c in (1, 8, 9, 16, 17)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(("n", "c"), [(12, 11), (20, 100), (64, 64), (256, 600)])
def test_digest_is_sha256_of_packed_signs(n, c):
    spec = HeadSpec("hadamard", n, c)
    packed = np.packbits(sign_codes(spec) == -1, axis=1)
    expected = hashlib.sha256(f"fixify-codebook:1:{c}x{n}\n".encode() + packed.tobytes()).hexdigest()
    assert spec.resolve().digest == f"sha256:{expected}"


def test_packed_codes_are_the_same_in_any_chunks(monkeypatch):
    spec = HeadSpec("hadamard", 36, 200)
    codes = checked_codes(spec, None)
    whole = np.concatenate(list(packed_codes(spec, codes)))
    monkeypatch.setattr("fixify.heads.codebooks._CHUNK_BYTES", 70)
    parts = list(packed_codes(spec, codes))
    assert len(parts) > 10
    assert np.array_equal(whole, np.concatenate(parts))
    assert spec.resolve().digest == GOLDEN["hadamard-36-200-0"]


def test_codebook_is_unit_rows_in_float32():
    book = codebook(HeadSpec("hadamard", 28, 70))
    assert book.dtype == np.float32
    assert book.shape == (70, 28)
    assert np.allclose(np.linalg.norm(book, axis=1), 1, atol=1e-6)


def test_duplicate_codes_are_refused():
    # 8 signs have 256 patterns, in 16 cosets of +-rows; random blocks fall into the same one
    with pytest.raises(HeadSpecError, match="would get the same code"):
        HeadSpec("hadamard", 8, 256, seed=3).resolve()
    with pytest.raises(HeadSpecError, match="only 16 different codes"):
        HeadSpec("hadamard", 4, 17)
    matched = HeadSpec("hadamard", 64, 4, matched=True, blocks=3)
    with pytest.raises(HeadSpecError, match="Classes 1 and 3 would get the same code"):
        matched.resolve(np.array([5, 300, 7, 300]))


def test_equal_hashes_are_compared_bit_by_bit(monkeypatch):
    monkeypatch.setattr("fixify.heads.random.raw", lambda *_: np.zeros(1, dtype=np.uint64))
    spec = HeadSpec("hadamard", 12, 6)
    assert spec.resolve().digest  # few distinct hashes, yet no false alarm


def test_matched_codes_are_checked_and_digested():
    spec = HeadSpec("hadamard", 64, 4, matched=True, blocks=3)
    good = np.array([5, 300, 7, 383])
    resolved = spec.resolve(good)
    assert spec.resolve().digest is None
    assert resolved.resolve(good.astype(np.uint16)) == resolved
    with pytest.raises(CodebookMismatchError, match="stored code indices"):
        resolved.resolve(good[::-1])
    for bad in (good[:3], good.astype(np.float32), np.array([5, 300, 7, 384]), np.array([5, 300, 7, -1])):
        with pytest.raises(HeadSpecError):
            resolved.resolve(bad)
    with pytest.raises(HeadSpecError, match="needs its stored code indices"):
        codebook(spec)
    with pytest.raises(HeadSpecError, match="not matched"):
        codebook(HeadSpec("hadamard", 64, 4), good)
    with pytest.raises(HeadSpecError, match="no code indices"):
        codebook(HeadSpec("orthogonal", 64, 4), good)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_digests(name):
    """Codebooks must never change: files in the world are rebuilt from these."""
    kind, n, c, seed = name.split("-")
    golden = GOLDEN[name]
    spec = HeadSpec(kind, int(n), int(c), seed=int(seed), digest=golden).resolve()
    assert spec.digest == golden
    if kind == "hadamard":
        assert dataclasses.replace(spec, digest=None, construction=None).resolve() == spec
    with pytest.raises(CodebookMismatchError):
        dataclasses.replace(
            spec, digest=next(g for g in GOLDEN.values() if g != golden and g[0] == golden[0])
        ).resolve()


def test_a_million_codes_are_digested_in_seconds():
    start = time.perf_counter()
    HeadSpec("hadamard", 1280, 1_000_000).resolve()
    assert time.perf_counter() - start < 15
