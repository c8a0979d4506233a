"""What each kind of head stands for, what it stores and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import CodebookMismatchError, HeadSpecError
from fixify.heads import (
    KINDS,
    REFERENCE_CONSTRUCTION,
    HeadSpec,
    codebook,
    default_blocks,
    is_constructible,
    kind_of,
    welch_bound,
    wide_blocks,
)
from fixify.heads.kinds import REFERENCE_HADAMARD, default_codes, min_blocks
from fixify.heads.levels import LEVELS
from fixify.heads.signs import pack_levels

HERE = Path(__file__).parent
WIDTHS = [n for n in json.loads((HERE / "timm_widths.json").read_text())["widths"] if is_constructible(n) and n <= 2560]


def signs(spec, codes=None):
    return kind_of(spec).codes(spec, codes).signs()


def integer_gram(spec, codes=None):
    """Exact inner products of the sign codes; float32 holds them, being integers of magnitude at most N < 2^24."""
    as_float = signs(spec, codes).astype(np.float32)
    return as_float @ as_float.T


# --- Questions that every kind answers

MATCHED = HeadSpec("hadamard", 256, 100, matched=True, blocks=8)
REFERENCE = HeadSpec("hadamard", 64, 10, construction=REFERENCE_CONSTRUCTION)
BINARY = HeadSpec("binary", 256, 1000, bits_per_class=88, gains=True)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # stores codes, can match, needs a classifier, sign codebook, reference; bytes per class, description
        (HeadSpec("hadamard", 256, 100), (False, True, False, True, False, 0, "class order (0 bytes per class)")),
        (MATCHED, (True, True, False, True, False, 2, "matched to an old classifier (2 bytes per class)")),
        (REFERENCE, (False, False, False, True, True, 0, "published code, in class order (0 bytes per class)")),
        (HeadSpec("orthogonal", 30, 7), (False, False, False, False, False, 0, "(0 bytes per class)")),
        (HeadSpec("simplex", 30, 7, gains=True), (False, False, False, False, False, 1, "(1 byte per class)")),
        (BINARY, (True, False, True, False, False, 12, "88 bits per class (12 bytes with its length)")),
        (HeadSpec("binary", 20, 9, bits_per_class=9), (True, False, True, False, False, 2, "class (2 bytes)")),
        (HeadSpec("identity", 30, 7), (False, False, False, False, False, 0, "feature c (0 bytes per class)")),
    ],
    ids=lambda value: value.kind if isinstance(value, HeadSpec) else "",
)  # fmt: skip
def test_what_a_spec_says_of_its_kind(spec, expected):
    *facts, size, description = expected
    assert [
        spec.stores_codes, spec.can_match, spec.needs_classifier, spec.has_sign_codebook, spec.is_reference
    ] == facts  # fmt: skip
    assert spec.can_fit == (spec.can_match or spec.needs_classifier)
    assert spec.bytes_per_class == size
    assert spec.description.endswith(description)
    assert spec.match_hint and kind_of(spec).summary


def test_registry_is_by_name_and_without_the_reference_kind():
    assert list(KINDS) == ["hadamard", "orthogonal", "simplex", "binary", "identity"]
    assert all(kind.name == name for name, kind in KINDS.items())
    assert kind_of(REFERENCE) is REFERENCE_HADAMARD
    assert REFERENCE_HADAMARD not in KINDS.values()


def test_stored_signs_are_counted():
    assert BINARY.num_stored_signs == 88_000
    assert HeadSpec("hadamard", 256, 100).num_stored_signs == 0


@pytest.mark.parametrize(
    ("blocks", "dtype", "size"), [(1, "uint16", 2), (128, "uint16", 2), (129, "uint32", 4), (4096, "uint32", 4)]
)
def test_code_indices_have_the_smallest_type(blocks, dtype, size):
    spec = HeadSpec("hadamard", 256, 10, matched=True, blocks=blocks)
    assert (spec.stored_codes.dtype, spec.stored_codes.memory_dtype) == (dtype, "int64")
    assert spec.bytes_per_class == size


@pytest.mark.parametrize(
    ("kind", "n", "c", "size"),
    [("hadamard", 256, 100, 2), ("hadamard", 256, 2965, 2), ("hadamard", 8, 8, 1), ("binary", 100, 7, 14),
     ("orthogonal", 386, 7, 0), ("simplex", 64, 7, 0), ("identity", 64, 7, 0), ("hadamard", 386, 100, 2)],
)  # fmt: skip
def test_planned_bytes(kind, n, c, size):
    """By arithmetic, so that a plan needs no valid head (no matrix of order 386 is known)."""
    assert KINDS[kind].planned_bytes_per_class(n, c) == size
    statistics = 0 if kind == "binary" else 8 * n + 8
    assert KINDS[kind].planned_bytes(n, c) == 4 + 4 * c + statistics + size * c
    assert KINDS[kind].planned_bytes(n, c, bias=False) == 4 + statistics + size * c


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_features", [False, True])
def test_default_options_make_a_spec(kind, has_features):
    options = KINDS[kind].default_options(64, has_features=has_features)
    spec = HeadSpec(kind, 64, 10, **options)
    if kind == "binary":
        assert spec.row_scales and spec.bits_per_class == 64
        assert (spec.normalize, spec.standardize) == (False, "center" if has_features else False)
        fewer = KINDS[kind].default_options(64, has_features=has_features, bits_per_class=24)
        assert (fewer["bits_per_class"], fewer["normalize"]) == (24, has_features)
    else:
        assert not options


def test_default_number_of_blocks():
    assert default_blocks(2048, 1000) == default_blocks(256, 200) == 8
    assert default_blocks(256, 2965) == 12
    assert default_blocks(2048, 18_291) == 9
    assert wide_blocks(256, 2965) == 4096
    assert 9 <= wide_blocks(2048, 18_291) < 4096
    assert wide_blocks(256, 200) == 8


# --- Hadamard


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(WIDTHS), st.data())
def test_up_to_n_classes_are_exactly_orthogonal(n, data):
    c = data.draw(st.integers(1, min(n, 400)))
    spec = HeadSpec("hadamard", n, c)
    assert np.array_equal(integer_gram(spec), n * np.eye(c))
    if c < n:
        assert not np.all(signs(spec) == 1, axis=1).any(), "the all-ones row is skipped"


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([n for n in WIDTHS if n <= 512]), st.data())
def test_up_to_2n_classes_reach_rankins_optimum(n, data):
    c = data.draw(st.integers(n + 1, 2 * n))
    off_diagonal = integer_gram(HeadSpec("hadamard", n, c)) - n * np.eye(c)
    assert off_diagonal.max() <= 0
    assert set(np.unique(off_diagonal)) <= {-n, 0}
    assert (off_diagonal == -n).sum() == 2 * (c - n)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([n for n in WIDTHS if n <= 256]), st.integers(0, 2**64 - 1), st.data())
def test_beyond_2n_classes_no_two_codes_are_equal_and_coherence_is_possible(n, seed, data):
    c = data.draw(st.integers(2 * n + 1, 5 * n))
    spec = HeadSpec("hadamard", n, c, seed=seed)
    off_diagonal = integer_gram(spec) - n * np.eye(c)
    assert off_diagonal.max() < n
    assert np.abs(off_diagonal).max() / n >= welch_bound(n, c)
    assert len(np.unique(signs(spec), axis=0)) == c


@pytest.mark.parametrize(("n", "c"), [(4, 16), (16, 256), (64, 1500), (256, 1600)])
def test_kerdock_blocks_meet_at_one_over_sqrt_n(n, c):
    off_diagonal = integer_gram(HeadSpec("hadamard", n, c)) - n * np.eye(c)
    assert set(np.unique(np.abs(off_diagonal))) == {0, n**0.5, n}
    assert off_diagonal.max() == n**0.5


def test_a_given_construction_is_rebuilt_even_where_another_would_be_chosen():
    spec = HeadSpec("hadamard", 1280, 50, construction="paley1-1280").resolve()
    assert spec.construction == "paley1-1280"
    assert spec.digest != HeadSpec("hadamard", 1280, 50).resolve().digest
    assert np.array_equal(integer_gram(spec), 1280 * np.eye(50))


def test_codes_in_class_order():
    assert default_codes(4, 3).tolist() == [1, 2, 3]
    assert default_codes(4, 4).tolist() == [0, 1, 2, 3]
    assert default_codes(4, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert [min_blocks(4, c) for c in (1, 8, 9, 16, 17)] == [1, 1, 2, 2, 3]


def test_duplicate_codes_are_refused():
    # 8 signs have 256 patterns, in 16 cosets of +-rows; random blocks fall into the same one
    with pytest.raises(HeadSpecError, match="would get the same code") as error:
        HeadSpec("hadamard", 8, 256, seed=3).resolve()
    assert "--seed" in error.value.hint
    with pytest.raises(HeadSpecError, match="only 16 different codes"):
        HeadSpec("hadamard", 4, 17)


def test_stored_code_indices_are_checked():
    spec = HeadSpec("hadamard", 64, 4, matched=True, blocks=3)
    good = np.array([5, 300, 7, 383])
    resolved = spec.resolve(good)
    assert spec.resolve().digest is None
    assert resolved.resolve(good.astype(np.uint16)) == resolved
    with pytest.raises(CodebookMismatchError, match="stored code indices"):
        resolved.resolve(good[::-1])
    for bad in (good[:3], good.astype(np.float32), np.array([5, 300, 7, 384]), np.array([5, 300, 7, -1])):
        with pytest.raises(HeadSpecError, match=r"4 integer code indices|0 \.\. 383"):
            resolved.resolve(bad)
    with pytest.raises(HeadSpecError, match="needs its stored code indices"):
        codebook(spec)


@pytest.mark.parametrize(
    "spec", [HeadSpec(kind, 64, 4) for kind in ("hadamard", "orthogonal", "simplex", "identity")] + [REFERENCE],
    ids=lambda spec: f"{spec.kind}-{spec.is_reference}",
)  # fmt: skip
def test_codes_that_are_not_stored_cannot_be_given(spec):
    with pytest.raises(HeadSpecError, match="none can be given"):
        codebook(spec, np.arange(spec.num_classes))


# --- The paper's published code


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 130), st.integers(1, 300))
def test_duplicate_rows_of_the_published_code_are_refused_and_only_those(n, c):
    order = 1 << (max(n, c) - 1).bit_length()
    cut = scipy.linalg.hadamard(order)[:c, :n]
    if len(np.unique(cut, axis=0)) == c:
        spec = HeadSpec("hadamard", n, c, construction=REFERENCE_CONSTRUCTION).resolve()
        assert spec.digest.startswith("sha256:") and spec.blocks is None
    else:
        with pytest.raises(HeadSpecError, match=r"differ: of .* would have the code of class 0") as error:
            HeadSpec("hadamard", n, c, construction=REFERENCE_CONSTRUCTION)
        assert "--head hadamard" in error.value.hint


def test_case_of_the_paper_is_refused():
    """MobileNet 0.5: 1,000 classes, N = 512. Classes 512 and 0 have the same code in the published code."""
    with pytest.raises(HeadSpecError, match=r"only 512 rows .* class 512 .* and 488 in all"):
        HeadSpec("hadamard", 512, 1000, construction=REFERENCE_CONSTRUCTION)


# --- Orthogonal and simplex


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 96), st.integers(1, 200), st.integers(0, 2**64 - 1))
def test_orthogonal_rows_are_orthonormal_up_to_n_classes(n, c, seed):
    book = codebook(HeadSpec("orthogonal", n, c, seed=seed)).astype(np.float64)
    assert np.allclose(np.linalg.norm(book, axis=1), 1, atol=1e-6)
    if c <= n:
        assert np.allclose(book @ book.T, np.eye(c), atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 96), st.data())
def test_simplex_is_equiangular_at_rankins_bound(n, data):
    c = data.draw(st.integers(1, n + 1))
    book = codebook(HeadSpec("simplex", n, c)).astype(np.float64)
    expected = np.eye(c) if c == 1 else (c * np.eye(c) - 1) / (c - 1)
    assert np.allclose(book @ book.T, expected, atol=1e-5)


# --- Binary


def test_stored_signs_are_checked():
    spec = HeadSpec("binary", 64, 30, bits_per_class=20)
    with pytest.raises(HeadSpecError, match="needs its stored signs"):
        codebook(spec)
    for bad in (np.zeros((30, 4), np.uint8), np.zeros((30, 3), np.int8), np.zeros((29, 3), np.uint8)):
        with pytest.raises(HeadSpecError, match=r"uint8 \[30, 3\]"):
            codebook(spec, bad)
    with pytest.raises(HeadSpecError, match="unused bits"):
        codebook(spec, np.full((30, 3), 255, np.uint8))


@pytest.mark.parametrize(("n", "bits", "rotated"), [(64, 24, True), (64, 64, True), (22, 22, False)])
def test_signs_are_of_rotated_features_where_a_matrix_is_known(n, bits, rotated):
    spec = HeadSpec("binary", n, 9, bits_per_class=bits)
    assert (KINDS["binary"].rotation(spec) is not None) == rotated
    assert (spec.resolve().construction is not None) == rotated


def level_spec(n=44, c=30, bits=2, **options):
    return HeadSpec("binary", n, c, bits_per_weight=bits, gains=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"bits_per_weight": 1},
        {"bits_per_weight": 2.5},
        {"bits_per_weight": "2"},
        {"bits_per_weight": True},
        {"bits_per_weight": 2, "bits_per_class": 44},
        {"bits_per_weight": 2, "gains": False},
        {"bits_per_weight": 2, "kind": "hadamard"},
        {"bits_per_weight": 2, "num_features": 2, "num_classes": 17},
    ],
)
def test_levels_that_do_not_go_together_are_refused(options):
    with pytest.raises(HeadSpecError):
        HeadSpec(**{"kind": "binary", "num_features": 44, "num_classes": 30, "gains": True} | options)


def test_stored_levels_are_checked():
    with pytest.raises(HeadSpecError, match="needs its stored signs"):
        codebook(level_spec())
    for bad in (np.zeros((30, 11), np.uint8), np.zeros((30, 12), np.int8)):
        with pytest.raises(HeadSpecError, match=r"uint8 \[30, 12\]"):
            codebook(level_spec(), bad)
    for plane in (5, 11):  # the last byte of each of two planes has four unused bits
        packed = np.zeros((30, 12), np.uint8)
        packed[3, plane] = 8
        with pytest.raises(HeadSpecError, match="unused bits"):
            codebook(level_spec(), packed)
    ternary = np.zeros((30, 9), np.uint8)
    for place, byte in ((0, 243), (8, 81)):  # four digits in the last byte
        ternary[:] = 0
        ternary[2, place] = byte
        with pytest.raises(HeadSpecError, match="five digits"):
            codebook(level_spec(bits=1.58), ternary)
    with pytest.raises(HeadSpecError, match=r"Classes 0 and 1 have the same levels"):
        level_spec().resolve(np.zeros((30, 12), np.uint8))


@pytest.mark.parametrize("bits", LEVELS)
def test_a_spec_of_levels_is_read_back_and_verifies_what_is_stored(bits):
    levels, n = LEVELS[bits], 44
    drawn = np.random.default_rng(0).choice(levels.values, (30, n))
    packed = pack_levels(drawn, levels)
    spec = level_spec(bits=bits).resolve(packed)
    assert HeadSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.bytes_per_class == levels.num_bytes(n) + 1
    rotation = KINDS["binary"].rotation(spec).basis()
    expected = drawn @ rotation.T / (n * levels.mean_square) ** 0.5
    np.testing.assert_allclose(codebook(spec, packed), expected, atol=1e-6)
    drawn[4, 7] = levels.values[0] if drawn[4, 7] != levels.values[0] else levels.values[1]
    with pytest.raises(CodebookMismatchError):
        spec.resolve(pack_levels(drawn, levels))


@pytest.mark.parametrize("bits", LEVELS)
def test_the_constants_of_levels_are_those_of_a_normal_distribution(bits):
    """`step` is the best distance of levels, and `mean_square` that of the levels at it."""
    levels = LEVELS[bits]
    x = np.linspace(-8, 8, 40001)
    weights = np.exp(-(x**2) / 2)
    weights /= weights.sum()
    values = np.array(levels.values)

    def rounded(step):
        return values[np.abs(x[:, None] / step * levels.spacing - values).argmin(axis=1)]

    def error(step):
        return float((weights * (x - rounded(step) * step / levels.spacing) ** 2).sum())

    assert error(levels.step) < min(error(levels.step * 0.97), error(levels.step * 1.03))
    assert levels.mean_square == pytest.approx(float((weights * rounded(levels.step) ** 2).sum()), rel=0.02)


# --- Identity


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200), st.data())
def test_identity_is_the_first_rows_of_the_identity(n, data):
    c = data.draw(st.integers(1, n))
    spec = HeadSpec("identity", n, c).resolve()
    assert np.array_equal(codebook(spec), np.eye(n)[:c])
    assert spec.digest.startswith("sha256:") and spec.construction is None
    assert HeadSpec.from_dict(spec.to_dict()).resolve() == spec
    assert HeadSpec("identity", n, c, seed=5).resolve().digest == spec.digest, "nothing in it is random"


def test_identity_with_more_classes_than_features_is_refused():
    with pytest.raises(HeadSpecError, match=r"64 features .* 64 classes, got 65") as error:
        HeadSpec("identity", 64, 65)
    assert "hadamard" in error.value.hint and "orthogonal" in error.value.hint
    for options in ({"matched": True}, {"blocks": 1}, {"bits_per_class": 8}, {"construction": "sylvester-64"}):
        with pytest.raises(HeadSpecError):
            HeadSpec("identity", 64, 10, **options)
