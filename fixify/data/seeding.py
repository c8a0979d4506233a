"""Randomness that depends on (seed, epoch, what) and on nothing else.

timm's and torchvision's augmentations draw from the global generators of `random`, NumPy and torch. Here each image
and each batch gets a seed of its own, and the global generators are put back afterwards. So an epoch is the same
with any number of workers, a resumed run needs no stored random state, and the caller's own randomness is untouched.
"""

from __future__ import annotations

import contextlib
import enum
import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray


@enum.unique
class Stream(enum.IntEnum):
    """What is drawn from the seed of a training on images: the number follows (seed, epoch) among the parts.

    No two have one number, whatever parts follow: (3, 0, 9) and (3, 0, 9, 0) give one seed, since NumPy fills up with
    zeros. A number that is changed changes every result that was drawn from it.
    """

    ORDER = 0  # of the training images
    IMAGES = 1  # the augmentation of each
    BATCHES = 2  # Mixup and CutMix
    DROPOUT = 3
    CALIBRATION = 4  # images for the statistics of features
    HOLD_OUT = 5  # unlabelled images for validation
    DRAW = 6  # images that `convert` calibrates on
    LAST_BLOCK_DROPOUT = 7
    LAST_BLOCK = 8  # images for the stage that trains the last blocks
    INIT = 9  # weights of a network from scratch
    ERASING = 10
    LAST_BLOCK_ORDER = 11  # of their features


def derive_seed(*parts: int) -> int:
    """A 32-bit seed from non-negative integers; different parts give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def derive_seeds(*parts: int, count: int) -> NDArray[np.uint32]:
    """`count` 32-bit seeds from non-negative integers."""
    return np.random.SeedSequence(parts).generate_state(count).astype(np.uint32, copy=False)


def permutation(*parts: int, count: int) -> NDArray[np.int64]:
    """A permutation of range(count) from non-negative integers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(parts))).permutation(count)


def seed_globals(seed: int, device: torch.device | None = None) -> None:
    """Seed the global CPU generators, and the device's, with `seed` below 2**32. Only inside `kept_globals` (with a
    device `seeded_globals`) or in a worker process.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (timm's augmentations draw from the legacy generator)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device.type).manual_seed(seed)


@contextlib.contextmanager
def kept_globals() -> Iterator[None]:
    """After the block the global CPU generators are as they were before it. Costs about 0.2 ms."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)


@contextlib.contextmanager
def seeded_torch(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch's CPU generator and the device's are seeded (dropout draws from them); then as before."""
    accelerator = None if device.type == "cpu" else torch.get_device_module(device.type)
    cpu_state, device_state = torch.get_rng_state(), None if accelerator is None else accelerator.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        if accelerator is not None:
            accelerator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if accelerator is not None:
            accelerator.set_rng_state(device_state)


@contextlib.contextmanager
def seeded_globals(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block the global generators, and the device's, are seeded with `seed`; then as before."""
    with kept_globals(), seeded_torch(seed, device):
        seed_globals(seed)
        yield
