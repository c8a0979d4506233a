"""Helpers for torchrun workers that train one model together: only rank 0 writes and prints.

torchrun starts one process per GPU, or several on a CPU. Each takes its shard of every batch. Measurements are summed
over all processes, so all of them have the same numbers and take the same decisions. Without torchrun there is one
process and no process group, and nothing here communicates.
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

from fixify._values import counted
from fixify.data import Shard
from fixify.errors import FixifyError, TrainingError, UsageError
from fixify.metrics import resolve_device

T = TypeVar("T")

_group_numbers = itertools.count()  # every process creates the same groups in the same order
_TIMEOUT = timedelta(minutes=30)  # how long the other processes wait while rank 0 reads or writes


class ConnectionLost(TrainingError):
    """Another process ended or cannot be reached; its own error message says why, if it could still write one."""


def launched() -> int:
    """Return how many processes torchrun started, on all nodes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


def local_rank() -> int:
    """Return the rank of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() > 1 else 1


def world_size() -> int:
    """Return the number of processes in the process group.

    >>> world_size()
    1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Check whether this is the process that writes and prints."""
    return rank() == 0


def device_for(name: str) -> str:
    """Choose the device of this process.

    Args:
        name: The device that all processes were given.

    Raises:
        UsageError: there are fewer accelerators than processes, a single one was named, or processes cannot share it.
    """
    if launched() == 1:
        return name
    if ":" in name:
        raise UsageError(
            f"{launched()} processes cannot share {name}.",
            hint=f"Give each its own with --device {name.partition(':')[0]}.",
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
            f"{local_world_size()} processes were started on this machine, which has "
            f"{counted(available, f'{kind} device')}.",
            hint=f"Start {available} with --nproc-per-node {available}.",
        )
    return f"{kind}:{local_rank()}"


def launch() -> str | None:
    """Identify one start of torchrun, the same in all of its restarts; None without torchrun.

    The parent process is part of it, because torchrun's run id is the same every time unless it was given one.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run_id is None else f"{run_id}/{os.getppid()}"


def launch_record() -> dict[str, Any]:
    """Return what run.json records about the processes."""
    return {"processes": world_size(), **({} if launch() is None else {"launch": launch()})}


def local_shard() -> Shard:
    """Return the shard of each batch that this process gets."""
    return Shard(rank(), world_size())


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes that torchrun started, within the block.

    It does nothing without torchrun, or inside another such block.

    Args:
        device: Device of this process. CUDA tensors go through NCCL, CPU tensors through gloo.

    Raises:
        ConnectionLost: another process cannot be reached, or ended.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    backend = (
        "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    )
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    with _connection_errors():
        store, own_rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        # torchrun's store outlives its workers. Without a prefix it would still hold addresses of earlier groups.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        own_store = dist.PrefixStore(f"attempt {attempt}, group {next(_group_numbers)}", store)
        dist.init_process_group(backend, store=own_store, rank=own_rank, world_size=size, timeout=_TIMEOUT)
        yield
        # Skipped after an error: the others may be waiting in another collective call.
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    """Turn torch's errors about the connection into `ConnectionLost`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in text.lower() and "NCCL" not in text:
            raise
        raise ConnectionLost(
            f"The connection to another process was lost: {text.splitlines()[0]}",
            hint="The messages of that process say why. Go on with the same command and --resume.",
        ) from error


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(*numbers: int) -> tuple[int, ...]:
    """Return the maximum of each number over all processes, so that they can agree on what to do next.

    >>> all_max(3, 0)
    (3, 0)
    """
    if world_size() == 1:
        return numbers
    reduced = torch.tensor(numbers)
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    return tuple(reduced.tolist())


def all_gather(own: T) -> list[T]:
    """Collect an object from every process, by rank."""
    if world_size() == 1:
        return [own]
    everyone: list[T | None] = [None] * world_size()
    dist.all_gather_object(everyone, own)
    return cast("list[T]", everyone)


def on_rank_zero(do: Callable[[], T]) -> T:
    """Call a function on rank 0; every process gets its result, or the `FixifyError` that it raised."""
    if world_size() == 1:
        return do()
    result: list[T | FixifyError | None] = [None]
    if is_rank_zero():
        try:
            result = [do()]
        except FixifyError as error:
            result = [error]
    dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], FixifyError):
        raise result[0]
    return cast("T", result[0])
