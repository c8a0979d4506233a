"""Compute word vectors that the language model does not learn (Hoffer et al., section 3.3)."""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from fixify._values import counted
from fixify.errors import FixifyError, UsageError
from fixify.heads import HeadSpec, codebook
from fixify.language.corpus import END_OF_LINE, Corpus

Kind = Literal["orthogonal", "hadamard", "pmi", "word2vec"]
REBUILT = ("orthogonal", "hadamard")
"""Kinds that need no text and are rebuilt instead of stored."""

WINDOW = 5
"""Words on each side that are a word's context, as in the experiments of word2vec and of Levy & Goldberg."""
SHIFT = 1
"""Levy & Goldberg's k: the shifted PMI subtracts log k; 1 does not shift."""
SMOOTHING = 0.75
"""Exponent of the context counts, which weakens rare contexts (Levy, Goldberg & Dagan, 2015)."""
_PASSES = 15


def word_vectors(kind: Kind, corpus: Corpus, width: int, *, seed: int = 0) -> Tensor:
    """Compute a unit vector for each word, float32 [C, width], from the training text alone.

    - orthogonal: the paper's random transform; its columns are orthonormal (there are more words than features).
    - hadamard: codes of sign-flipped Hadamard matrices, ordered by word frequency.
    - pmi: positive pointwise mutual information of words and their contexts, factorised by a truncated SVD, U sqrt(S)
      (Levy & Goldberg, 2014, sections 3.3 and 4.2), minus the mean word.
    - word2vec: skip-gram with negative sampling (Mikolov et al., 2013), by gensim, minus the mean word.

    Args:
        kind: Kind of vectors.
        corpus: The text.
        width: Number of features.
        seed: Seed of the random parts.

    Raises:
        UsageError: word2vec without gensim.
        FixifyError: the text has fewer words than features.
    """
    if kind in REBUILT:
        return torch.tensor(codebook(rebuilt_spec(kind, len(corpus.words), width, seed=seed)))
    if width >= len(corpus.words):
        words = counted(len(corpus.words), "word")
        raise FixifyError(f"{words} cannot be factorised into {counted(width, 'feature')}. Use fewer features.")
    found = _pmi(corpus, width, seed) if kind == "pmi" else _word2vec(corpus, width, seed)
    return F.normalize(found - found.mean(dim=0), dim=1)


@functools.cache  # a large random codebook takes seconds to hash, and every save needs the digest
def rebuilt_spec(kind: str, num_words: int, width: int, *, seed: int = 0) -> HeadSpec:
    """Make the head spec, with its digest, from which vectors of a `REBUILT` kind are rebuilt."""
    return HeadSpec(kind, width, num_words, seed=seed).resolve()


def _pmi(corpus: Corpus, width: int, seed: int) -> Tensor:
    pairs = _pairs(corpus.train.numpy(), len(corpus.words))
    words = np.asarray(pairs.sum(axis=1)).ravel()
    contexts = words**SMOOTHING
    pairs = pairs.tocoo()
    total = contexts.sum()
    with np.errstate(divide="ignore"):
        information = np.log(pairs.data * total / (words[pairs.row] * contexts[pairs.col])) - math.log(SHIFT)
    kept = information > 0
    positive = scipy.sparse.csr_matrix(
        (information[kept].astype(np.float32), (pairs.row[kept], pairs.col[kept])), shape=pairs.shape
    )
    start = np.random.Generator(np.random.Philox(seed)).standard_normal(positive.shape[0]).astype(np.float32)
    left, values, _ = scipy.sparse.linalg.svds(positive, k=width, v0=start)
    return torch.from_numpy(np.ascontiguousarray((left * np.sqrt(values))[:, ::-1]))


def _pairs(words: np.ndarray, count: int) -> scipy.sparse.csr_matrix:
    """Count how often two words are within the window of each other, [C, C], symmetric; nearer ones count more."""
    total = scipy.sparse.csr_matrix((count, count), dtype=np.float64)
    for distance in range(1, WINDOW + 1):
        weight = (WINDOW + 1 - distance) / WINDOW  # the expectation of word2vec's random windows
        ones = np.full(len(words) - distance, weight)
        total = total + scipy.sparse.coo_matrix((ones, (words[:-distance], words[distance:])), (count, count)).tocsr()
    return total + total.T


def _word2vec(corpus: Corpus, width: int, seed: int) -> Tensor:
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise UsageError("word2vec vectors need gensim.", hint="pip install 'fixify[lm]'") from error
    text = [str(number) for number in corpus.train.tolist()]
    lines, line, end = [], [], str(corpus.words.index(END_OF_LINE))
    for word in text:
        line.append(word)
        if word == end:
            lines.append(line)
            line = []
    model = Word2Vec(
        lines, vector_size=width, window=WINDOW, min_count=1, sg=1, negative=5, sample=1e-4, epochs=_PASSES,
        seed=seed + 1, workers=1,
    )  # fmt: skip
    return torch.from_numpy(np.stack([model.wv[str(number)] for number in range(len(corpus.words))]))
