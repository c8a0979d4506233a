"""Batches of preprocessed images, with timm's transforms; they are the same with any number of worker processes.

An image that cannot be read is counted (`UnreadableImages`) and replaced or left out; too many of them are an error.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision import transforms

from fixify.data.dataset import ImageSource, OpenedData
from fixify.data.preprocessing import channels_of, normalization
from fixify.data.sampler import BatchSampler, Shard
from fixify.data.seeding import restored_globals, seed_globals, seeded_globals
from fixify.errors import DataError
from fixify.models.architectures import Preprocessing

Batch = tuple[Tensor, Tensor]
_Samples = list[tuple[Tensor, int]]
_TRIES = 50  # images to try for one place in a training batch, as in timm


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented; names and defaults are timm's (`timm.data.create_transform`, `Mixup`).

    Attributes:
        crop_padding: Not timm's. Instead of a random resized crop, pad the whole image with this many pixels of the
            mean colour on each side and take a random crop of its size, as is usual for small images (He et al. 2016,
            section 4.2: 4 pixels). `scale`, `ratio` and `interpolation` then have no effect.
    """

    no_aug: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int | None = None
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    interpolation: str = "random"
    reprob: float = 0.0
    remode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether labels become distributions over the classes, [batch, num_classes], with smoothing included."""
        return self.mixup > 0 or self.cutmix > 0


def default_workers(device: torch.device) -> int:
    """Choose the number of loader processes.

    With an accelerator there are up to 8. On a CPU they get half of the cores, because the model needs the others.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores) if device.type != "cpu" else min(8, cores // 2)


def make_loader(
    opened: OpenedData,
    preprocessing: Preprocessing,
    *,
    training: bool,
    batch_size: int,
    workers: int = 0,
    device: torch.device | None = None,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    unreadable: UnreadableImages | None = None,
    shard: Shard | None = None,
) -> ImageLoader:
    """Make batches of images and labels for a model.

    Args:
        opened: The images.
        preprocessing: timm's data configuration; see `fixify.data.preprocessing.Preprocessing`.
        training: Shuffle, augment, and drop the incomplete last batch. Otherwise take all images in order.
        batch_size: Images per batch of this process. If there are fewer images, one batch has them all.
        workers: Loader processes; 0 loads in this process.
        device: Where the batches will be used. For CUDA they are copied there ahead of time (timm's prefetcher).
        seed: Decides order, augmentation and mixing, together with the epoch.
        augmentation: Used only in training. None means `Augmentation()`.
        unreadable: Counts the images that cannot be read. None allows none. In training the next readable image of the
            data replaces an unreadable one (as in timm), so that batches keep their size; otherwise it is left out.
        shard: Which process this is, of several that run together. In training, k processes with batches of B images
            see the same images, augmented, mixed and erased alike, as one process with batches of k * B. Otherwise
            each image is in exactly one shard, and a shard may be empty.

    Returns:
        An iterable over (images float32 [B, channels, height, width], labels int64 [B]). With Mixup or CutMix the
        labels are float32 [B, num_classes].

    Raises:
        DataError: no image can be preprocessed as configured; or, while iterating, too many images are unreadable.
    """
    device = device if device is not None else torch.device("cpu")
    augmentation = augmentation if augmentation is not None else Augmentation()
    mean, std = normalization(preprocessing)
    keys = BatchSampler(
        len(opened),
        batch_size,
        training=training,
        seed=seed,
        even=training and augmentation.mixes,
        shard=shard or Shard(),
    )
    loader: Any = DataLoader(
        _TransformedImages(
            opened.images,
            "L" if channels_of(preprocessing) == 1 else "RGB",
            _training_transform(preprocessing, augmentation) if training else _evaluation_transform(preprocessing),
            random=training,
        ),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupt,
        # Without a generator, starting workers would draw from the global one. Seeds travel with the keys.
        generator=torch.Generator().manual_seed(0),
    )
    erase, mix = _batch_augmentation(augmentation, opened.num_classes, device) if training else (None, None)
    unreadable = unreadable if unreadable is not None else UnreadableImages(len(opened))
    return ImageLoader(loader, keys, unreadable, _BatchStages(device, mean, std, erase, mix))


@dataclass(frozen=True)
class _BatchStages:
    """What happens to a whole batch: it is normalised with mean and std, then erased, then mixed.

    Attributes:
        device: Where this happens.
        mean: Mean of each channel, for values between 0 and 1.
        std: Standard deviation of each channel.
        erase: Erases part of one image in place.
        mix: Mixes the images of a batch, and their labels.
    """

    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    erase: Callable[[Tensor], Tensor] | None
    mix: Callable[[Tensor, Tensor], Batch] | None


class ImageLoader:
    """Iterates over the batches of one epoch; see `make_loader`. Call `set_epoch` to choose the epoch."""

    def __init__(self, loader: Any, keys: BatchSampler, unreadable: UnreadableImages, stages: _BatchStages) -> None:
        self._loader = loader
        self._keys = keys
        self.unreadable = unreadable
        self._stages = stages
        self._empty = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch (its order and augmentation) and the batch that the next iteration begins with."""
        self._keys.epoch = epoch
        self._keys.first_batch = first_batch

    def __len__(self) -> int:
        """Return the batches per epoch of the process that has the most."""
        return len(self._keys)

    @property
    def own_batches(self) -> int:
        """Batches per epoch of this process.

        In validation this may be one less than another process has. Batches of which the last iteration could read no
        image do not count.
        """
        return self._keys.own_batches - self._empty

    @property
    def num_images(self) -> int:
        """Images per epoch of all processes."""
        return self._keys.images_used

    def __iter__(self) -> Iterator[Batch]:
        stages = self._stages
        number = self._keys.first_batch
        for images, labels in self._normalized_batches():
            if stages.erase is not None:
                with seeded_globals(0, stages.device):
                    for image, seed in zip(images, self._keys.erasing_seeds(number), strict=True):
                        seed_globals(seed, stages.device)
                        stages.erase(image)
            if stages.mix is not None:
                with seeded_globals(self._keys.batch_seed(number), stages.device):
                    images, labels = stages.mix(images, labels)
            yield images, labels
            number += 1

    def close(self) -> None:
        """Stop the worker processes. The loader can be iterated again afterwards."""
        iterator = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _normalized_batches(self) -> Iterator[Batch]:
        self._empty = 0
        batches = _ReadableBatches(self._loader, self.unreadable, self._count_empty)
        mean, std, device = self._stages.mean, self._stages.std, self._stages.device
        if device.type == "cuda":
            return iter(PrefetchLoader(batches, mean=mean, std=std, channels=len(mean), device=device))
        return _normalize(batches, mean, std)

    def _count_empty(self) -> None:
        self._empty += 1


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read. A worker sends it as a value, because an exception would arrive as a traceback.

    Attributes:
        message: What is wrong with the image; it names the image.
        hint: What to do about it.
    """

    message: str
    hint: str | None = None


class UnreadableImages:
    """Counts the unreadable images of a data set, each once.

    An image is identified by its message, so several loaders may count the images of one data set.

    Args:
        num_images: Images in the data set.
        max_fraction: Fraction of them that may be unreadable; 0 makes the first one an error.
        on_found: Called for each new one with its message and the number of them so far.

    Attributes:
        messages: The message of each, in the order in which they were found.

    >>> unreadable = UnreadableImages(100, max_fraction=0.01)
    >>> unreadable.add(Unreadable("Cannot read a.png."))
    >>> unreadable.add(Unreadable("Cannot read a.png."))
    >>> len(unreadable)
    1
    """

    def __init__(
        self, num_images: int, max_fraction: float = 0.0, on_found: Callable[[str, int], object] | None = None
    ) -> None:
        self.num_images = num_images
        self.max_fraction = max_fraction
        self.on_found = on_found
        self.messages: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, found: Unreadable) -> None:
        """Count an image.

        Raises:
            DataError: more images are unreadable than allowed.
        """
        if found.message in self.messages:
            return
        self.messages[found.message] = None
        count = len(self.messages)
        if self.max_fraction == 0:
            raise DataError(found.message, hint=found.hint)
        if count > self.max_fraction * self.num_images:
            raise DataError(
                f"{count:,} of {self.num_images:,} images cannot be read, and {self.max_fraction:g} of them may be "
                f"unreadable (--max-unreadable). The last one: {found.message}",
                hint=f"{found.hint or ''} Or allow more: --max-unreadable {10 * self.max_fraction:g}".strip(),
            )
        if self.on_found is not None:
            self.on_found(found.message, count)


def _training_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Any:
    transform = create_transform(
        input_size=tuple(preprocessing["input_size"]),
        use_prefetcher=True,  # images stay uint8 up to the batch: less to compute, and to send between processes
        is_training=True,
        no_aug=augmentation.no_aug,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=augmentation.interpolation,
        **_mean_and_std(preprocessing),
    )
    if augmentation.crop_padding is not None and not augmentation.no_aug:
        transform.transforms[0] = _padded_crop(augmentation.crop_padding, preprocessing)
    return transform


def _evaluation_transform(preprocessing: Preprocessing) -> Any:
    return create_transform(
        input_size=tuple(preprocessing["input_size"]),
        use_prefetcher=True,
        interpolation=preprocessing.get("interpolation", "bilinear"),
        crop_pct=preprocessing.get("crop_pct"),
        crop_mode=preprocessing.get("crop_mode"),
        **_mean_and_std(preprocessing),
    )


def _mean_and_std(preprocessing: Preprocessing) -> dict[str, tuple[float, ...]]:
    mean, std = normalization(preprocessing)
    return {"mean": mean, "std": std}


def _padded_crop(padding: int, preprocessing: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    """Resize the shorter side to the input size, pad, and take a random crop of the input size."""
    size = tuple(preprocessing["input_size"])[1:]
    mean, _ = normalization(preprocessing)
    # The mean becomes zero when the images are normalised. He et al. pad with zeros after normalising.
    fill = tuple(round(255 * value) for value in mean)
    crop: Callable[[Image.Image], Image.Image] = transforms.Compose(
        [
            transforms.Resize(min(size), str_to_interp_mode(preprocessing.get("interpolation", "bilinear"))),
            transforms.RandomCrop(size, padding, fill=fill if len(fill) > 1 else fill[0]),
        ]
    )
    return crop


def _batch_augmentation(
    augmentation: Augmentation, num_classes: int, device: torch.device
) -> tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor, Tensor], Batch] | None]:
    """Make the functions that erase and mix; None for what the augmentation does not do."""
    erase = mix = None
    if augmentation.reprob > 0:
        # Not in timm's prefetcher, which would erase one batch early.
        erase = RandomErasing(augmentation.reprob, mode=augmentation.remode, max_count=1, device=device)
    if augmentation.mixes:
        mix = Mixup(
            mixup_alpha=augmentation.mixup,
            cutmix_alpha=augmentation.cutmix,
            prob=augmentation.mixup_prob,
            switch_prob=augmentation.mixup_switch_prob,
            label_smoothing=augmentation.smoothing,
            num_classes=num_classes,
        )
    return erase, mix


class _TransformedImages(Dataset[Any]):
    """Loads images, converts them to the model's number of channels, and transforms them.

    Args:
        images: The images.
        mode: Pillow's "L" (one channel) or "RGB".
        transform: timm's.
        random: Whether the transform draws random numbers.
    """

    def __init__(self, images: ImageSource, mode: str, transform: Callable[[Image.Image], Tensor], *, random: bool):
        self.images = images
        self.mode = mode
        self.transform = transform
        self.random = random

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[_Samples, list[Unreadable]]:
        # A worker process has its own global generators. Those of the caller's process must not change.
        in_this_process = self.random and get_worker_info() is None
        samples, failures = _Samples(), list[Unreadable]()
        with restored_globals() if in_this_process else nullcontext():
            for index, seed in keys:
                loaded = self._load(index, failures)
                if loaded is not None:
                    if self.random:
                        seed_globals(seed)
                    image, label = loaded
                    samples.append((self.transform(image), label))
        return samples, failures

    def _load(self, index: int, failures: list[Unreadable]) -> tuple[Image.Image, int] | None:
        """Load an image, or in training the next one that is readable."""
        for place in range(index, index + (_TRIES if self.random else 1)):
            place %= len(self.images)
            try:
                image, label = self.images.load(place)
                return (image if image.mode == self.mode else image.convert(self.mode)), label
            except DataError as error:
                failures.append(Unreadable(error.message, error.hint))
        return None


def _collate(items: Any) -> tuple[list[Tensor], list[Unreadable]]:
    samples, failures = items  # what `_TransformedImages.__getitems__` returns
    return (default_collate(samples) if samples else []), failures


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches the whole process group, and so does torchrun's SIGTERM. The training loop chooses the step at
    # which it stops, and it needs its batches until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _ReadableBatches:
    """The batches of a loader. Unreadable images are counted, and raised, in the caller's process."""

    def __init__(self, loader: Any, unreadable: UnreadableImages, on_empty: Callable[[], object]) -> None:
        self.loader = loader
        self.unreadable = unreadable
        self.on_empty = on_empty

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch, failures in self.loader:
                for failure in failures:
                    self.unreadable.add(failure)
                if len(failures) >= _TRIES and self.loader.dataset.random:
                    self._check_complete(batch, failures)
                if batch:
                    yield batch[0], batch[1]
                else:
                    self.on_empty()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"A loader process ended unexpectedly: {str(error).splitlines()[0]}",
                hint="The machine may be out of memory. Try --workers 0 or a smaller --batch-size.",
            ) from error

    def _check_complete(self, batch: list[Tensor], failures: list[Unreadable]) -> None:
        if not batch or len(batch[0]) < self.loader.batch_sampler.batch_size:
            raise DataError(
                f"{_TRIES} images in a row cannot be read. The last one: {failures[-1].message}",
                hint=failures[-1].hint,
            )


def _normalize(batches: Iterable[Batch], mean: tuple[float, ...], std: tuple[float, ...]) -> Iterator[Batch]:
    """Normalise uint8 batches as timm's prefetcher does, without fetching any ahead of time."""
    means, stds = (torch.tensor([255 * value for value in values]).view(1, -1, 1, 1) for values in (mean, std))
    for images, labels in batches:
        yield images.float().sub_(means).div_(stds), labels
