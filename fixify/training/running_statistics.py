"""The running statistics of a model of which each process has a copy: of batch norms and of fixed heads."""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
            flat /= distributed.count()
        self.num_bytes += flat.nbytes
        parts = flat.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])

    def close(self) -> None:
        """Leave the heads as those of a model that is trained alone."""
        for head in self.heads:
            head.synchronized = False
