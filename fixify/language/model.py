"""Build a language model from its options and a text, and count its parameters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fixify.data.seeding import derive_seed, seeded_globals
from fixify.language.corpus import Corpus
from fixify.language.network import LanguageModel, WordClassifier
from fixify.language.options import LanguageOptions
from fixify.language.vectors import Kind, word_vectors

_WEIGHTS = 1
"""Random stream of the initial weights; `fixify.language.loop` has others."""
_INIT = 0.1
"""Learned embeddings and classifiers start uniform in -0.1 .. 0.1, as in Merity et al.'s code (2017)."""


@dataclass(frozen=True)
class Size:
    """Numbers of parameters, as Table 2 of the paper counts them.

    Attributes:
        parameters: Parameters of the model if embedding and classifier were both learned ("# Params").
        fixed: Weights of these two that are not learned; if they are tied, the weights that are shared.
        learned: Parameters that are learned.
    """

    parameters: int
    fixed: int
    learned: int

    @property
    def share(self) -> float:
        """Percent of the parameters that are not learned ("% Fixed params").

        >>> Size(parameters=200, fixed=50, learned=150).share
        25.0
        """
        return 100 * self.fixed / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the values, JSON-safe."""
        return {**asdict(self), "share": self.share}


def build_model(options: LanguageOptions, corpus: Corpus) -> LanguageModel:
    """Build a language model with its initial weights; the LSTM depends on the seed but not on the word vectors.

    Raises:
        FixifyError: see `fixify.language.vectors.word_vectors`.
    """
    vectors = None
    if not options.is_learned:
        vectors = word_vectors(cast(Kind, options.words), corpus, options.num_features, seed=options.seed)
    model = assemble(options, len(corpus.words), vectors)
    # The bias starts at the word frequencies, so that only the context has to be learned.
    with torch.no_grad():
        model.classifier.bias.copy_((corpus.counts / corpus.counts.sum()).log())  # type: ignore[operator]
    return model


def assemble(options: LanguageOptions, num_words: int, vectors: Tensor | None) -> LanguageModel:
    """Assemble a language model with zero bias, from fixed unit vectors [C, N] or None for learned words."""
    width = options.num_features
    with seeded_globals(derive_seed(options.seed, _WEIGHTS), torch.device("cpu")):
        layers = [nn.LSTM(width, width) for _ in range(options.num_layers)]
        if vectors is None:
            embedding, classifier = _learned(num_words, options)
        else:
            embedding, classifier = _fixed(vectors, options)
    scale = 1.0 if vectors is None else options.embedding_scale
    return LanguageModel(embedding, layers, classifier, embedding_scale=scale, dropouts=options.dropouts())


def _learned(num_words: int, options: LanguageOptions) -> tuple[nn.Embedding, nn.Module]:
    embedding = nn.Embedding(num_words, options.num_features)
    classifier = nn.Linear(options.num_features, num_words)
    if options.words == "tied":
        classifier.weight = embedding.weight
    for weight in (embedding.weight, classifier.weight):
        nn.init.uniform_(weight, -_INIT, _INIT)
    nn.init.zeros_(classifier.bias)
    return embedding, classifier


def _fixed(vectors: Tensor, options: LanguageOptions) -> tuple[nn.Embedding, nn.Module]:
    if options.head_signs:
        vectors = torch.where(vectors < 0, -1.0, 1.0) / math.sqrt(vectors.shape[1])
    embedding = nn.Embedding.from_pretrained(vectors)
    return embedding, WordClassifier(
        embedding.weight,
        normalize=options.head_normalize,
        rank=options.head_rank,
        scale=options.head_scale,
        fixed_scale=options.head_fixed_scale,
    )


def size_of(model: LanguageModel, options: LanguageOptions) -> Size:
    """Count the parameters of a model."""
    words = model.embedding.weight.numel()
    lstm = sum(parameter.numel() for parameter in model.layers.parameters())
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fixed = {"learned": 0, "tied": words}.get(options.words, 2 * words)
    return Size(lstm + 2 * words + model.num_words, fixed, learned)
