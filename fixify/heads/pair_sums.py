"""What a loss needs of the logits of Hadamard rows and their negatives, block by block, in few passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fixify.heads.product import CodeBlock, CodeProduct

_LARGEST_EXPONENT = 66.0
"""Logits up to which exponentials need no shift: the sum of 10^7 of them, e^82, is below the largest float32, e^88."""


@dataclass(frozen=True)
class Job:
    """One pass over the logits of blocks of classes.

    Attributes:
        product: The codes.
        blocks: The blocks; all of them, or those of one of several processes.
        target: Class numbers int64 [B, k], or distributions [B, C].
        exclude: Whether the log-sum-exp leaves out the target's class; k is 1.
        needs_total: Whether the sum of all logits is wanted; it is 0 otherwise.
    """

    product: CodeProduct
    blocks: list[CodeBlock]
    target: Tensor
    exclude: bool
    needs_total: bool


class SummarisePairs(torch.autograd.Function):
    """Compute a `LogitSummary` (see `fixify.heads.loss`) for rows of Hadamard blocks and their negatives.

    The logits of a Hadamard block are s + b for its N rows and b' - s for their negatives, so the exponentials of both
    are products of those of the scores, of the biases, and of a reciprocal: their sums are two products with vectors.
    Logits must be small enough for exponentials without a shift; see `are_small`.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, ...]:
        """Sum up rotated and scaled features z [B, N] with a bias [C]."""
        pairs = _Pairs(job, z, bias)
        exponentials, total = z.new_zeros(len(z)), z.new_zeros(len(z))
        largest = torch.full_like(total, -torch.inf)
        picked = z.new_zeros(job.target.numel())
        for part in pairs.parts():
            scores, spare = part.scores(z)
            for sign, entries, place in part.targets:
                picked[entries] = sign * scores[place]
            if job.needs_total:
                total += part.sum_of_biases
                if part.surplus is not None:
                    total += torch.mv(scores, part.surplus)
            torch.add(scores, part.biases[0], out=spare)
            largest = torch.maximum(largest, part.exclude(spare, 1, -torch.inf).amax(dim=1))
            torch.sub(part.biases[1], scores, out=spare)
            largest = torch.maximum(largest, part.exclude(spare, -1, -torch.inf).amax(dim=1))
            torch.reciprocal(scores.exp_(), out=spare)
            exponentials += torch.mv(part.exclude(scores, 1, 0.0), part.factors[0])
            exponentials += torch.mv(part.exclude(spare, -1, 0.0), part.factors[1])
        picked = picked.view(job.target.shape)
        if bias is not None:
            picked += pairs.is_own * bias[job.target]
        ctx.job = job
        ctx.save_for_backward(z, bias, exponentials)
        ctx.mark_non_differentiable(largest)
        return exponentials.log(), picked, total, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute each block's scores again, and the gradients of z and the bias."""
        (z, bias, exponentials), job = ctx.saved_tensors, ctx.job
        of_lse, of_picked, of_total, _ = grads
        pairs = _Pairs(job, z, bias)
        weights = torch.where(exponentials > 0, of_lse / exponentials, 0.0)
        of_picked, of_biases = of_picked.flatten(), of_total.sum() if job.needs_total else 0.0
        z_grad = torch.zeros_like(z) if ctx.needs_input_grad[0] else None
        bias_grad = torch.zeros_like(bias) if ctx.needs_input_grad[1] else None
        for part in pairs.parts():
            positive, negative = part.scores(z)
            torch.reciprocal(positive.exp_(), out=negative)
            part.exclude(positive, 1, 0.0)
            part.exclude(negative, -1, 0.0)
            if bias_grad is not None:
                sums = torch.stack((torch.mv(positive.t(), weights), torch.mv(negative.t(), weights)))
                bias_grad[part.block.classes] = part.in_order(sums.mul_(part.factors)) + of_biases
            if z_grad is not None:
                grad = positive.mul_(part.factors[0]).addcmul_(negative, part.factors[1], value=-1.0)
                grad.mul_(weights[:, None])
                for sign, entries, place in part.targets:
                    grad.index_put_(place, sign * of_picked[entries], accumulate=True)
                if job.needs_total and part.surplus is not None:
                    grad.addr_(of_total, part.surplus)
                z_grad += part.gradient(grad, negative)
        if bias_grad is not None:
            bias_grad.index_add_(0, job.target.flatten(), (pairs.is_own.flatten() * of_picked).to(bias_grad.dtype))
        return z_grad, bias_grad, None


class _Pairs:
    """What `SummarisePairs` needs of all blocks; `parts` yields it for one block after another.

    Attributes:
        is_own: Whether the target is in one of the blocks, [B, k].
    """

    def __init__(self, job: Job, z: Tensor, bias: Tensor | None) -> None:
        n, c = z.shape[1], job.product.spec.num_classes
        self.job = job
        padded = F.pad(z.new_zeros(c) if bias is None else bias.detach(), (0, -c % (2 * n)), value=-torch.inf)
        self.biases = padded.view(-1, 2, n).transpose(0, 1).contiguous()
        self.factors = self.biases.exp()
        bounds = z.new_tensor([block.first_block for block in job.blocks], dtype=torch.int64)
        ends = z.new_tensor([block.end_block for block in job.blocks], dtype=torch.int64)
        target = job.target.flatten()
        code, row = target // (2 * n), target % (2 * n)
        part = torch.searchsorted(bounds, code, right=True) - 1
        own = (part >= 0) & (code < ends[part.clamp_min(0)])
        self.is_own = own.view(job.target.shape)
        # The targets of each block and sign are neighbours in this order.
        group = torch.where(own, 2 * part + (row >= n), 2 * len(job.blocks))
        self._order = torch.argsort(group, stable=True)
        self._starts = torch.searchsorted(group[self._order], torch.arange(2 * len(bounds) + 1)).tolist()
        column = (code - bounds[part.clamp_min(0)]) * n + row % n
        self._place = (self._order // job.target.shape[1], column[self._order])
        most = max(block.end_block - block.first_block for block in job.blocks)
        self.memory = z.new_empty(2 * len(z) * most * n)

    def parts(self) -> Iterator[_PairsOfBlock]:
        for i, block in enumerate(self.job.blocks):
            targets = []
            for sign, start, end in zip((1, -1), self._starts[2 * i :], self._starts[2 * i + 1 :], strict=False):
                if end > start:
                    place = tuple(index[start:end] for index in self._place)
                    targets.append((sign, self._order[start:end], place))
            yield _PairsOfBlock(self, block, targets)


class _PairsOfBlock:
    """The logits of k Hadamard blocks: their biases, and where targets are.

    Attributes:
        block: The block.
        targets: For both signs of a code, if there are any: the sign, positions in the flattened targets, and the
            indices of their scores.
        biases: Those of rows and of negatives, [2, k N]; -inf where there is no class.
        factors: Their exponentials.
        surplus: 1 where a row has a class and its negative has none, else 0: [k N]; None if all have.
    """

    def __init__(self, pairs: _Pairs, block: CodeBlock, targets: list[tuple[int, Tensor, tuple[Tensor, ...]]]) -> None:
        self._pairs, self.block, self.targets = pairs, block, targets
        codes = slice(block.first_block, block.end_block)
        self.biases, self.factors = (each[:, codes].flatten(1) for each in (pairs.biases, pairs.factors))
        self.surplus: Tensor | None = None
        if block.num_classes < self.biases.numel():
            exist = (self.biases > -torch.inf).to(self.biases.dtype)
            self.surplus = exist[0] - exist[1]

    @property
    def sum_of_biases(self) -> Tensor:
        """The sum of the biases of its classes, []."""
        return self.in_order(self.biases).sum()

    def scores(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the scores of the rows, and give as much memory: [B, k N]."""
        found, spare = self._pairs.job.product.pair_scores(z, self.block, self._pairs.memory)
        return found.flatten(1), spare.flatten(1)

    def gradient(self, grad: Tensor, spare: Tensor) -> Tensor:
        """Multiply the gradient of the scores with the rows: [B, k N] to [B, N]."""
        shape = (len(grad), -1, self._pairs.biases.shape[2])
        return self._pairs.job.product.pair_gradient(grad.view(shape), spare.view(shape), self.block)

    def exclude(self, values: Tensor, sign: int, value: float) -> Tensor:
        """Change what belongs to the target's class, if it is left out, in values of codes of a sign, [B, k N]."""
        if self._pairs.job.exclude:
            for each, _, place in self.targets:
                if each == sign:
                    values[place] = value
        return values

    def in_order(self, of_signs: Tensor) -> Tensor:
        """Bring numbers [2, k N] into the order of classes."""
        n = self._pairs.biases.shape[2]
        return of_signs.view(2, -1, n).transpose(0, 1).reshape(-1)[: self.block.num_classes]


def may_be_pairs(product: CodeProduct, z: Tensor, target: Tensor) -> bool:
    """Check whether `SummarisePairs` can compute this but for the size of its logits."""
    return (
        product.has_pairs
        and not target.is_floating_point()
        and not torch.compiler.is_compiling()
        and z.device.type == "cpu"  # elsewhere, `are_small` would wait for the device
        and not torch.is_autocast_enabled("cpu")
        and product.right is not None
        and z.dtype == product.right.dtype == torch.promote_types(z.dtype, torch.float32)
    )


@torch.no_grad()
def are_small(product: CodeProduct, z: Tensor, bias: Tensor | None) -> bool:
    """Check that the sum of the exponentials of all logits, and its reciprocal, are numbers without a shift."""
    if not len(z):
        return False
    largest = float(torch.linalg.vector_norm(z, dim=1).max()) / product.prescale  # codes have norm 1
    if bias is not None:
        largest += float(bias.abs().max())
    return largest <= _LARGEST_EXPONENT
