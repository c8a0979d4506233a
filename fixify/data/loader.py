"""Images that cannot be read: known by name, and fatal when they are too many."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from fixify.data.seeding import kept_globals, seed_globals, seeded_globals
from fixify.errors import DataError


@dataclass(frozen=True)
class Unreadable:
    """One of them. It travels from a loader process as a value: an exception would arrive as a traceback."""

    message: str
    hint: str | None = None


class UnreadableImages:
    """Those of a data set that were found so far, each counted once.

    Args:
        num_images: Images in the data set.
        max_share: Shard of them that may be unreadable; 0 makes the first one an error.
        on_found: Told of each new one: what is wrong with it, and how many there are now.

    What names an image is its message: several loaders may count the images of one data set.

    Attributes:
        messages: What is wrong with each, with its name; in the order in which they were found.
    """

    def __init__(
        self, num_images: int, max_share: float = 0.0, on_found: Callable[[str, int], object] | None = None
    ) -> None:
        self.num_images = num_images
        self.max_share = max_share
        self.on_found = on_found
        self.messages: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, found: Unreadable) -> None:
        """Count an image.

        Raises:
            DataError: it is one too many.
        """
        if found.message in self.messages:
            return
        self.messages[found.message] = None
        count = len(self.messages)
        if self.max_share == 0:
            raise DataError(found.message, hint=found.hint)
        if count > self.max_share * self.num_images:
            raise DataError(
                f"{count:,} of {self.num_images:,} images cannot be read, and {self.max_share:g} of them may be "
                f"(--max-unreadable). The last one: {found.message}",
                hint=f"{found.hint or ''} Or allow more: --max-unreadable {10 * self.max_share:g}".strip(),
            )
        if self.on_found is not None:
            self.on_found(found.message, count)


# Batches of preprocessed images, on timm's transforms, the same with any number of workers.


Batch = tuple[Tensor, Tensor]
_Items = tuple[list[tuple[Tensor, int]], list[Unreadable]]
_TRIES = 50  # images that are tried for one place of a training batch, as in timm


@dataclass(frozen=True)
class Augmentation:
    """What training images go through; names and defaults are timm's (`timm.data.create_transform`, `Mixup`).

    Attributes:
        crop_padding: Not timm's: instead of a random resized crop, the usual one of small images (He et al. 2016,
            section 4.2: 4). The image, whole, gets so many pixels of the mean colour at each side, and a random crop of
            its size is taken; `scale`, `ratio` and `interpolation` then mean nothing.
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
        """Whether targets become distributions over the classes, [batch, num_classes], smoothing included."""
        return self.mixup > 0 or self.cutmix > 0


def default_workers(device: torch.device) -> int:
    """Loader processes: up to 8 beside an accelerator; on a CPU half of the cores, as the model needs the others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores) if device.type != "cpu" else min(8, cores // 2)


def make_loader(
    opened: OpenedData,
    preprocessing: Mapping[str, Any],
    *,
    training: bool,
    batch_size: int,
    workers: int = 0,
    device: torch.device | None = None,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    unreadable: UnreadableImages | None = None,
    share: Shard | None = None,
) -> ImageLoader:
    """Batches of images and labels for a model.

    Args:
        opened: The images.
        preprocessing: timm's data configuration: input_size (channels, height, width), mean, std, interpolation,
            crop_pct, crop_mode; as `timm.data.resolve_data_config` returns and slim checkpoints store.
        training: Shuffled, augmented, the incomplete last batch left out. Otherwise in order, all of them.
        batch_size: Images a batch of this process; with fewer images than that, one batch has them all.
        workers: Loader processes; 0 loads in this one.
        device: Where the batches are to be used. On CUDA they are put there ahead of time (timm's prefetcher).
        seed: Fixes order, augmentation and mixing together with the epoch.
        augmentation: Only for training; None is `Augmentation()`.
        unreadable: Where images that cannot be read are counted; None allows none. In training the next image of the
            data that can be read takes the place of such a one (as in timm), so that batches keep their size; otherwise
            it is left out.
        share: Of which process. In training k processes with batches of B images see the images, augmented, mixed and
            erased, that one with batches of kB would see. Otherwise each image is in the share of one process, and
            a share may be empty.

    Returns:
        An iterable over (images float32 [B, channels, height, width], labels int64 [B]); with mixup or cutmix the
        labels are float32 [B, num_classes].

    Raises:
        DataError: preprocessing that no image can be brought to; while iterating: too many unreadable images.
    """
    device = device if device is not None else torch.device("cpu")
    channels = channels_of(preprocessing)
    mean, std = normalization(preprocessing)
    prefetch = device.type == "cuda"
    common = {
        "input_size": tuple(preprocessing["input_size"]),
        "mean": mean,
        "std": std,
        "use_prefetcher": True,  # images stay uint8 up to the batch: less to compute, and to send between processes
    }
    augmentation = augmentation if augmentation is not None else Augmentation()
    if training:
        transform = create_transform(
            **common,
            is_training=True,
            no_aug=augmentation.no_aug,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
        )
        if augmentation.crop_padding is not None and not augmentation.no_aug:
            transform.transforms[0] = _padded_crop(augmentation.crop_padding, preprocessing)
    else:
        transform = create_transform(
            **common,
            interpolation=preprocessing.get("interpolation", "bilinear"),
            crop_pct=preprocessing.get("crop_pct"),
            crop_mode=preprocessing.get("crop_mode"),
        )
    even = training and augmentation.mixes
    keys = BatchSampler(len(opened), batch_size, training=training, seed=seed, even=even, share=share or Shard())
    loader: Any = DataLoader(
        _Transformed(opened.images, "L" if channels == 1 else "RGB", transform, random=training),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=prefetch,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupt,
        # Only so that starting workers does not draw from the global generator: seeds travel with the keys.
        generator=torch.Generator().manual_seed(0),
    )
    erase, mix = _batch_stage(augmentation, opened.num_classes, device) if training else (None, None)
    normalize = {"mean": mean, "std": std, "channels": channels, "device": device}
    unreadable = unreadable if unreadable is not None else UnreadableImages(len(opened))
    return ImageLoader(loader, keys, unreadable=unreadable, normalize=normalize, erase=erase, mix=mix, device=device)


def _padded_crop(padding: int, preprocessing: Mapping[str, Any]) -> Callable[[Image.Image], Image.Image]:
    """The image, of which the shorter side is brought to the input's, shifted by at most so many pixels."""
    size = tuple(preprocessing["input_size"])[1:]
    mean, _ = normalization(preprocessing)
    # Zero once the mean is subtracted, as where such crops come from: there padding came after it.
    fill = tuple(round(255 * value) for value in mean)
    crop: Callable[[Image.Image], Image.Image] = transforms.Compose(
        [
            transforms.Resize(min(size), str_to_interp_mode(preprocessing.get("interpolation", "bilinear"))),
            transforms.RandomCrop(size, padding, fill=fill if len(fill) > 1 else fill[0]),
        ]
    )
    return crop


class ImageLoader:
    """Iterates over one epoch's batches; see `make_loader`. `set_epoch` says which epoch and where to begin."""

    def __init__(
        self,
        loader: Any,
        keys: BatchSampler,
        *,
        unreadable: UnreadableImages,
        normalize: dict[str, Any],
        erase: Callable[[Tensor], Tensor] | None,
        mix: Callable[[Tensor, Tensor], Batch] | None,
        device: torch.device,
    ) -> None:
        self._loader = loader
        self._keys = keys
        self.unreadable = unreadable
        self._empty = 0
        self._normalize = normalize
        self._erase = erase
        self._mix = mix
        self._device = device

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch (its order and augmentation) and the batch that the next iteration begins with."""
        self._keys.epoch = epoch
        self._keys.first_batch = first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch, of the process with the largest share."""
        return len(self._keys)

    @property
    def own_batches(self) -> int:
        """Batches of this process in a whole epoch: in validation as many as others have, or one less; without those
        of which the last iteration could read no image.
        """
        return self._keys.own_batches - self._empty

    @property
    def num_images(self) -> int:
        """Images in a whole epoch, of all processes."""
        return self._keys.images_used

    def __iter__(self) -> Iterator[Batch]:
        number = self._keys.first_batch
        for images, labels in self._batches():
            if self._erase is not None:
                with seeded_globals(0, self._device):
                    for image, seed in zip(images, self._keys.erasing_seeds(number), strict=True):
                        seed_globals(seed, self._device)
                        self._erase(image)  # in place
            if self._mix is not None:
                with seeded_globals(self._keys.batch_seed(number), self._device):
                    images, labels = self._mix(images, labels)
            yield images, labels
            number += 1

    def _batches(self) -> Iterator[Batch]:
        self._empty = 0
        raw = _Readable(self._loader, self.unreadable, self._count_empty)
        return iter(PrefetchLoader(raw, **self._normalize)) if self._device.type == "cuda" else self._normalized(raw)

    def _normalized(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """What the prefetcher makes of uint8 batches, without fetching any ahead of time."""
        mean, std = (
            torch.tensor([255 * value for value in self._normalize[name]]).view(1, -1, 1, 1) for name in ("mean", "std")
        )
        for images, labels in batches:
            yield images.float().sub_(mean).div_(std), labels

    def _count_empty(self) -> None:
        self._empty += 1

    def close(self) -> None:
        """Stop the worker processes. The loader can be iterated again afterwards."""
        iterator = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None


class _Transformed(Dataset[Any]):
    """Loads, converts to the model's number of channels, transforms.

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

    def __getitems__(self, keys: list[tuple[int, int]]) -> _Items:
        # A worker process has global generators of its own; this one's have to come out unchanged.
        borrowed = self.random and get_worker_info() is None
        samples, failures = list[tuple[Tensor, int]](), list[Unreadable]()
        with kept_globals() if borrowed else nullcontext():
            for index, seed in keys:
                loaded = self._load(index, failures)
                if loaded is not None:
                    if self.random:
                        seed_globals(seed)
                    image, label = loaded
                    samples.append((self.transform(image), label))
        return samples, failures

    def _load(self, index: int, failures: list[Unreadable]) -> tuple[Image.Image, int] | None:
        """An image, or in training the one that takes its place."""
        for place in range(index, index + (_TRIES if self.random else 1)):
            place %= len(self.images)
            try:
                image, label = self.images.load(place)
                return (image if image.mode == self.mode else image.convert(self.mode)), label
            except DataError as error:
                failures.append(Unreadable(error.message, error.hint))
        return None


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches the whole process group, and so does torchrun's SIGTERM; the loop stops at a step of its choice and
    # still needs its batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(items: Any) -> tuple[list[Tensor], list[Unreadable]]:
    samples, failures = items  # what `_Transformed` makes of a batch
    return (default_collate(samples) if samples else []), failures


class _Readable:
    """The batches of a loader. What could not be read is counted, and raised, in the caller's process."""

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
                    self._refuse_a_gap(batch, failures)
                if batch:
                    yield batch[0], batch[1]
                else:
                    self.on_empty()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"A loader process ended unexpectedly: {str(error).splitlines()[0]}",
                hint="Often memory: try --workers 0 or a smaller --batch-size.",
            ) from error

    def _refuse_a_gap(self, batch: list[Tensor], failures: list[Unreadable]) -> None:
        if not batch or len(batch[0]) < self.loader.batch_sampler.batch_size:
            raise DataError(
                f"{_TRIES} images one after another cannot be read. The last one: {failures[-1].message}",
                hint=failures[-1].hint,
            )


def _batch_stage(
    augmentation: Augmentation, num_classes: int, device: torch.device
) -> tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor, Tensor], Batch] | None]:
    erase = mix = None
    if augmentation.reprob > 0:
        # On whole batches on either device (timm's prefetcher would erase one batch early).
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
