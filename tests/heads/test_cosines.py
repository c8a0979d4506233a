import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import HeadSpecError
from fixify.heads import HeadSpec, codebook, coherence, planned_coherence, rankin_bound, welch_bound
from fixify.heads.levels import LEVELS
from fixify.heads.signs import pack_levels


def test_known_bounds():
    assert welch_bound(64, 64) == 0
    assert welch_bound(2, 3) == pytest.approx(0.5)  # three lines in a plane, 60 degrees
    assert rankin_bound(64, 65) == pytest.approx(-1 / 64)
    assert rankin_bound(64, 66) == 0


@pytest.mark.parametrize(
    ("spec", "max_cosine", "max_abs"),
    [
        (HeadSpec("hadamard", 1280, 1000), 0, 0),
        (HeadSpec("hadamard", 768, 1000), 0, 1),
        (HeadSpec("hadamard", 256, 2965), 1 / 16, 1),
        (HeadSpec("hadamard", 1024, 2100), 1 / 32, 1),
        (HeadSpec("simplex", 64, 65), -1 / 64, 1 / 64),
        (HeadSpec("identity", 64, 64), 0, 0),
    ],
)
def test_known_coherences(spec, max_cosine, max_abs):
    result = coherence(spec)
    assert result.max_cosine == pytest.approx(max_cosine, abs=1e-6)
    assert result.max_abs == pytest.approx(max_abs, abs=1e-6)
    assert result.classes_checked == spec.num_classes


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["hadamard", "orthogonal"]), st.sampled_from([12, 20, 64, 96]), st.integers(1, 400))
def test_no_codebook_beats_the_bounds(kind, n, c):
    result = coherence(HeadSpec(kind, n, c))
    assert result.max_abs >= result.welch - 1e-6
    assert result.max_cosine >= result.rankin - 1e-6
    assert result.rms_cosine <= result.max_abs + 1e-6


def test_sums_over_parts_are_those_of_the_whole(monkeypatch):
    spec = HeadSpec("orthogonal", 24, 300)
    book = codebook(spec).astype(np.float64)
    gram = (book @ book.T)[~np.eye(300, dtype=bool)]
    module = importlib.import_module("fixify.heads.cosines")
    monkeypatch.setattr(module, "_BLOCK", 37)
    result = coherence(spec)
    assert result.max_cosine == pytest.approx(gram.max(), abs=1e-6)
    assert result.max_abs == pytest.approx(np.abs(gram).max(), abs=1e-6)
    assert result.rms_cosine == pytest.approx((gram**2).mean() ** 0.5, abs=1e-6)
    monkeypatch.setattr(module, "_EXACT_CLASSES", 100)
    monkeypatch.setattr(module, "_SAMPLED_CLASSES", 50)
    sampled = coherence(spec)
    assert sampled.classes_checked == 50
    assert sampled.max_cosine <= result.max_cosine
    assert sampled.rms_cosine == pytest.approx(result.rms_cosine, abs=1e-6)


def test_one_class_has_no_pairs():
    result = coherence(HeadSpec("hadamard", 64, 1))
    assert (result.max_cosine, result.rms_cosine, result.max_abs) == (-1, 0, 0)


def test_matched_heads():
    codes = np.array([1, 2 * 64 + 5, 4 * 64 + 9])
    result = coherence(HeadSpec("hadamard", 64, 3, matched=True, blocks=3), codes)
    assert result.max_abs == pytest.approx(1 / 8, abs=1e-6)


def test_levels_of_any_norm_have_cosines():
    levels = LEVELS[3]
    drawn = np.random.default_rng(0).choice(levels.values, (20, 44))
    drawn[1] = 7 * np.sign(drawn[0])
    drawn[0] = np.sign(drawn[0])  # the same direction, seven times as short
    spec = HeadSpec("binary", 44, 20, bits_per_weight=3, gains=True)
    found = coherence(spec, pack_levels(drawn, levels))
    assert found.max_cosine == pytest.approx(1.0)
    assert found.max_abs <= 1.0 + 1e-6


@pytest.mark.parametrize(
    ("kind", "n", "c", "is_known"),
    [
        ("hadamard", 64, 60, True),
        ("hadamard", 64, 65, False),
        ("orthogonal", 40, 40, True),
        ("orthogonal", 40, 41, False),
        ("simplex", 40, 41, True),
        ("simplex", 40, 2, True),
        ("identity", 40, 7, True),
        ("identity", 40, 1, False),
    ],
)
def test_cosines_that_follow_from_the_construction_are_those_measured(kind, n, c, is_known):
    spec = HeadSpec(kind, n, c)
    planned, measured = planned_coherence(spec), coherence(spec)
    assert planned.classes_checked == (0 if is_known else c)
    for name in ("max_cosine", "rms_cosine", "max_abs", "welch", "rankin"):
        assert getattr(planned, name) == pytest.approx(getattr(measured, name), abs=1e-6), name


def test_codes_in_another_order_are_measured():
    with pytest.raises(HeadSpecError):  # it needs the code indices
        planned_coherence(HeadSpec("hadamard", 64, 3, matched=True, blocks=1))
