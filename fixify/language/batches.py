"""A text as batches, and how well a model predicts it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fixify.evaluation import eval_mode
from fixify.language.network import LanguageModel

_SHORTEST = 5
_HALF = 0.05
_DEVIATION = 5.0
_EVALUATED_AT_ONCE = 1 << 22
"""Logits of a step of evaluation; 16 MB as float32."""


@dataclass(frozen=True)
class Prediction:
    """How well a text is predicted.

    Attributes:
        loss: Mean negative log likelihood of a word, nats.
        words: Words that were predicted: all of them.
    """

    loss: float
    words: int

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)


def side_by_side(text: Tensor, batch_size: int) -> Tensor:
    """A text [n] as `batch_size` parts of equal length, [n // batch_size, batch_size]; the rest is left out."""
    length = len(text) // batch_size
    return text[: length * batch_size].view(batch_size, length).t().contiguous()


def steps_of(length: int, seq_len: int, *, vary: bool, seed: int) -> list[tuple[int, int]]:
    """Where each update of an epoch begins, and of how many words: of parts of `length` words, all but the last word.

    Args:
        length: Words of each part.
        seq_len: Words of an update.
        vary: Draw them, as Merity et al. (2017, section 4.1) do: around `seq_len`, or with 5 % around its half, with a
            deviation of 5.
        seed: Of what is drawn.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    found, begin = [], 0
    while begin < length - 1:
        size = seq_len
        if vary:
            around = seq_len / 2 if rng.random() < _HALF else seq_len
            size = max(_SHORTEST, int(rng.normal(around, _DEVIATION)))
        size = min(size, length - 1 - begin)
        found.append((begin, size))
        begin += size
    return found


@torch.inference_mode()
def predict(model: LanguageModel, text: Tensor, first: int, device: torch.device) -> Prediction:
    """How well a model predicts a text: every word of it, each from all words before it.

    Args:
        model: On the device.
        text: Word numbers [n], on the CPU.
        first: The word that is taken to stand before the text.
        device: Where the model is.
    """
    before = torch.cat([text.new_tensor([first]), text[:-1]])
    loss = 0.0
    state = model.start(1)
    with eval_mode(model):
        for words, following in _parts(before, text, max(1, _EVALUATED_AT_ONCE // model.num_words)):
            logits, state = model(words.to(device)[:, None], state)
            loss += float(F.cross_entropy(logits[:, 0].float(), following.to(device), reduction="sum"))
    return Prediction(loss / len(text), len(text))


def _parts(before: Tensor, text: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(before.split(size), text.split(size), strict=True)
