"""The processes that train one model together, and what they tell each other.

They are started by torchrun, one a GPU (or a few on a CPU), and are alike: each takes its share of every batch, and
what is measured is added up, so that all of them know the same and decide the same. The first one (rank 0) alone writes
and speaks. Without torchrun there is one process and no process group, and nothing here communicates.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fixify.data import Shard
from fixify.errors import FixifyError, TrainingError, UsageError
from fixify.metrics import resolve_device

T = TypeVar("T")

_groups = itertools.count()  # of this process; the others form the same ones in the same order
_PATIENCE = timedelta(minutes=30)  # while the first process alone reads or writes, the others wait this long


class ConnectionLost(TrainingError):
    """Another process ended, or cannot be reached; why is for it to tell, if it still can."""


def launched() -> int:
    """How many processes torchrun started, on all nodes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def local_rank() -> int:
    """Place of this process among those on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() > 1 else 0


def local_world_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() > 1 else 1


def world_size() -> int:
    """Processes in the group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Place of this process among all, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def device_for(name: str) -> str:
    """The device of this process, by the name that all of them were given.

    Raises:
        UsageError: there are fewer accelerators than processes, one of them was named, or the kind cannot be shared.
    """
    if launched() == 1:
        return name
    if ":" in name:
        raise UsageError(
            f"{launched()} processes cannot share {name}.",
            hint=f"Each takes its own with --device {name.partition(':')[0]}.",
        )
    kind = resolve_device(name).type
    if kind == "cpu":
        return kind
    if kind == "mps":
        raise UsageError(
            "Several processes cannot train on mps.", hint="Leave out --nproc-per-node, or add --device cpu."
        )
    available = torch.accelerator.device_count()
    if local_world_size() > available:
        raise UsageError(
            f"{local_world_size()} processes were started here, and there are {available} {kind} devices.",
            hint=f"Start {available} with --nproc-per-node {available}.",
        )
    return f"{kind}:{local_rank()}"


def launch() -> str | None:
    """What tells one start of torchrun from another, in all of its restarts; None without it.

    Its own id is the same every time, unless it was given one.
    """
    own = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if own is None else f"{own}/{os.getppid()}"


def launch_record() -> dict[str, Any]:
    """What a run records about its processes."""
    return {"processes": world_size(), **({} if launch() is None else {"launch": launch()})}


def local_shard() -> Shard:
    """What this process gets of each batch."""
    return Shard(rank(), world_size())


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Within the block the processes that torchrun started are connected; does nothing for one alone, or inside another
    such block.

    Args:
        device: Of this process: NCCL on CUDA, gloo on the CPU, and for what is on the CPU anyway.

    Raises:
        ConnectionLost: the others cannot be reached, or one of them ended.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    backend = (
        "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    )
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    with _translated():
        store, own_rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
        # torchrun's store outlives its workers, and a group its runs: the addresses of those that ended would be there.
        place = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}, group {next(_groups)}"
        attempt = dist.PrefixStore(place, store)
        dist.init_process_group(backend, store=attempt, rank=own_rank, world_size=size, timeout=_PATIENCE)
        yield
        # Not after an error: the others may be waiting for this process, which would then wait for them.
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in text.lower() and "NCCL" not in text:
            raise
        raise ConnectionLost(
            f"The connection to another process was lost: {text.splitlines()[0]}",
            hint="What it said before it ended tells why. Go on with the same command and --resume.",
        ) from error


def sum_(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(*numbers: int) -> tuple[int, ...]:
    """Of each number the largest that any process has: how they agree on what to do next."""
    if world_size() == 1:
        return numbers
    told = torch.tensor(numbers)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return tuple(told.tolist())


def all_gather(own: T) -> list[T]:
    """What each process has, by rank."""
    if world_size() == 1:
        return [own]
    everyone: list[T | None] = [None] * world_size()
    dist.all_gather_object(everyone, own)
    return cast("list[T]", everyone)


def interleaved(own: list[T]) -> list[T]:
    """The whole list of which each process has every count-th item, beginning with its rank's."""
    parts = all_gather(own)
    whole = [None] * sum(map(len, parts))
    for first, part in enumerate(parts):
        whole[first :: len(parts)] = part  # type: ignore[assignment]
    return cast("list[T]", whole)


def on_rank_zero(do: Callable[[], T]) -> T:
    """Have it done by the first process; all get what came of it, or the same `FixifyError`."""
    if world_size() == 1:
        return do()
    told: list[T | FixifyError | None] = [None]
    if is_rank_zero():
        try:
            told = [do()]
        except FixifyError as error:
            told = [error]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], FixifyError):
        raise told[0]
    return cast("T", told[0])
