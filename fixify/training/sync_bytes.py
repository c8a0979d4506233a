"""Counting what DistributedDataParallel sends: a fixed classifier has no gradients to synchronise (paper, 4.1)."""

# Annotations have to be real here, not strings: torch looks at those of a hook.

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook


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
