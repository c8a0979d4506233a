"""Choose the images of each batch, their order and their seeds, as a function of (seed, epoch, batch, image) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from fixify._values import counted
from fixify.data.seeding import Stream, derive_seed, derive_seeds, permutation
from fixify.errors import DataError


@dataclass(frozen=True)
class Shard:
    """The part of the images that one process reads, when several processes run together.

    Attributes:
        rank: Which process, from 0.
        count: Number of processes.
    """

    rank: int = 0
    count: int = 1


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (image index, seed of that image in this epoch).

    Set `epoch` and `first_batch` before iterating.

    Args:
        num_images: Images in the data set.
        batch_size: Images per batch of this process. If there are fewer images, one batch has them all.
        training: Shuffle, and drop the incomplete last batch. Otherwise take all images in order.
        seed: Decides the order and the seeds, together with the epoch.
        even: Round the batch size down to an even number; timm's Mixup pairs the images of a batch.
        shard: Which process this is. In training the processes together read the batches that one process with
            batches of batch_size * shard.count images would read. Otherwise process r reads images r, r + count, ...
        copy: Outside of training: give the images the seeds of this epoch; None: all get 0.

    Attributes:
        batch_size: Images per batch of this process, after the adjustments above.
        global_batch_size: Images per batch of all processes.
        images_used: Images per epoch of all processes.

    Raises:
        DataError: there are too few images for one batch.

    >>> list(BatchSampler(5, 2, training=False, seed=0, even=False, shard=Shard(rank=1, count=2)))
    [[(1, 0), (3, 0)]]
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        training: bool,
        seed: int,
        even: bool,
        shard: Shard,
        copy: int | None = None,
    ) -> None:
        self.num_images = num_images
        self.copy = copy
        self.training = training
        self.seed = seed
        self.shard = shard
        self.epoch = 0
        self.first_batch = 0
        size = min(batch_size, num_images // shard.count if training else num_images)
        self.batch_size = size - size % 2 if even else size
        if self.batch_size == 0:
            where = f" of {shard.count} processes" if shard.count > 1 else ""
            raise DataError(f"{counted(num_images, 'image')}: too few for a batch{where}.")
        self.global_batch_size = self.batch_size * shard.count
        # An incomplete last batch could have one image, on which batch norm fails.
        self.images_used = num_images - num_images % self.global_batch_size if training else num_images

    def __len__(self) -> int:
        return -(-self.images_used // self.global_batch_size)

    @property
    def own_batches(self) -> int:
        """Batches per epoch of this process."""
        return len(self) if self.training else -(-len(self._own_indices()) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if not self.training:
            indices = self._own_indices()
            drawn = np.zeros(self.num_images, np.uint32)
            if self.copy is not None:
                drawn = derive_seeds(self.seed, self.copy, Stream.IMAGES, count=self.num_images)
            for start in range(self.first_batch * self.batch_size, len(indices), self.batch_size):
                yield [(index, int(drawn[index])) for index in indices[start : start + self.batch_size]]
            return
        order = permutation(self.seed, self.epoch, Stream.ORDER, count=self.num_images)
        seeds = derive_seeds(self.seed, self.epoch, Stream.IMAGES, count=self.num_images)
        positions = self._positions()
        for start in range(self.first_batch * self.global_batch_size, self.images_used, self.global_batch_size):
            own = order[start : start + self.global_batch_size][positions]
            yield list(zip(own.tolist(), seeds[own].tolist(), strict=True))

    def batch_seed(self, number: int) -> int:
        """Return the seed of Mixup and CutMix for batch `number`; all processes get the same."""
        return derive_seed(self.seed, self.epoch, Stream.BATCHES, number)

    def erasing_seeds(self, number: int) -> list[int]:
        """Return the seed of random erasing for each image that this process has in batch `number`."""
        seeds = derive_seeds(self.seed, self.epoch, Stream.ERASING, number, count=self.global_batch_size)
        found: list[int] = seeds[self._positions()].tolist()
        return found

    def _own_indices(self) -> range:
        return range(self.shard.rank, self.num_images, self.shard.count)

    def _positions(self) -> list[int]:
        """List the positions of this process's images in the batch of all processes.

        timm's Mixup pairs position i with position -1 - i, so each process gets positions from the front and their
        mirror images from the back.
        """
        rank, total = self.shard.rank, self.global_batch_size
        back = self.batch_size // 2
        front = self.batch_size - back
        return [*range(rank * front, (rank + 1) * front), *range(total - (rank + 1) * back, total - rank * back)]
