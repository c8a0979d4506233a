"""A model in several processes: replicated (DistributedDataParallel) or sharded (FSDP2).

A fixed classifier has no gradients to synchronise (paper, section 4.1); `CountedAllReduce` counts the bytes that are
sent for those that remain.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fixify.errors import UsageError
from fixify.heads import FixedClassifier
from fixify.training import distributed
from fixify.training.options import FinetuneOptions

# Running statistics, which both kinds of model have.


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Convert batch norms to those that use the batch of all processes (timm's conversion; the state dict stays).

    Raises:
        UsageError: torch has none for this device.
    """
    if device.type == "cpu":
        raise UsageError(
            "torch synchronises batch norms on accelerators only, not on a CPU.",
            hint="Leave out --sync-bn: --dist-bn averages their running statistics.",
        )
    return convert_sync_batchnorm(model)


class RunningStatistics:
    """Keeps the running statistics of all processes equal after every update, so that each has the whole model.

    Fixed heads compute theirs from the batch of all processes. Batch norms compute theirs from the shard of their
    process; they are then averaged, or rank 0's are taken (`options.dist_bn`). Neither changes what is learned.

    Args:
        model: The model that is trained.
        options: Its options.

    Attributes:
        num_bytes: Bytes that this process gave to collective calls so far.
    """

    def __init__(self, model: nn.Module, options: FinetuneOptions) -> None:
        self.heads = [module for module in model.modules() if isinstance(module, FixedClassifier)]
        for head in self.heads:
            head.synchronized = True
        self.norms = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        ]
        self.how = options.dist_bn
        self.num_bytes = 0

    def count_forward(self) -> None:
        """Count the bytes that the heads send in one forward pass."""
        self.num_bytes += sum(4 * (2 * head.in_features + 1) for head in self.heads if head.center is not None)

    def after_update(self) -> None:
        """Make the statistics of batch norms equal; those of frozen ones do not change."""
        buffers = [
            buffer
            for norm in self.norms
            if norm.training
            for buffer in (norm.running_mean, norm.running_var)
            if buffer is not None
        ]
        if not buffers or self.how == "none":
            return
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        if self.how == "broadcast":
            dist.broadcast(flat, src=0)
        else:
            dist.all_reduce(flat)
            flat /= distributed.world_size()
        self.num_bytes += flat.nbytes
        parts = flat.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])

    def close(self) -> None:
        """Make the heads use the batch of their own process again."""
        for head in self.heads:
            head.synchronized = False


# Replicated.


class CountedAllReduce:
    """A communication hook that does what DistributedDataParallel does by default, and counts the bytes.

    Attributes:
        num_bytes: Bytes of gradients that this process gave to all-reduce so far.
    """

    def __init__(self) -> None:
        self.num_bytes = 0

    def hook(self, state: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start the all-reduce of one bucket of gradients."""
        self.num_bytes += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)


# torch compares the annotations of a hook with these classes, and `from __future__ import annotations` makes strings.
CountedAllReduce.hook.__annotations__ = {
    "state": dist.ProcessGroup,
    "bucket": dist.GradBucket,
    "return": torch.futures.Future[torch.Tensor],
}


class ReplicatedModel:
    """A model of which each process has a copy; gradients are averaged (DistributedDataParallel).

    DistributedDataParallel does not synchronise the buffers: it would send all of them before every step, including
    the tables of a fixed head, which never change.

    Args:
        model: Rank 0's parameters and floating-point buffers are copied to all; other buffers are never trained.
        options: Options of the run.
        device: Device of this process.
    """

    def __init__(self, model: nn.Module, options: FinetuneOptions, device: torch.device) -> None:
        broadcast_parameters(model)
        self.statistics = RunningStatistics(model, options)
        self.counted, self.updates = CountedAllReduce(), 0
        known = inspect.signature(DistributedDataParallel).parameters
        given: dict[str, Any] = {"device_ids": None if device.index is None else [device.index]}
        given["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        self.module = DistributedDataParallel(model, **given)
        self.module.register_comm_hook(dist.group.WORLD, self.counted.hook)

    def __call__(self, images: Tensor) -> Any:
        """Compute the model's outputs for this process's shard of a batch."""
        self.statistics.count_forward()
        return self.module(images)

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Wrap a forward and a backward pass; gradients are averaged only in the last one before an update."""
        return contextlib.nullcontext() if last else self.module.no_sync()

    def before_update(self) -> None:
        """Do nothing: the gradients are averaged already."""

    def after_update(self) -> None:
        """Make the running statistics equal."""
        self.updates += 1
        self.statistics.after_update()

    def bytes_per_update(self) -> tuple[float | None, float | None]:
        """Return the bytes of gradients and of statistics per update that this process sent; None before the first."""
        if self.updates == 0:
            return None, None
        return self.counted.num_bytes / self.updates, self.statistics.num_bytes / self.updates

    def close(self) -> None:
        """Make the model usable in a single process."""
        self.statistics.close()


@torch.no_grad()
def broadcast_parameters(model: nn.Module) -> None:
    """Copy rank 0's parameters and floating-point buffers to all processes, except for sharded ones."""
    if distributed.world_size() == 1:
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), src=0)


# Sharded, for backbones that do not fit on one device.


def check_shard(options: FinetuneOptions) -> None:
    """Check that the model can be sharded, together with the other options.

    Raises:
        UsageError: it cannot.
    """
    if distributed.world_size() == 1:
        raise UsageError(
            "--shard needs several processes, and this is one.",
            hint="Add --nproc-per-node N, or leave out --shard.",
        )
    reasons = {
        "--ema-decay": (options.ema_decay is not None, "the average is a second model, which no process has whole"),
        "--last-block-epochs": (bool(options.last_block_epochs), "splitting off the last blocks needs a whole model"),
        "--compile": (options.compile, "a whole graph cannot gather the shards"),
        "--amp fp16": (options.amp == "fp16", "each process would scale its own shards; use bf16"),
        f"--clip-mode {options.clip_mode}": (options.clip_mode != "norm", "sharded gradients are clipped by norm"),
    }
    for name, (given, reason) in reasons.items():
        if given:
            raise UsageError(f"--shard cannot be combined with {name}: {reason}.", hint="Leave out one of the two.")


def shard_(model: nn.Module, device: torch.device) -> nn.Module | None:
    """Shard the parameters of a model over the processes, in place.

    Each element of the outermost sequences (a transformer's blocks, a ResNet's bottlenecks) is gathered as a whole, and
    the rest together. A fixed head has nothing to shard: its scale and bias stay whole in each process.

    Args:
        model: A whole model, the same in each process; on the CPU if it is too large for a device.
        device: Device of this process.

    Returns:
        On rank 0 a copy on the CPU that stays whole, for writing checkpoints; None elsewhere.
    """
    whole = copy.deepcopy(model).cpu() if distributed.is_rank_zero() else None
    heads = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    for head in heads:
        head.to(device)
    ignored = {parameter for head in heads for parameter in head.parameters()}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for part in [*_parts(model), model]:
        sharded = fully_shard(part, mesh=mesh, ignored_params=ignored)
        if device.type == "cpu":  # Gloo of torch 2.8 adds gradients up where it should average them
            sharded.set_force_sum_reduction_for_comms(True)
    return whole


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child) > 1:
            yield from (part for part in child if any(True for _ in part.parameters()))
        else:
            yield from _parts(child)


class ShardedModel:
    """A model that `shard_` has sharded (FSDP2); it is used like `ReplicatedModel`.

    Args:
        model: The model.
        options: Options of the run.
    """

    def __init__(self, model: nn.Module, options: FinetuneOptions) -> None:
        self.module: Any = model
        self.statistics = RunningStatistics(model, options)
        self.unsharded = [parameter for head in self.statistics.heads for parameter in head.parameters()]

    def __call__(self, images: Tensor) -> Any:
        """Compute the model's outputs for this process's shard of a batch."""
        self.statistics.count_forward()
        return self.module(images)

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Wrap a forward and a backward pass; gradients are averaged only in the last one before an update."""
        self.module.set_requires_gradient_sync(last)
        yield

    def before_update(self) -> None:
        """Average the gradients of parameters that are not sharded."""
        for parameter in self.unsharded:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= distributed.world_size()

    def after_update(self) -> None:
        """Make the running statistics equal."""
        self.statistics.after_update()

    def bytes_per_update(self) -> tuple[float | None, float | None]:
        """Return None twice: FSDP2 sends pieces of weights and gradients, and has no hook to count them."""
        return None, None

    def close(self) -> None:
        """Make the heads usable in a single process."""
        self.statistics.close()


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor, sharded or not, that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_sharded_gradients_(model: nn.Module, max_norm: float) -> None:
    """Scale the gradients so that the norm over all of them, sharded and not, is at most `max_norm`."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    unsharded = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [nn.utils.get_total_norm(unsharded)] if unsharded else []
    if sharded:
        norm = nn.utils.get_total_norm(sharded)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    factor = (max_norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(factor)


_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """Gather the state dict on rank 0's CPU; it is empty elsewhere. Every process must call this."""
    return get_model_state_dict(model, options=_GATHERED)


def gather_optimiser_state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Gather the optimiser's state by parameter name, like `gather_weights`; empty before the first update.

    torch would otherwise create a state by a step without gradients, and optimisers that count their updates would be
    off by one.
    """
    if not optimiser.state:
        return {}
    return get_optimizer_state_dict(model, optimiser, options=_GATHERED)


def load_gathered(
    model: nn.Module, optimiser: torch.optim.Optimizer, weights: dict[str, Any], optimiser_state: dict[str, Any]
) -> None:
    """Give each process its shards of gathered states, which every process has as a whole."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    if optimiser_state:
        set_optimizer_state_dict(model, optimiser, optimiser_state, options=options)
