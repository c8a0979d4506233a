"""The language model of the paper's section 3.3: an LSTM between an embedding and a classifier of words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixify.heads import initial_scale

State = list[tuple[Tensor, Tensor]]


class Dropouts(NamedTuple):
    """Dropout probabilities, as in Merity et al. (2017), sections 3 and 4.2 to 4.4.

    Attributes:
        words: Of whole words of the embedding, for a batch.
        inputs, hidden, output: Of features of the LSTM's inputs, between its layers, and of its output. A sequence
            loses the same features at every step.
        weights: Of hidden-to-hidden weights of the LSTM (DropConnect).
    """

    words: float = 0.0
    inputs: float = 0.0
    hidden: float = 0.0
    output: float = 0.0
    weights: float = 0.0


class Output(NamedTuple):
    """The output of the LSTM for a batch of B sequences of T words.

    Attributes:
        features: After dropout, [T, B, N]; the input of the classifier.
        raw: Before dropout, [T, B, N].
        state: Of each layer, for the next batch.
    """

    features: Tensor
    raw: Tensor
    state: State


class WordClassifier(nn.Module):
    """A fixed classifier of given vectors: `logits = scale * normalize(x) @ Q.T + bias` (paper, section 2.2).

    Learned: `scale` [] (unless it is fixed), `bias` [C], `down` [rank, N] and `up` [C, rank].

    Args:
        codes: Q, the unit vectors of the words, [C, N], not learned. They are not copied, because the embedding shares
            them.
        normalize: Divide features by their norm, as in the paper. Without it the norm expresses the confidence in each
            prediction, which one scale for all words cannot.
        rank: Rank of a learned correction of Q, `up @ down`; 0: no correction.
        scale: Initial alpha; None: `initial_scale` of C if features are normalised, else 1.
        fixed_scale: Do not learn alpha.
    """

    def __init__(
        self,
        codes: nn.Parameter,
        *,
        normalize: bool = True,
        rank: int = 0,
        scale: float | None = None,
        fixed_scale: bool = False,
    ) -> None:
        super().__init__()
        num_words, width = codes.shape
        self.codes, self.normalize = codes, normalize
        if scale is None:
            scale = initial_scale(num_words) if normalize else 1.0
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=not fixed_scale)
        self.bias = nn.Parameter(torch.zeros(num_words))
        self.down = nn.Parameter(torch.randn(rank, width) / math.sqrt(width)) if rank else None
        self.up = nn.Parameter(torch.zeros(num_words, rank)) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        """Map features [..., N] to logits [..., C]."""
        if self.normalize:
            x = F.normalize(x, dim=-1)
        x = x * self.scale
        logits = F.linear(x, self.codes, self.bias)
        if self.down is not None and self.up is not None:
            logits = logits + F.linear(F.linear(x, self.down), self.up)
        return logits


class LanguageModel(nn.Module):
    """`classifier(lstm(embedding(words)))`: logits of the next word at each step.

    Args:
        embedding: Maps words to features [..., N].
        layers: The LSTM's layers, all N wide.
        classifier: Maps features [..., N] to logits [..., C].
        embedding_scale: Factor of the embedding.
        dropouts: Dropout probabilities in training.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        layers: Iterable[nn.LSTM],
        classifier: nn.Module,
        *,
        embedding_scale: float = 1.0,
        dropouts: Dropouts | None = None,
    ) -> None:
        super().__init__()
        self.num_words, self.num_features = embedding.num_embeddings, embedding.embedding_dim
        self.embedding, self.embedding_scale = embedding, embedding_scale
        self.layers = nn.ModuleList(layers)
        self.classifier = classifier
        self.dropouts = dropouts or Dropouts()

    def start(self, batch_size: int) -> State:
        """Return the state before any text: zeros."""
        zeros = self.embedding.weight.new_zeros(1, batch_size, self.num_features)
        return [(zeros, zeros) for _ in self.layers]

    def features(self, words: Tensor, state: State) -> Output:
        """Compute the classifier's input for each next word.

        Args:
            words: Word numbers [T, B].
            state: From `start`, or from the text before.
        """
        x = self._drop(self._embed(words), self.dropouts.inputs)
        after: State = []
        raw = x
        for index, (layer, before) in enumerate(zip(self.layers, state, strict=True)):
            raw, kept = self._run(layer, x, before)
            after.append(kept)
            x = self._drop(raw, self.dropouts.hidden if index + 1 < len(self.layers) else self.dropouts.output)
        return Output(x, raw, after)

    def forward(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Map word numbers [T, B] to logits of the next words [T, B, C] and the state after them."""
        output = self.features(words, state)
        return self.classifier(output.features), output.state

    def _run(self, layer: nn.Module, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not self.training or self.dropouts.weights == 0:
            return layer(x, state)
        dropped = F.dropout(layer.get_parameter("weight_hh_l0"), self.dropouts.weights)
        weights = [
            layer.get_parameter("weight_ih_l0"),
            dropped,
            *map(layer.get_parameter, ("bias_ih_l0", "bias_hh_l0")),
        ]
        # has_biases, num_layers, dropout, train, bidirectional, batch_first
        raw, hidden, cell = torch.lstm(x, list(state), weights, True, 1, 0.0, True, False, False)
        return raw, (hidden, cell)

    def _drop(self, x: Tensor, probability: float) -> Tensor:
        """Drop the same features of a sequence at every step (Gal & Ghahramani, 2016)."""
        if not self.training or probability == 0:
            return x
        return x * F.dropout(torch.ones_like(x[:1]), probability)

    def _embed(self, words: Tensor) -> Tensor:
        weight, probability = self.embedding.weight, self.dropouts.words
        if self.training and probability > 0:
            weight = weight * F.dropout(weight.new_ones(self.num_words, 1), probability)
        return F.embedding(words, weight) * self.embedding_scale
