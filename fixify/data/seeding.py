"""Random numbers that depend on (seed, epoch, purpose) and on nothing else.

timm's and torchvision's augmentations draw from the global generators of `random`, NumPy and torch. Here each image and
each batch gets its own seed, and the global generators are restored afterwards. So an epoch is the same with any number
of workers, a resumed run needs no stored random state, and the caller's own random state does not change.
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
    """What is drawn from the seed of a training on images; the number follows (seed, epoch) among the parts of a seed.

    The numbers must differ whatever parts follow, because NumPy pads the parts with zeros: (3, 0, 9) and (3, 0, 9, 0)
    give the same seed. To change a number is to change every result that was drawn from it.
    """

    ORDER = 0  # order of the training images
    IMAGES = 1  # augmentation of each image
    BATCHES = 2  # Mixup and CutMix
    DROPOUT = 3
    CALIBRATION = 4  # images for the statistics of features
    HOLD_OUT = 5  # unlabelled images for validation
    DRAW = 6  # images that `convert` calibrates on
    LAST_BLOCK_DROPOUT = 7
    LAST_BLOCK = 8  # images for the stage that trains the last blocks
    INIT = 9  # initial weights of a network trained from scratch
    ERASING = 10
    LAST_BLOCK_ORDER = 11  # order of the features in that stage
    RATE_SEARCH = 12  # images that are held out to compare learning rates
    CONVERSION = 13  # images on which a run converts its learned classifier


def derive_seed(*parts: int) -> int:
    """Derive a 32-bit seed from non-negative integers; different parts give unrelated seeds.

    >>> derive_seed(1, 2, Stream.IMAGES)
    830043460
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def derive_seeds(*parts: int, count: int) -> NDArray[np.uint32]:
    """Derive `count` 32-bit seeds from non-negative integers."""
    return np.random.SeedSequence(parts).generate_state(count).astype(np.uint32, copy=False)


def permutation(*parts: int, count: int) -> NDArray[np.int64]:
    """Derive a permutation of range(count) from non-negative integers.

    >>> permutation(1, 2, Stream.INIT, count=6).tolist()
    [3, 5, 0, 1, 2, 4]
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(parts))).permutation(count)


def seed_globals(seed: int, device: torch.device | None = None) -> None:
    """Seed the global CPU generators, and the device's generator, with a seed below 2**32.

    Use it only inside `restored_globals` (with a device: `seeded_globals`) or in a worker process.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (timm's augmentations draw from the legacy generator)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device.type).manual_seed(seed)


@contextlib.contextmanager
def restored_globals() -> Iterator[None]:
    """Restore the global CPU generators after the block, which costs about 0.2 ms."""
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
    """Seed torch's CPU generator and the device's inside the block (dropout draws from them); then restore them."""
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
    """Seed the global generators of `random`, NumPy, torch and the device inside the block; then restore them.

    >>> with seeded_globals(0, torch.device("cpu")):
    ...     first = torch.rand(1)
    >>> with seeded_globals(0, torch.device("cpu")):
    ...     bool(torch.rand(1) == first)
    True
    """
    with restored_globals(), seeded_torch(seed, device):
        seed_globals(seed)
        yield
