"""Forward and backward pass in training of a head whose codes are rows of one Hadamard matrix, in few operations.

Next to the fast product, whatever needs new memory takes most of a training step, because a page of it that is touched
for the first time costs more than the arithmetic on it. Recorded operation by operation, a step makes about 14 tensors
of the size of the features; here it makes 5, and in compiled code (float32 on a processor) 2: logits and gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fixify.heads.kernels import CompiledStep
from fixify.heads.normalisation import NORM_EPSILON, ScaledDirections, directions
from fixify.heads.product import OneBlock, fast_product


class _Saved(NamedTuple):
    block: OneBlock
    mean: Tensor | None
    std: Tensor | None
    step: CompiledStep | None


class OneBlockLogits(torch.autograd.Function):
    """Logits of features: those of `ScaledDirections`, the product and the bias, up to rounding; see `forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        mean: Tensor | None,
        std: Tensor | None,
        block: OneBlock,
    ) -> Tensor:
        """Compute logits.

        Args:
            ctx: Autograd's context.
            x: [M, N], of the type of all others.
            scale: [].
            bias: [C], or None.
            mean: [N], or None for 0.
            std: [N], positive, or None for 1.
            block: The codes.

        Returns:
            [M, C].
        """
        if block.step is not None:
            center = None if mean is None else mean.clone()  # running statistics change in place before the next step
            step = block.step.at(scale.item(), bias, center, None if std is None else std.reciprocal())
            ctx.save_for_backward(x, scale, bias)
            ctx.of_head = _Saved(block, center, std, step)
            return step(x)
        m, n = x.shape
        a, b, c = len(block.left), len(block.right), block.num_classes
        z, norm = directions(x, mean, _signed(std, block.signs), x.dtype)
        products = torch.mm(z.view(-1, b), (block.right * scale).t()).view(m, a, b)
        scores = torch.bmm(block.left.expand(m, a, a), products).view(m, n)
        logits = products.view(-1)[: m * c].view(m, c)  # its memory is free now
        if block.picked is not None:
            index, signs = block.picked
            torch.index_select(scores, 1, index, out=logits).mul_(signs)
            if bias is not None:
                logits.add_(bias)
        elif bias is not None:
            torch.add(scores[:, block.columns], bias, out=logits)
        else:
            logits.copy_(scores[:, block.columns])
        ctx.save_for_backward(x, scale, bias, z, norm)
        ctx.of_head = _Saved(block, mean, std, None)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of features, scale and bias."""
        x, scale, bias, *of_forward = ctx.saved_tensors
        block, mean, std, step = ctx.of_head
        grad, needs = grads[0], ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for gradients of gradients
            logits = logits_one_by_one(x, scale, bias, mean, std, block)
            wanted = [each for each, needed in zip((x, scale, bias), needs, strict=True) if needed]
            found = iter(torch.autograd.grad(logits, wanted, grad, create_graph=True))
            return (*(next(found) if needed else None for needed in needs), None, None, None)
        of_bias = grad.sum(dim=0) if needs[2] else None
        if not (needs[0] or needs[1]):
            return None, None, of_bias, None, None, None
        if step is not None:
            found_of_x, shares = step.gradients(x.contiguous(), grad.contiguous())
            return (found_of_x if needs[0] else None, shares.sum() if needs[1] else None, of_bias, None, None, None)
        z, norm = of_forward
        (m, n), a, b = x.shape, len(block.left), len(block.right)
        of_x = grad.new_zeros(m, n)
        if block.picked is None:
            of_x[:, block.columns] = grad
        else:
            index, signs = block.picked
            of_x.index_add_(1, index, grad * signs)  # a row and its negative may both be codes
        spare = torch.bmm(block.left.t().expand(m, a, a), of_x.view(m, a, b)).view(m, n)
        torch.mm(spare.view(-1, b), block.right, out=of_x.view(-1, b))
        along = torch.mul(of_x, z, out=spare).sum(dim=1, keepdim=True)
        of_scale = along.sum() if needs[1] else None
        if not needs[0]:
            return None, of_scale, of_bias, None, None, None
        torch.mul(z, along.masked_fill_(norm <= NORM_EPSILON, 0.0), out=spare)
        of_x.sub_(spare).mul_(scale / norm.clamp_min(NORM_EPSILON))
        divisor = _signed(std, block.signs)
        return of_x if divisor is None else of_x.div_(divisor), of_scale, of_bias, None, None, None


def logits_one_by_one(
    x: Tensor, scale: Tensor, bias: Tensor | None, mean: Tensor | None, std: Tensor | None, block: OneBlock
) -> Tensor:
    """Compute the logits of `OneBlockLogits` by operations that autograd records."""
    z: Tensor = ScaledDirections.apply(x, scale, mean, std)
    scores = fast_product(z if block.signs is None else z * block.signs, block.left, block.right)
    if block.picked is None:
        scores = scores[:, block.columns]
    else:
        index, signs = block.picked
        scores = scores.index_select(1, index) * signs
    return scores if bias is None else scores + bias


def _signed(std: Tensor | None, signs: Tensor | None) -> Tensor | None:
    """Compute what each feature is divided by, so that it has its sign too: signs leave the norm as it is."""
    if std is None:
        return signs
    return std if signs is None else std * signs
