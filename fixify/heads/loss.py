"""The exact softmax cross-entropy over very many classes, without the logits of a batch in memory.

Fixed codes have no gradient and hardly any memory, so a block of classes at a time is enough: the forward pass keeps
one log-sum-exp per sample, and the backward pass computes each block's logits again. Memory is O(batch x block).

Everything that depends on few classes (the target's logit, smoothing, margins) is computed from `LogitSummary` by
ordinary differentiable operations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fixify.errors import HeadSpecError
from fixify.heads.pair_sums import Job, SummarisePairs, are_small, may_be_pairs
from fixify.heads.product import CodeBlock, CodeProduct

Reduction = Literal["mean", "sum", "none"]

BLOCK_LOGITS = 1 << 17
"""Logits of a block, over the batch: 0.5 MB in float32, which stays in a core's cache."""
PAIR_LOGITS = 1 << 18
"""Logits of a block of codes and their negatives; half as many scores are held."""
_LEAST_CLASSES = 512
"""Classes of a block, however large the batch."""


@dataclass(frozen=True)
class SoftTarget:
    """Distributions over a few classes per sample, for example the top k of a teacher, or two mixed labels.

    Attributes:
        classes: Class numbers, int64 [B, k]. A class may occur twice; its weights add up.
        weights: Their weights, [B, k].
    """

    classes: Tensor
    weights: Tensor


class Margin(ABC):
    """A margin that makes the right class harder to reach, for codes that must also tell unseen classes apart."""

    @abstractmethod
    def apply(self, cosine: Tensor) -> Tensor:
        """Replace the cosine of the right class, [B], by a smaller one."""


@dataclass(frozen=True)
class CosFace(Margin):
    """cos(theta) - margin (Wang et al., "CosFace", CVPR 2018)."""

    margin: float = 0.35

    def apply(self, cosine: Tensor) -> Tensor:
        """Subtract the margin."""
        return cosine - self.margin


@dataclass(frozen=True)
class ArcFace(Margin):
    """cos(theta + margin) (Deng et al., "ArcFace", CVPR 2019); `margin` is in radians, 0 to pi.

    Where theta + margin exceeds pi, cos(theta) - margin sin(margin) takes its place, as in the authors' code, so that
    the logit keeps falling.
    """

    margin: float = 0.5

    def apply(self, cosine: Tensor) -> Tensor:
        """Add the margin to the angle."""
        cosine = cosine.clamp(-1.0, 1.0)
        # The slope of the sine is infinite at an angle of 0.
        sine = (1.0 - cosine.square()).clamp_min(torch.finfo(cosine.dtype).eps).sqrt()
        turned = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), turned, cosine - self.margin * math.sin(self.margin))


class LogitSummary(NamedTuple):
    """What a loss needs of the logits [B, C] of a batch, in float32 at least.

    Attributes:
        log_sum_exp: [B]; without the class of `target` if that was asked for.
        target: Logits of some classes, [B, k]; of distributions [B, C] the weighted sum, [B, 1].
        total: Sum of all logits, [B], or 0.
        largest: Largest logit, [B], of the same classes as `log_sum_exp`; not differentiable.
    """

    log_sum_exp: Tensor
    target: Tensor
    total: Tensor
    largest: Tensor


@dataclass(frozen=True)
class _Job(Job):
    """A pass over the logits `scores * gains + bias`.

    Attributes:
        gains: Row scales, [C], or None.
    """

    gains: Tensor | None

    def logits(self, scores: Tensor, bias: Tensor | None, block: CodeBlock, z: Tensor) -> Tensor:
        """Compute the logits of a block, in float32 at least, in the memory of its scores if these are no part of z."""
        logits = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
        if logits.untyped_storage().data_ptr() == z.untyped_storage().data_ptr():  # identity heads multiply nothing
            logits = logits.clone()
        if self.gains is not None:
            logits *= self.gains[block.classes]
        if bias is not None:
            logits += bias[block.classes]
        return logits

    def places(self) -> Iterator[tuple[CodeBlock, Tensor, Tensor]]:
        """Yield each block, and for target classes [B, k]: is it in the block, and at which column (0 if not)?"""
        if self.target.is_floating_point():
            nothing = self.target.new_zeros(0, dtype=torch.int64)
            yield from ((block, nothing, nothing) for block in self.blocks)
            return
        position, start = self.target, 0
        if any(isinstance(block.classes, Tensor) for block in self.blocks):
            order = torch.cat([torch.as_tensor(block.classes, device=self.target.device) for block in self.blocks])
            positions = torch.full((self.product.spec.num_classes,), -1, device=self.target.device)
            positions[order] = torch.arange(len(order), device=self.target.device)
            position = positions[self.target]
        for block in self.blocks:
            if isinstance(block.classes, slice):
                start = block.classes.start
            place = position - start
            inside = (place >= 0) & (place < block.num_classes)
            yield block, inside, place * inside
            start += block.num_classes


class _Summarise(torch.autograd.Function):
    """Compute a `LogitSummary` of rotated and scaled features z [B, d] and a bias [C], block by block."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        kind, wide = z.device.type, torch.promote_types(z.dtype, torch.float32)
        ctx.job = job
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        soft = job.target.is_floating_point()
        smallest = torch.finfo(wide).min
        largest = torch.full((len(z),), -torch.inf, dtype=wide, device=z.device)
        exponentials, total = torch.zeros_like(largest), torch.zeros_like(largest)
        picked = largest.new_zeros(len(z), 1 if soft else job.target.shape[1])
        for block, inside, place in job.places():
            logits = job.logits(job.product.block_product(z, block), bias, block, z)
            if job.needs_total:
                total += logits.sum(dim=1)
            if soft:
                picked += (logits * job.target[:, block.classes]).sum(dim=1, keepdim=True)
            else:
                picked += torch.where(inside, logits.gather(1, place), 0.0)
            if job.exclude:
                logits.scatter_(1, place, torch.where(inside, -torch.inf, logits.gather(1, place)))
            larger = torch.maximum(largest, logits.amax(dim=1))
            shift = larger.clamp_min(smallest)  # with a single class that is left out, all are -inf
            exponentials *= (largest - shift).exp()
            exponentials += logits.sub_(shift[:, None]).exp_().sum(dim=1)
            largest = larger
        log_sum_exp = largest + exponentials.log()
        if job.exclude:
            log_sum_exp = log_sum_exp.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        ctx.save_for_backward(z, bias, log_sum_exp)
        ctx.mark_non_differentiable(largest)
        return log_sum_exp, picked, total, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (z, bias, log_sum_exp), job = ctx.saved_tensors, ctx.job
        of_lse, of_picked, of_total, _ = grads
        soft, kind = job.target.is_floating_point(), z.device.type
        z_grad = torch.zeros_like(z, dtype=log_sum_exp.dtype) if ctx.needs_input_grad[0] else None
        bias_grad = torch.zeros_like(bias) if ctx.needs_input_grad[1] else None
        shift = log_sum_exp[:, None].clamp_min(torch.finfo(log_sum_exp.dtype).min)
        z = z.detach().requires_grad_(z_grad is not None)
        enabled, dtype = ctx.autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            for block, inside, place in job.places():
                with torch.enable_grad():
                    scores = job.product.block_product(z, block)
                grad = job.logits(scores, bias, block, z)
                grad.sub_(shift).exp_()
                if job.exclude:
                    grad.scatter_(1, place, torch.where(inside, 0.0, grad.gather(1, place)))
                grad *= of_lse[:, None]
                if soft:
                    grad += of_picked * job.target[:, block.classes]
                else:
                    grad.scatter_add_(1, place, torch.where(inside, of_picked, 0.0))
                if job.needs_total:
                    grad += of_total[:, None]
                if bias_grad is not None:
                    bias_grad[block.classes] = grad.sum(dim=0).to(bias_grad.dtype)
                if z_grad is not None:
                    if job.gains is not None:
                        grad *= job.gains[block.classes]
                    z_grad += torch.autograd.grad(scores, z, grad.to(scores.dtype))[0]
        return None if z_grad is None else z_grad.to(z.dtype), bias_grad, None


def summarise(
    product: CodeProduct,
    z: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    gains: Tensor | None = None,
    exclude: bool = False,
    needs_total: bool = True,
    group: dist.ProcessGroup | None = None,
) -> LogitSummary:
    """Summarise the logits `product(z) * gains + bias` of a batch, block by block; differentiable in z and bias.

    Args:
        product: The product with the codes.
        z: Features, scaled as `product` takes them, [B, N].
        target: Classes whose logits are returned, int64 [B, k], or weights of all classes [B, C].
        bias: [C].
        gains: Row scales, [C].
        exclude: Leave the target's class (k = 1) out of the log-sum-exp.
        needs_total: Compute the sum of all logits.
        group: Processes that share the classes. Each computes those of its own blocks for the samples of all, so that
            features [B, N] and three numbers per sample travel. All have the same B, and k = 1. The gradients are those
            of the sum of what the processes compute; that of the bias is 0 outside the own classes.
    """
    z = product.rotate(z)
    are_pairs = gains is None and may_be_pairs(product, z, target)
    logits = PAIR_LOGITS if are_pairs else BLOCK_LOGITS
    blocks = product.blocks(max(_LEAST_CLASSES, logits // max(1, len(z) * _size(group))))
    if group is None or _size(group) == 1:
        job = _Job(product, blocks, target, exclude, needs_total, gains)
        function = SummarisePairs if are_pairs and are_small(product, z, bias) else _Summarise
        return LogitSummary(*function.apply(z, bias, job))
    own = blocks[dist.get_rank(group) :: _size(group)]
    everyone = _gather(target, group).flatten(0, 1)
    job = _Job(product, own, everyone, exclude, needs_total, gains)
    z = _Gather.apply(z, group)
    if own:
        function = SummarisePairs if are_pairs and are_small(product, z, bias) else _Summarise
        log_sum_exp, picked, total, largest = function.apply(z, bias, job)
    else:  # more processes than blocks
        total = z.sum(dim=1).to(torch.promote_types(z.dtype, torch.float32)) * 0.0
        total = total if bias is None else total + bias.sum() * 0.0  # a gradient, as DistributedDataParallel wants
        log_sum_exp, picked, largest = total - torch.inf, total[:, None], total - torch.inf
    parts = _Exchange.apply(torch.stack([log_sum_exp, picked[:, 0], total], dim=1), group)
    largest = _gather(largest, group).amax(dim=0).view(_size(group), -1)[dist.get_rank(group)]
    return LogitSummary(
        parts[..., 0].logsumexp(dim=0), parts[..., 1].sum(dim=0)[:, None], parts[..., 2].sum(dim=0), largest
    )


def cross_entropy(
    product: CodeProduct,
    z: Tensor,
    target: Tensor | SoftTarget,
    *,
    bias: Tensor | None = None,
    gains: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: tuple[Margin, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the exact cross-entropy of each sample, and whether its target has the largest logit.

    Args:
        product: The product with the codes.
        z: Features, scaled as `product` takes them, [B, N].
        target: Labels int64 [B], distributions [B, C], or distributions over few classes.
        bias: [C].
        gains: Row scales, [C].
        label_smoothing: Weight of the uniform distribution, as in `F.cross_entropy`.
        margin: A margin and the scale alpha; with labels only.
        group: See `summarise`; with labels only.

    Returns:
        The losses [B], in float32 at least, and bool [B].

    Raises:
        HeadSpecError: Shapes do not fit, or a label is out of range.
    """
    c, size = product.spec.num_classes, len(z)
    classes, weights = _parts_of(target, size, c)
    if (margin is not None or _size(group) > 1) and weights is not None:
        raise HeadSpecError("Margins, and classes that are shared by processes, need labels, not distributions.")
    found = summarise(
        product,
        z,
        classes,
        bias=bias,
        gains=gains,
        exclude=margin is not None,
        needs_total=label_smoothing > 0,
        group=group,
    )
    log_sum_exp, picked, total = found.log_sum_exp, found.target, found.total
    if margin is not None:
        of_target, scale = picked[:, 0], margin[1].to(picked.dtype)
        scale = scale if gains is None else scale * gains[classes[:, 0]]
        offset = torch.zeros_like(of_target) if bias is None else bias[classes[:, 0]].to(picked.dtype)
        moved = margin[0].apply((of_target - offset) / scale) * scale + offset
        log_sum_exp, total = torch.logaddexp(log_sum_exp, moved), total + moved - of_target
        right = of_target >= found.largest
        picked = moved[:, None]
    elif weights is None:
        right = picked[:, 0] >= found.largest
    elif classes.is_floating_point():
        label = classes.argmax(dim=1, keepdim=True)
        right = _logit_of(product, z, label, bias, gains) >= found.largest
    else:
        right = picked.gather(1, weights.argmax(dim=1, keepdim=True))[:, 0] >= found.largest
    if weights is None:
        mass, weighted = torch.ones_like(log_sum_exp), picked[:, 0]
    elif classes.is_floating_point():
        mass, weighted = weights.sum(dim=1).to(picked.dtype), picked[:, 0]
    else:
        mass = weights.sum(dim=1).to(picked.dtype)
        weighted = (weights.to(picked.dtype) * picked).sum(dim=1)
    losses = mass * log_sum_exp - weighted
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (log_sum_exp - total / c)
    return losses, right


def _parts_of(target: Tensor | SoftTarget, size: int, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """Split a target into classes [B, k] and weights [B, k] (None: labels); for distributions both are [B, C]."""
    if isinstance(target, SoftTarget):
        classes, weights = target.classes, target.weights
        if classes.shape != weights.shape or classes.ndim != 2 or len(classes) != size:
            raise HeadSpecError(
                f"A soft target of {size} samples needs classes and weights [{size}, k], got {list(classes.shape)} "
                f"and {list(weights.shape)}."
            )
    elif target.is_floating_point():
        if target.shape != (size, num_classes):
            raise HeadSpecError(f"Expected distributions [{size}, {num_classes}], got {list(target.shape)}.")
        return target, target
    else:
        if target.shape != (size,):
            raise HeadSpecError(f"Expected {size} labels, got a tensor of shape {list(target.shape)}.")
        classes, weights = target[:, None], None
    if size and (int(classes.min()) < 0 or int(classes.max()) >= num_classes):
        raise HeadSpecError(
            f"Labels must lie in 0 .. {num_classes - 1}, got {int(classes.min())} .. {int(classes.max())}."
        )
    return classes, weights


@torch.no_grad()
def _logit_of(product: CodeProduct, z: Tensor, label: Tensor, bias: Tensor | None, gains: Tensor | None) -> Tensor:
    return summarise(product, z, label, bias=bias, gains=gains).target[:, 0]


# Classes that are shared by processes.


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the tensors of all processes: [B, ...] to [processes, B, ...]."""
    parts = [torch.empty_like(own) for _ in range(_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.stack(parts)


class _Gather(torch.autograd.Function):
    """Collect the features of all processes, [B, N] to [processes B, N]; the gradients are summed."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(own, group).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.view(_size(ctx.group), -1, grad.shape[-1])[dist.get_rank(ctx.group)], None


class _Exchange(torch.autograd.Function):
    """Send to each process what was computed for its samples: [processes B, k] to [processes, B, k]."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, (size, rank) = group, (_size(group), dist.get_rank(group))
        return _gather(own, group).view(size, size, -1, own.shape[-1])[:, rank]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group)[:, dist.get_rank(ctx.group)].flatten(0, 1), None
