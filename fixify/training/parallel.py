"""The running statistics of a model of which each process has a copy: of batch norms and of fixed heads."""

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


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms whose batch is that of all processes; timm's conversion, the state dict stays.

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
    """Keeps them alike after every update, so that whichever process is asked, and whenever, has the model.

    Those of a fixed head are of the batch of all processes. Those of a batch norm are of the process's own share, and
    then averaged, or the first process's (`options.dist_bn`); neither changes what is learned.

    Args:
        model: What is trained.
        options: How.
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
        """Count what the heads add up in one forward pass."""
        self.num_bytes += sum(4 * (2 * head.in_features + 1) for head in self.heads if head.center is not None)

    def after_update(self) -> None:
        """Bring those of batch norms together; frozen ones do not change."""
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
        """Leave the heads as those of a model that is trained alone."""
        for head in self.heads:
            head.synchronized = False


# Counting what DistributedDataParallel sends: a fixed classifier has no gradients to synchronise (paper, 4.1).


# Annotations have to be real here, not strings: torch looks at those of a hook.


class CountedAllReduce:
    """The communication hook that does what DistributedDataParallel does by itself, and counts the bytes of it.

    Attributes:
        num_bytes: Of the gradients that this process gave into sums over all processes, so far.
    """

    def __init__(self) -> None:
        self.num_bytes = 0

    def hook(self, state: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.num_bytes += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)


# One model in several processes: each has a copy, and the gradients are averaged (DistributedDataParallel).


class Replicas:
    """Copies of a model, one in each process, that stay alike.

    DistributedDataParallel is not let near the buffers: it would send all of them before every step, the tables of a
    fixed head among them, which never change.

    Args:
        model: The first process's parameters and floating-point buffers are given to all; others are never trained.
        options: How.
        device: Of this process.

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
        """The model's outputs for this process's share of a batch."""
        self.statistics.count_forward()
        return self.module(images)

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a forward and a backward pass: gradients are averaged in the last one before an update."""
        return contextlib.nullcontext() if last else self.module.no_sync()

    def before_update(self) -> None:
        """The gradients are what they have to be."""

    def after_update(self) -> None:
        """Bring the running statistics together."""
        self.updates += 1
        self.statistics.after_update()

    def bytes_an_update(self) -> tuple[float | None, float | None]:
        """Of gradients and of statistics, as this process gave them into sums over all."""
        if self.updates == 0:
            return None, None
        return self.counted.num_bytes / self.updates, self.statistics.num_bytes / self.updates

    def close(self) -> None:
        """Leave the model as one that is trained alone."""
        self.statistics.close()


@torch.no_grad()
def broadcast_parameters(model: nn.Module) -> None:
    """Give all processes the first one's parameters and floating-point buffers, shards aside."""
    if distributed.world_size() == 1:
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), src=0)


# One model spread over several processes (FSDP2), for backbones that do not fit on one device.


def check_shard(options: FinetuneOptions) -> None:
    """Raise `UsageError` if the model cannot be sharded, or not with the other options."""
    if distributed.world_size() == 1:
        raise UsageError(
            "--shard spreads the model over several processes, and this is one.",
            hint="Add --nproc-per-node N, or leave out --shard.",
        )
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UsageError(f"--shard needs torch 2.7 or newer, and this is {torch.__version__}.")
    reasons = {
        "--ema-decay": (options.ema_decay is not None, "the average is a second model that no process has whole"),
        "--last-block-epochs": (options.last_block_epochs > 0, "the last blocks are divided off a whole model"),
        "--compile": (options.compile, "a whole graph has no place for gathering the shards"),
        "--amp fp16": (options.amp == "fp16", "each process would scale its own shards; use bf16"),
        f"--clip-mode {options.clip_mode}": (options.clip_mode != "norm", "its gradients are clipped by their norm"),
    }
    for name, (given, reason) in reasons.items():
        if given:
            raise UsageError(f"--shard does not go together with {name}: {reason}.", hint="Leave out one of the two.")


def shard_(model: nn.Module, device: torch.device) -> nn.Module | None:
    """Spread the parameters of a model over the processes, in place.

    What is gathered together is each element of the outermost sequences (a transformer's blocks, a ResNet's
    bottlenecks), and the rest. A fixed head has nothing to shard: its scale and bias stay whole in each process.

    Args:
        model: Whole, in each process the same; on the CPU if it is too large for a device.
        device: Of this process.

    Returns:
        A copy on the CPU that is still whole, for writing checkpoints; in the first process only.
    """
    whole = copy.deepcopy(model).cpu() if distributed.is_rank_zero() else None
    heads = [module for module in model.modules() if isinstance(module, FixedClassifier)]
    for head in heads:
        head.to(device)
    ignored = {parameter for head in heads for parameter in head.parameters()}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for part in [*_parts(model), model]:
        fully_shard(part, mesh=mesh, ignored_params=ignored)
    return whole


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child) > 1:
            yield from (part for part in child if any(True for _ in part.parameters()))
        else:
            yield from _parts(child)


class Shards:
    """A model that was sharded, in training; the same as `Replicas` otherwise.

    Args:
        model: From `shard_`.
        options: How.
    """

    def __init__(self, model: nn.Module, options: FinetuneOptions) -> None:
        self.module: Any = model
        self.statistics = RunningStatistics(model, options)
        self.plain = [parameter for head in self.statistics.heads for parameter in head.parameters()]

    def __call__(self, images: Tensor) -> Any:
        """The model's outputs for this process's share of a batch."""
        self.statistics.count_forward()
        return self.module(images)

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Around a forward and a backward pass: gradients are averaged in the last one before an update."""
        self.module.set_requires_gradient_sync(last)
        yield

    def before_update(self) -> None:
        """Average the gradients of what is not sharded."""
        for parameter in self.plain:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= distributed.world_size()

    def after_update(self) -> None:
        """Bring the running statistics together."""
        self.statistics.after_update()

    def bytes_an_update(self) -> tuple[float | None, float | None]:
        """Not counted: FSDP2 sends pieces of weights and gradients, with no hook of ours."""
        return None, None

    def close(self) -> None:
        """Leave the heads as those of a model that is trained alone."""
        self.statistics.close()


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_shards_(model: nn.Module, most: float) -> None:
    """Scale the gradients down to a norm over all of them, sharded and not, of at most so much."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [nn.utils.get_total_norm(plain)] if plain else []
    if sharded:
        norm = nn.utils.get_total_norm(sharded)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    factor = (most / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_
    for gradient in gradients:
        gradient.mul_(factor)


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict gathered on the CPU of the first process, empty in the others; all have to call it."""
    return get_model_state_dict(model, options=_WHOLE)


def whole_moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state, by the names of the parameters; as `whole_weights`. Empty before the first update: torch
    would make a first one of nothing to have something to gather, and moments that count their updates would be off.
    """
    if not optimiser.state:
        return {}
    return get_optimizer_state_dict(model, optimiser, options=_WHOLE)


def load_whole(
    model: nn.Module, optimiser: torch.optim.Optimizer, weights: dict[str, Any], moments: dict[str, Any]
) -> None:
    """Give each process its shards of what was gathered, which each has whole."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    if moments:
        set_optimizer_state_dict(model, optimiser, moments, options=options)
