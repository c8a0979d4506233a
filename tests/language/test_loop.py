from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fixify.language import Corpus, LanguageOptions
from fixify.language.loop import predict, sequence_bounds, side_by_side
from fixify.language.model import build_model


def test_parts_go_on_from_step_to_step() -> None:
    found = side_by_side(torch.arange(11), 3)
    assert found.T.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("vary", [False, True])
@pytest.mark.parametrize("length", [2, 36, 37, 500])
def test_steps_cover_every_word_that_has_a_next_one_once(length: int, vary: bool) -> None:
    found = sequence_bounds(length, 35, vary=vary, seed=1)
    assert [word for begin, size in found for word in range(begin, begin + size)] == list(range(length - 1))
    assert found == sequence_bounds(length, 35, vary=vary, seed=1)


def test_lengths_vary_around_the_length_and_its_half() -> None:
    sizes = [size for _, size in sequence_bounds(200_000, 70, vary=True, seed=0)][:-1]
    assert min(sizes) >= 5
    assert 66 < sum(sizes) / len(sizes) < 70  # 0.95 * 70 + 0.05 * 35
    assert 0.02 < sum(size < 50 for size in sizes) / len(sizes) < 0.08


def test_perplexity_is_of_every_word_from_all_before_it(
    corpus: Corpus, small: LanguageOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, with a state that is carried on, it is what one pass over the whole text gives."""
    model = build_model(small, corpus).train()
    end = corpus.words.index("<eos>")
    monkeypatch.setattr("fixify.language.loop._MAX_LOGITS", 13 * len(corpus.words))
    found = predict(model, corpus.val, end, torch.device("cpu"))
    assert model.training
    model.eval()
    before = torch.cat([torch.tensor([end]), corpus.val[:-1]])
    logits, _ = model(before[:, None], model.start(1))
    loss = F.cross_entropy(logits[:, 0], corpus.val).item()
    assert found.words == len(corpus.val)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
