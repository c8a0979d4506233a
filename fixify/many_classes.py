"""Run a classifier of very many classes without the logits of a batch: the model gives features, and its head the rest.

This needs a model whose output is that of its only fixed head. Such a model returns features while its head is
`deferred`; the head then computes losses, ranks and probabilities block by block (`fixify.heads.loss`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fixify.heads import FixedClassifier


class Ranked(NamedTuple):
    """What metrics need of the logits of a batch.

    Attributes:
        losses: Cross-entropy of each image, [B].
        confidence: Largest probability, [B].
        classes: The most probable classes, the first five or all, int64 [B, k].
    """

    losses: Tensor
    confidence: Tensor
    classes: Tensor


def only_head(model: nn.Module) -> FixedClassifier | None:
    """Return the fixed head of a model that has exactly one, else None."""
    heads = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    return heads[0] if len(heads) == 1 else None


@torch.no_grad()
def ends_in_its_head(model: nn.Module, input_size: Sequence[int], device: torch.device) -> bool:
    """Check that what a model returns is what its only fixed head returns, and not computed from it.

    Args:
        model: The model; it runs once, in eval mode.
        input_size: (channels, height, width) of the images.
        device: Where the model is.
    """
    head = only_head(model)
    if head is None or head.channel_dim != -1:
        return False
    returned: list[Tensor] = []
    modes = [(module, module.training) for module in model.modules()]
    handle = head.register_forward_hook(lambda _head, _inputs, output: returned.append(output))
    try:
        output = model.eval()(torch.zeros(1, *input_size, device=device))
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return len(returned) == 1 and returned[0] is output


@contextlib.contextmanager
def deferring(head: FixedClassifier) -> Iterator[None]:
    """Let a head, and so its model, return features within the block; see `FixedClassifier.deferred`."""
    head.deferred = True
    try:
        yield
    finally:
        head.deferred = False


@torch.no_grad()
def rank(head: FixedClassifier, features: Tensor, labels: Tensor) -> Ranked:
    """Rank the classes of a batch, in eval mode.

    Args:
        head: The head.
        features: What the deferred head returned, [B, N].
        labels: int64 [B].
    """
    losses, _ = head.losses_of_scaled(head.scaled_features(features), labels)
    best = head.top_k(features, min(5, head.out_features), probabilities=True)
    return Ranked(losses, best.values[:, 0], best.classes)
