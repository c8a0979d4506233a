"""One model in several processes: each has a copy, and the gradients are averaged (DistributedDataParallel)."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fixify.training import distributed
from fixify.training.options import FinetuneOptions
from fixify.training.running_statistics import RunningStatistics
from fixify.training.sync_bytes import CountedAllReduce


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
        make_alike(model)
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
def make_alike(model: nn.Module) -> None:
    """Give all processes the first one's parameters and floating-point buffers, shards aside."""
    if distributed.count() == 1:
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), src=0)
