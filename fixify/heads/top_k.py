"""The largest logits or probabilities of some samples, without the logits of all classes of all samples in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fixify.heads.base_kind import GAIN_STEPS
from fixify.heads.product import CodeProduct

LOGITS_AT_ONCE = 1 << 22
"""Logits that are held at a time: those of some samples, or of a block of classes."""


def fits_at_once(num_classes: int) -> bool:
    """Check that all logits of at least one sample may be held at a time."""
    return num_classes <= LOGITS_AT_ONCE


class TopK(NamedTuple):
    """The largest logits or probabilities of some samples, largest first, and their classes."""

    values: Tensor
    classes: Tensor


def largest_by_sample(
    logits_of: Callable[[Tensor], Tensor], samples: Tensor, k: int, num_classes: int, probabilities: bool
) -> tuple[Tensor, Tensor]:
    """Find the k largest logits, or probabilities, and their classes, [M, k], a few samples at a time.

    Args:
        logits_of: Features [m, N] to logits [m, C].
        samples: Features, [M, N].
        k: Number of classes per sample.
        num_classes: C, at most `LOGITS_AT_ONCE`.
        probabilities: Return softmax probabilities instead of logits.
    """
    found = []
    for part in samples.split(LOGITS_AT_ONCE // num_classes):
        logits = logits_of(part)
        values, classes = logits.topk(k, dim=-1)
        if probabilities:
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            values = (values - logits.to(values.dtype).logsumexp(dim=-1, keepdim=True)).exp()
        found.append((values, classes))
    largest, numbers = (torch.cat(each) for each in zip(*found, strict=True))
    return largest, numbers


def largest_by_block(
    product: CodeProduct, z: Tensor, k: int, gains: Tensor | None, bias: Tensor | None, probabilities: bool
) -> tuple[Tensor, Tensor]:
    """Find the k largest logits, or probabilities, and their classes, [M, k], a block of classes at a time.

    Args:
        product: The product with the codes.
        z: Scaled features as `product.rotate` returns them, [M, d].
        k: Number of classes per sample.
        gains: Row scales, uint8 [C], if there are any.
        bias: [C], if there is one.
        probabilities: Return softmax probabilities instead of logits.
    """
    values, classes, log_sums = [], [], []  # of each block
    for block in product.blocks(max(1, LOGITS_AT_ONCE // max(1, len(z)))):
        logits = product.block_product(z, block)
        if gains is not None:
            logits = logits * (gains[block.classes].to(logits.dtype) * (1.0 / GAIN_STEPS))
        if bias is not None:
            logits = logits + bias[block.classes].to(logits.dtype)
        if probabilities:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            log_sums.append(logits.logsumexp(dim=-1, keepdim=True))
        best, index = logits.topk(min(k, block.num_classes), dim=-1)
        values.append(best)
        classes.append(index + block.classes.start if isinstance(block.classes, slice) else block.classes[index])
    largest, index = torch.cat(values, dim=-1).topk(k, dim=-1)
    if probabilities:
        largest = (largest - torch.cat(log_sums, dim=-1).logsumexp(dim=-1, keepdim=True)).exp()
    return largest, torch.cat(classes, dim=-1).gather(-1, index)
