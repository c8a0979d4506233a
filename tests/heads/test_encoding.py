from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.errors import HeadSpecError
from fixify.heads import FixedClassifier, HeadSpec, codebook, encode, level_search
from fixify.heads import encoding as module
from fixify.heads.answer_search import Answers
from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.codes import unpacked_levels
from fixify.heads.kinds import BINARY
from fixify.heads.levels import LEVELS


def spec_of(n: int, c: int, bits: int, **options) -> HeadSpec:
    return HeadSpec("binary", n, c, bits_per_class=bits, gains=True, normalize=False, **options)


def head_of(spec: HeadSpec, vectors: torch.Tensor, **options) -> FixedClassifier:
    found = encode(spec, vectors, **options)
    return FixedClassifier(
        spec, codes=torch.from_numpy(found.codes), gains=torch.from_numpy(found.gains), scale=found.scale
    )


@pytest.mark.parametrize(
    ("n", "c", "bits"), [(4, 9, 4), (12, 30, 5), (20, 40, 13), (22, 40, 22), (64, 40, 24), (64, 2, 1)]
)
def test_logits_are_those_of_the_codebook(draw, n: int, c: int, bits: int) -> None:
    head, x = head_of(spec_of(n, c, bits), draw(c, n)), draw(5, n, seed=1)
    torch.testing.assert_close(head(x), head.scale * x @ head.codebook().T, rtol=1e-4, atol=1e-5)


def test_without_features_the_signs_are_those_of_the_vectors(draw) -> None:
    vectors = draw(30, 22)  # no Hadamard matrix: no rotation
    found = encode(spec_of(22, 30, 22), vectors)
    centered = vectors - vectors.mean(dim=0)
    signs = torch.from_numpy(1 - 2 * np.unpackbits(found.codes, axis=1, count=22).astype(np.int8))
    assert torch.equal(signs.float(), centered.sign())
    # the best length of a code is the mean absolute weight; scale and gains say the same
    lengths = torch.from_numpy(found.gains).float() / GAIN_STEPS * found.scale / 22**0.5
    torch.testing.assert_close(lengths, centered.abs().mean(dim=1), rtol=5e-3, atol=5e-3)


def test_features_that_vary_in_few_directions_are_heeded(draw) -> None:
    """The error that features see is a fraction of that of plain signs."""
    n, c = 64, 50
    vectors = draw(c, n) - draw(c, n).mean(dim=0)
    mix = draw(n, n, seed=5) @ torch.diag(torch.logspace(0, -2, n))
    moment = mix @ mix.T

    def lost(head: FixedClassifier) -> float:
        difference = vectors - head.scale.detach() * head.codebook()
        return float(((difference @ moment) * difference).sum())

    heeded = lost(head_of(spec_of(n, c, n), vectors, feature_moment=moment))
    assert heeded < 0.4 * lost(head_of(spec_of(n, c, n), vectors))
    total = float(((vectors @ moment) * vectors).sum())
    assert heeded < 0.2 * total


def test_more_bits_are_nearer(draw) -> None:
    vectors, moment = draw(200, 64), torch.diag(torch.logspace(0, -3, 64))
    x = draw(500, 64, seed=2) @ moment.sqrt()
    old = x @ (vectors - vectors.mean(dim=0)).T
    errors = []
    for bits in (8, 16, 32, 64):
        head = head_of(spec_of(64, 200, bits), vectors, feature_moment=moment)
        errors.append(float((head(x).detach() - old).square().mean() / old.square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2


def test_equal_classes_get_different_signs() -> None:
    vectors = torch.cat((torch.ones(20, 16), -torch.ones(3, 16)))
    found = encode(spec_of(16, 23, 5), vectors)
    assert len({code.tobytes() for code in found.codes}) == 23
    with pytest.raises(HeadSpecError, match="cannot be told apart") as error:
        encode(spec_of(16, 3, 5), torch.ones(3, 16))
    assert "--head hadamard" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("vectors", "moment"),
    [
        (torch.full((30, 64), torch.nan), None),
        (torch.ones(29, 64), None),
        (torch.ones(30, 64), torch.eye(3)),
        (torch.ones(30, 64), torch.full((64, 64), torch.inf)),
    ],
)
def test_values_that_do_not_fit_are_refused(vectors: torch.Tensor, moment: torch.Tensor | None) -> None:
    with pytest.raises(HeadSpecError, match=r"must be finite, \[(30|64), 64\]"):
        encode(spec_of(64, 30, 24), vectors, feature_moment=moment)


def _moment(n: int) -> torch.Tensor:
    mix = torch.randn(n, n, generator=torch.Generator().manual_seed(5)) @ torch.diag(torch.logspace(0, -2, n))
    return mix @ mix.T


def test_answers_need_a_metric(draw) -> None:
    vectors = draw(30, 16)
    answers = Answers.of(draw(96, 16, seed=1), torch.zeros(16), torch.ones(16), vectors, None)
    with pytest.raises(HeadSpecError, match="give both"):
        encode(spec_of(16, 30, 16), vectors, answers=answers)


@pytest.mark.parametrize("bits", [8, 20])
def test_codes_chosen_by_answers_are_all_different(draw, bits: int) -> None:
    """Classes that are equal are told apart after the last search too."""
    vectors = draw(30, 20)
    vectors[20:] = vectors[:10]
    answers = Answers.of(draw(200, 20, seed=1), torch.zeros(20), torch.ones(20), vectors, None)
    codes = encode(spec_of(20, 30, bits), vectors, feature_moment=_moment(20), answers=answers).codes
    assert len(np.unique(codes, axis=0)) == 30


def _separated_one_by_one(packed: np.ndarray, num_signs: int) -> np.ndarray:
    """What `separate_` does, without its memory of where each group of equals stopped."""
    taken: set[bytes] = set()
    made = []
    for first in packed:
        bits = np.unpackbits(first, count=num_signs)
        code, count = first, 0
        while code.tobytes() in taken:
            count += 1
            flips = np.array([int(bit) for bit in np.binary_repr(count, width=num_signs)], dtype=np.uint8)
            code = np.packbits(bits ^ flips)
        taken.add(code.tobytes())
        made.append(code)
    return np.array(made)


def test_groups_of_equal_classes_are_separated_as_one_by_one() -> None:
    packed = np.random.default_rng(0).integers(0, 4, (200, 1), dtype=np.uint8) << 3
    packed = np.concatenate((packed, np.full((200, 1), 5, dtype=np.uint8)), axis=1)
    expected = _separated_one_by_one(packed, 16)
    module.separate_(packed, 16)
    assert np.array_equal(packed, expected)
    assert len(np.unique(packed, axis=0)) == 200


def test_thousands_of_equal_classes_take_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that were never trained have equal vectors; each group once started from its first code again."""
    steps = []
    packbits = np.packbits
    monkeypatch.setattr(module.np, "packbits", lambda bits: (steps.append(1), packbits(bits))[1])
    packed = np.zeros((3000, 4), dtype=np.uint8)
    module.separate_(packed, 32)
    assert len(np.unique(packed, axis=0)) == 3000
    assert len(steps) < 3000


def test_progress_ends_at_the_number_of_classes(draw) -> None:
    told: list[tuple[str, int, int]] = []
    encode(spec_of(20, 40, 20), draw(40, 20), on_progress=lambda *now: told.append(now))
    assert told[-1][1] == told[-1][2]


# --- Levels


def level_spec(n: int, c: int, bits: float) -> HeadSpec:
    return HeadSpec("binary", n, c, bits_per_weight=bits, gains=True, normalize=False)


def _lost(head: FixedClassifier, vectors: torch.Tensor, moment: torch.Tensor) -> float:
    difference = vectors - vectors.mean(dim=0) - head.scale.detach() * head.codebook()
    return float(((difference @ moment) * difference).sum())


@pytest.mark.parametrize("n", [64, 22], ids=["rotated", "as they are"])
@pytest.mark.parametrize("with_features", [False, True])
def test_more_bits_per_weight_are_nearer(draw, n: int, with_features: bool) -> None:
    vectors = draw(60, n)
    moment = _moment(n) if with_features else torch.eye(n)
    options = {"feature_moment": moment} if with_features else {}
    total = float((((vectors - vectors.mean(dim=0)) @ moment) * (vectors - vectors.mean(dim=0))).sum())
    heads = [head_of(spec_of(n, 60, n), vectors, **options)]
    heads += [head_of(level_spec(n, 60, bits), vectors, **options) for bits in LEVELS]
    errors = [_lost(head, vectors, moment) / total for head in heads]
    assert errors == sorted(errors, reverse=True)
    # of normally distributed weights alone: 0.363, 0.190, 0.119, 0.037, 0.012 (Max, 1960)
    limits = (0.4, 0.22, 0.14, 0.05, 0.02)
    assert all(error < limit for error, limit in zip(errors, limits, strict=True))
    if with_features:
        plain = [head_of(level_spec(n, 60, bits), vectors) for bits in LEVELS]
        assert all(
            error < 0.8 * _lost(head, vectors, moment) / total for error, head in zip(errors[1:], plain, strict=True)
        )


@pytest.mark.parametrize("bits", LEVELS)
def test_no_other_level_of_one_weight_is_nearer(draw, bits: float) -> None:
    """Coordinate descent ends where no single change helps, with the row scales that are stored."""
    n, c, levels = 20, 15, LEVELS[bits]
    vectors, moment = draw(c, n), _moment(n)
    spec = level_spec(n, c, bits)
    found = encode(spec, vectors, feature_moment=moment)
    basis = torch.from_numpy(BINARY.rotation(spec).basis())
    wanted, within = (vectors - vectors.mean(dim=0)) @ basis, basis.T @ moment @ basis
    steps = torch.from_numpy(found.gains).float() / GAIN_STEPS * found.scale / (n * levels.mean_square) ** 0.5
    chosen = torch.from_numpy(unpacked_levels(found.codes, n, levels)).float()

    def lost(q: torch.Tensor) -> torch.Tensor:
        difference = wanted - steps[:, None] * q
        return ((difference @ within) * difference).sum(dim=1)

    least = lost(chosen)
    for i in range(n):
        for value in levels.values:
            other = chosen.clone()
            other[:, i] = value
            assert bool((lost(other) >= least * (1 - 1e-4)).all())


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(list(LEVELS)), st.integers(8, 40), st.integers(2, 30), st.integers(0, 99), st.booleans())
def test_levels_of_any_classifier_make_a_head(bits: float, n: int, c: int, seed: int, with_features: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(c, n, generator=generator) * torch.logspace(-2, 1, c)[:, None]
    features = torch.randn(5, n, generator=generator)  # of low rank
    head = head_of(level_spec(n, c, bits), vectors, feature_moment=features.T @ features if with_features else None)
    x = torch.randn(3, n, generator=generator)
    torch.testing.assert_close(head(x), head.scale * x @ head.codebook().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", LEVELS)
def test_equal_classes_get_different_levels(bits: float) -> None:
    vectors = torch.cat((torch.ones(200, 12), -torch.ones(3, 12)))
    codes = encode(level_spec(12, 203, bits), vectors).codes
    assert len({code.tobytes() for code in codes}) == 203
    codebook(level_spec(12, 203, bits), codes)  # still levels
    with pytest.raises(HeadSpecError, match="cannot be told apart"):
        encode(level_spec(16, 3, bits), torch.ones(3, 16))


@pytest.mark.parametrize("with_features", [False, True])
@pytest.mark.parametrize("spec", [level_spec(152, 30, 2), spec_of(152, 30, 152), spec_of(152, 30, 40)], ids=repr)
def test_classes_do_not_depend_on_each_other(
    draw, spec: HeadSpec, with_features: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, moment = draw(30, 152), _moment(152) if with_features else None
    whole = encode(spec, vectors, feature_moment=moment)
    monkeypatch.setattr(level_search, "_CLASSES_PER_BLOCK", 7)
    parts = encode(spec, vectors, feature_moment=moment)
    assert (whole.codes != parts.codes).mean() < 0.01  # rounding may turn a tie
    assert parts.scale == pytest.approx(whole.scale, rel=1e-4)


def test_progress_of_levels_ends_at_its_total(draw) -> None:
    told: list[tuple[str, int, int]] = []
    encode(level_spec(20, 40, 3), draw(40, 20), on_progress=lambda *now: told.append(now))
    assert told[-1][1] == told[-1][2]
