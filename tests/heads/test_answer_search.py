from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fixify.heads import answer_search as module
from fixify.heads.answer_search import Answers, refine_levels_
from fixify.heads.codes import unpacked_levels
from fixify.heads.level_search import choose_levels
from fixify.heads.levels import LEVELS, SIGNS, Levels

N, C, S = 24, 30, 6 * 24
RATES = (SIGNS, *LEVELS.values())


def quiet(what: str, done: int, total: int) -> None:
    """Ignore progress."""


class Problem:
    """A classifier without the mean of its class vectors, samples, a metric, and levels chosen by the metric."""

    def __init__(self, levels: Levels, seed: int, d: int = N) -> None:
        draw = torch.Generator().manual_seed(seed)
        mix = torch.randn(N, N, generator=draw) * torch.logspace(0, -1, N)
        self.vectors = 0.3 * torch.randn(C, N, generator=draw)
        self.vectors -= self.vectors.mean(dim=0)
        self.features = torch.randn(S, N, generator=draw) @ mix
        self.answers = Answers.of(self.features, torch.zeros(N), torch.ones(N), self.vectors, None)
        self.moment = self.features.T @ self.features / S + 0.1 * torch.eye(N)
        self.directions = torch.linalg.qr(torch.randn(N, N, generator=draw))[0][:, :d].contiguous()
        self.levels = levels
        self.packed, self.steps = choose_levels(self.vectors, self.directions, self.moment, levels, quiet)

    def refine(self) -> None:
        refine_levels_(self.packed, self.steps, self.vectors, self.directions, self.moment, self.levels, self.answers)

    def errors(self) -> torch.Tensor:
        """Class vectors minus those of the levels, [C, N]."""
        q = torch.from_numpy(unpacked_levels(self.packed, self.directions.shape[1], self.levels)).float()
        return self.vectors - (q * self.steps[:, None]) @ self.directions.T

    def objective(self) -> float:
        """What the search lowers, from its definition."""
        errors, answers = self.errors(), self.answers
        logits = (answers.features @ errors.T).gather(1, answers.classes)
        common = (answers.softmax * logits).sum(dim=1, keepdim=True)
        of_answers = float((answers.softmax * (logits - common).square()).sum())
        touched = errors[answers.classes.unique()]
        return of_answers + module._METRIC_SAMPLES * float(((touched @ self.moment) * touched).sum())

    def divergence(self) -> float:
        old = self.features @ self.vectors.T
        new = old - self.features @ self.errors().T
        return float(F.kl_div(new.log_softmax(1), old.log_softmax(1), log_target=True, reduction="batchmean"))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(RATES), st.integers(0, 1000), st.sampled_from((N, N // 2)))
def test_what_is_lowered_never_rises(levels: Levels, seed: int, d: int) -> None:
    problem = Problem(levels, seed, d)
    before = problem.objective()
    problem.refine()
    assert problem.objective() <= before * (1 + 1e-4)


@pytest.mark.parametrize("levels", RATES, ids=lambda levels: f"{levels.bits:g} bits")
def test_answers_to_the_samples_are_nearer(levels: Levels) -> None:
    problem = Problem(levels, 0)
    before = problem.divergence()
    problem.refine()
    assert problem.divergence() < 0.99 * before


def test_classes_that_are_never_near_the_top_stay() -> None:
    problem = Problem(LEVELS[4], 1)
    kept = [each[problem.answers.classes.amax(dim=1) < 25, :] for each in vars(problem.answers).values()]
    problem.answers = Answers(*(each.repeat(1000 // len(each), 1) for each in kept))
    before = problem.packed.copy()
    problem.refine()
    changed = np.flatnonzero((problem.packed != before).any(axis=1))
    assert len(changed)
    assert changed.max() < 25


def test_a_few_samples_decide_nothing(draw) -> None:
    features, weight = draw(6 * 4, 4), draw(9, 4, seed=1)
    assert Answers.of(features[1:], torch.zeros(4), torch.ones(4), weight, None) is None
    more = Answers.of(features.repeat(3, 1), torch.zeros(4), torch.ones(4), weight, None)
    assert more is not None and torch.equal(more.features, features.repeat(2, 1))


def test_the_likeliest_classes_are_asked(draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)
    features, weight, bias = draw(36, 6), draw(40, 6, seed=1), draw(40, seed=2)
    mean, std = features.mean(dim=0), features.std(dim=0)
    found = Answers.of(features, mean, std, weight, bias)
    logits = features @ weight.T + bias
    assert torch.equal(found.classes[:, 0], logits.argmax(dim=1))
    torch.testing.assert_close(found.softmax.sum(dim=1), torch.ones(36))
    torch.testing.assert_close(found.softmax[:, 0] / found.softmax[:, 1], (-logits.topk(2).values.diff()[:, 0]).exp())
    torch.testing.assert_close(found.features.mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)
    assert Answers.of(features, mean, std, weight[:3], bias[:3]).classes.shape == (36, 3)
