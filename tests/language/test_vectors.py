from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from fixify.errors import FixifyError
from fixify.language import Corpus, word_vectors
from fixify.language.vectors import SMOOTHING, WINDOW


@pytest.mark.parametrize("kind", ["orthogonal", "hadamard", "pmi"])
def test_one_unit_vector_a_word_and_the_same_again(corpus: Corpus, kind: str) -> None:
    found = word_vectors(kind, corpus, 16, seed=3)  # type: ignore[arg-type]
    assert found.shape == (len(corpus.words), 16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    torch.testing.assert_close(word_vectors(kind, corpus, 16, seed=3), found)  # type: ignore[arg-type]


def test_orthogonal_vectors_are_a_tight_frame(corpus: Corpus) -> None:
    found = word_vectors("orthogonal", corpus, 16).double()
    gram = found.T @ found * 16 / len(found)
    assert (gram - torch.eye(16)).abs().max() < 0.6  # rows are rescaled to unit length after the columns were made so


def test_pmi_is_the_factorised_positive_information_of_words_and_contexts(corpus: Corpus) -> None:
    """Against counting pairs one by one, and numpy's dense SVD; up to the signs of the factors."""
    words, count, width = corpus.train.tolist(), len(corpus.words), 8
    pairs: Counter[tuple[int, int]] = Counter()
    for middle, word in enumerate(words):
        for offset in itertools.chain(range(-WINDOW, 0), range(1, WINDOW + 1)):
            if 0 <= middle + offset < len(words):
                pairs[word, words[middle + offset]] += (WINDOW + 1 - abs(offset)) / WINDOW  # type: ignore[assignment]
    table = np.zeros((count, count))
    for (word, context), weight in pairs.items():
        table[word, context] = weight
    contexts = table.sum(axis=0) ** SMOOTHING
    wanted = np.zeros_like(table)
    for word, context in pairs:
        information = math.log(table[word, context] * contexts.sum() / (table[word].sum() * contexts[context]))
        wanted[word, context] = max(0.0, information)
    left, values, _ = np.linalg.svd(wanted)
    vectors = left[:, :width] * np.sqrt(values[:width])
    vectors -= vectors.mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = word_vectors("pmi", corpus, width).double().numpy()
    np.testing.assert_allclose(found @ found.T, vectors @ vectors.T, atol=1e-3)


def test_word2vec_puts_words_that_stand_together_together(corpus: Corpus) -> None:
    pytest.importorskip("gensim")
    found = word_vectors("word2vec", corpus, 16)
    assert found.shape == (len(corpus.words), 16)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))


def test_more_features_than_words_are_refused(corpus: Corpus) -> None:
    with pytest.raises(FixifyError, match="cannot be factorised into 64 features"):
        word_vectors("pmi", corpus, 64)
