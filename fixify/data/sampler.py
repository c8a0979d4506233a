"""Which images a batch has, in what order, with which seeds: functions of (seed, epoch, batch, image) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from fixify.data.seeding import Stream, derive_seed, derive_seeds, permutation
from fixify.errors import DataError


@dataclass(frozen=True)
class Shard:
    """Which part of each batch is for this process, of so many that train together; the whole of it for one."""

    rank: int = 0
    count: int = 1


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed of that image in this epoch)."""

    def __init__(
        self, num_images: int, batch_size: int, *, training: bool, seed: int, even: bool, share: Shard
    ) -> None:
        self.num_images = num_images
        self.training = training
        self.seed = seed
        self.share = share
        self.epoch = 0
        self.first_batch = 0
        size = min(batch_size, num_images // share.count if training else num_images)
        self.batch_size = size - size % 2 if even else size  # timm's Mixup pairs the images of a batch
        if self.batch_size == 0:
            where = f" of {share.count} processes" if share.count > 1 else ""
            raise DataError(f"{num_images} images are too few for a batch{where}.")
        self.all_at_once = self.batch_size * share.count
        # Without its last incomplete batch an epoch has no batch of one image, on which batch norm fails.
        self.images_used = num_images - num_images % self.all_at_once if training else num_images

    def __len__(self) -> int:
        return -(-self.images_used // self.all_at_once)

    @property
    def own_batches(self) -> int:
        return len(self) if self.training else -(-len(self._own_indices()) // self.batch_size)

    def _own_indices(self) -> range:
        return range(self.share.rank, self.num_images, self.share.count)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if not self.training:
            indices = self._own_indices()
            for start in range(self.first_batch * self.batch_size, len(indices), self.batch_size):
                yield [(index, 0) for index in indices[start : start + self.batch_size]]
            return
        order = permutation(self.seed, self.epoch, Stream.ORDER, count=self.num_images)
        seeds = derive_seeds(self.seed, self.epoch, Stream.IMAGES, count=self.num_images)
        places = self._places()
        for start in range(self.first_batch * self.all_at_once, self.images_used, self.all_at_once):
            indices_here = order[start : start + self.all_at_once][places]
            yield list(zip(indices_here.tolist(), seeds[indices_here].tolist(), strict=True))

    def _places(self) -> list[int]:
        """Of the images of all processes at once, those of this one: some from the front and their mirror images from
        the back, since it is those that timm's Mixup pairs.
        """
        rank, total = self.share.rank, self.all_at_once
        back = self.batch_size // 2
        front = self.batch_size - back
        return [*range(rank * front, (rank + 1) * front), *range(total - (rank + 1) * back, total - rank * back)]

    def batch_seed(self, number: int) -> int:
        return derive_seed(self.seed, self.epoch, Stream.BATCHES, number)

    def erasing_seeds(self, number: int) -> list[int]:
        seeds = derive_seeds(self.seed, self.epoch, Stream.ERASING, number, count=self.all_at_once)
        found: list[int] = seeds[self._places()].tolist()
        return found
