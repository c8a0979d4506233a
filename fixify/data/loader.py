"""Batches of preprocessed images, with timm's transforms; they are the same with any number of worker processes.

An image that cannot be read is counted (`UnreadableImages`) and replaced or left out; too many of them are an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision import transforms

from fixify._values import counted
from fixify.data.dataset import ImageSource, OpenedData
from fixify.data.decoding import convert_mode, remarks_on
from fixify.data.preprocessing import channels_of, normalization
from fixify.data.processes import (
    BROKEN,
    Reading,
    close_at_exit,
    end_workers,
    explain,
    start_worker,
    starting_workers,
    workers_of,
)
from fixify.data.sampler import BatchSampler, Shard
from fixify.data.seeding import restored_globals, seed_globals, seeded_globals
from fixify.errors import DataError, FixifyError, LoaderError, UsageError, resource_problem
from fixify.models.architectures import Preprocessing

Batch = tuple[Tensor, Tensor]
_TRIES = 50  # images to try for one place in a training batch, as in timm
_MOST_PIXELS = 1 << 26  # of an image that is resized by its shorter side; a strip of 1 x 100,000 would take 5 GB
_MOST_INPUTS = 16  # or so many times as many as the model takes


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
    copy: int | None = None,
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
        augmentation: Used only in training, and with `copy`. None means `Augmentation()`.
        unreadable: Counts the images that cannot be read. None allows none. In training the next readable image of the
            data replaces an unreadable one (as in timm), so that batches keep their size; otherwise it is left out.
        shard: Which process this is, of several that run together. In training, k processes with batches of B images
            see the same images, augmented, mixed and erased alike, as one process with batches of k * B. Otherwise
            each image is in exactly one shard, and a shard may be empty.
        copy: Outside of training: augment each image as in training in this epoch, but erase and mix nothing. None:
            do not augment.

    Returns:
        An iterable over (images float32 [B, channels, height, width], labels int64 [B]). With Mixup or CutMix the
        labels are float32 [B, num_classes].

    Raises:
        DataError: no image can be preprocessed as configured; or, while iterating, too many images are unreadable.
        LoaderError: while iterating, a loader process ended or hangs, or memory or file handles ran out.
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
        copy=copy,
    )
    augmented = training or copy is not None
    reading = Reading(workers)
    loader: Any = DataLoader(
        _TransformedImages(
            opened.images,
            "L" if channels_of(preprocessing) == 1 else "RGB",
            _training_transform(preprocessing, augmentation) if augmented else _evaluation_transform(preprocessing),
            random=augmented,
            reading=reading,
            shorter_side=_shorter_side(preprocessing, augmentation if augmented else None),
        ),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=partial(start_worker, reading),
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
    """Iterates over the batches of one epoch; see `make_loader`. Call `set_epoch` to choose the epoch.

    Use it in a `with` block, or call `close`: its processes do not end by themselves.
    """

    def __init__(self, loader: Any, keys: BatchSampler, unreadable: UnreadableImages, stages: _BatchStages) -> None:
        self._loader = loader
        self._keys = keys
        self.unreadable = unreadable
        self._stages = stages
        self._empty = 0
        close_at_exit(self)

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

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
        """End the loader processes, within seconds. The loader can be iterated again afterwards."""
        end_workers(self._loader)

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


@dataclass(frozen=True)
class _Remark:
    """What is unusual about an image that was read; see `fixify.data.decoding.remarks_on`."""

    text: str
    where: str


class UnreadableImages:
    """Counts the unreadable images of a data set, each once.

    An image is identified by its message, so several loaders may count the images of one data set.

    Args:
        num_images: Images in the data set.
        max_fraction: Fraction of them that may be unreadable; 0 makes the first one an error.
        on_found: Called for each new one with its message and the number of them so far.
        on_remark: Called with what is unusual about images that can be read (16 bits, an EXIF rotation, ...): a
            sentence that names the first such image, once for each kind.
        option: The option that sets `max_fraction`, for messages; None if there is none.

    Attributes:
        messages: The message of each, in the order in which they were found.
        remarks: Each kind of remark and the image that it was first made of.

    >>> unreadable = UnreadableImages(100, max_fraction=0.01)
    >>> unreadable.add(Unreadable("Cannot read a.png."))
    >>> unreadable.add(Unreadable("Cannot read a.png."))
    >>> len(unreadable)
    1
    """

    def __init__(
        self,
        num_images: int,
        max_fraction: float = 0.0,
        on_found: Callable[[str, int], object] | None = None,
        on_remark: Callable[[str], object] | None = None,
        *,
        option: str | None = "--max-unreadable",
    ) -> None:
        self.num_images = num_images
        self.max_fraction = max_fraction
        self.on_found = on_found
        self.on_remark = on_remark
        self.option = option
        self.messages: dict[str, None] = {}
        self.remarks: dict[str, str] = {}

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
            enough = min(1.0, max(10 * self.max_fraction, math.ceil(100 * count / self.num_images) / 100))
            allow = f" Or allow more: {self.option} {enough:g}" if self.option else ""
            raise DataError(
                f"{count:,} of {counted(self.num_images, 'image')} cannot be read, and {self.max_fraction:g} of them "
                f"may be unreadable{f' ({self.option})' if self.option else ''}. The last one: {found.message}",
                hint=f"{found.hint or ''}{allow}".strip() or None,
            )
        if self.on_found is not None:
            self.on_found(found.message, count)

    def summary(self) -> str | None:
        """Say how many images could not be read; None if all could.

        >>> UnreadableImages(100).summary() is None
        True
        """
        if not self.messages:
            return None
        return f"{len(self):,} of {counted(self.num_images, 'image')} cannot be read; left out."

    def remark(self, text: str, where: str) -> None:
        """Report what is unusual about an image, if no other image was reported for it."""
        if text in self.remarks:
            return
        self.remarks[text] = where
        if self.on_remark is not None:
            self.on_remark(f"{where} {text}. Other such images are not named.")


def name_the_first(warn: Callable[[str], object], most: int = 5) -> Callable[[str, int], None]:
    """Make an `on_found` that warns of the first few images that cannot be read; `summary` counts the others."""

    def on_found(message: str, count: int) -> None:
        if count <= most:
            warn(f"{message.rstrip('.')}; it is left out.")
        elif count == most + 1:
            warn("More images cannot be read. They are counted, not named.")

    return on_found


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
    return transform if augmentation.auto_augment is None else _ByPolicy(transform, augmentation.auto_augment)


@dataclass(frozen=True)
class _ByPolicy:
    """A transform with a policy of timm's; some ask Pillow for what it refuses, such as to keep 0 bits of a colour."""

    transform: Callable[[Image.Image], Any]
    policy: str

    def __call__(self, image: Image.Image) -> Any:
        try:
            return self.transform(image)
        except ValueError as error:
            raise UsageError(
                f"The policy {self.policy} (--aa) failed on an image: {error}.",
                hint="Try a stronger one, or one whose strength only rises: rand-m9-mstd0.5-inc1",
            ) from error


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


def _shorter_side(preprocessing: Preprocessing, augmentation: Augmentation | None) -> int | None:
    """Return the length that the transform gives to the shorter side; None if it never resizes the whole image so.

    Args:
        preprocessing: timm's data configuration.
        augmentation: None outside of training.
    """
    side = max(tuple(preprocessing["input_size"])[1:])
    if augmentation is not None:
        return side if augmentation.no_aug or augmentation.crop_padding is not None else None
    if preprocessing.get("crop_mode") in ("squash", "border"):
        return None
    return int(side / (preprocessing.get("crop_pct") or 0.875))  # timm's default


@dataclass
class _Part:
    """What is sent of one batch to the process that asked for it.

    An exception would arrive as a traceback, so errors that are no defects are sent as values.

    Attributes:
        samples: Transformed images and their labels.
        failures: Images that cannot be read.
        remarks: What is unusual about the others, each kind once per loader process.
        error: Why no batch can be read at all.
        batch: The collated samples; [] without any.
    """

    samples: list[tuple[Tensor, int]] = field(default_factory=list)
    failures: list[Unreadable] = field(default_factory=list)
    remarks: list[_Remark] = field(default_factory=list)
    error: FixifyError | None = None
    batch: list[Tensor] = field(default_factory=list)


class _TransformedImages(Dataset[Any]):
    """Loads images, converts them to the model's number of channels, and transforms them.

    Args:
        images: The images.
        mode: Pillow's "L" (one channel) or "RGB".
        transform: timm's.
        random: Whether the transform draws random numbers.
        reading: Told which image is being read.
        shorter_side: See `_shorter_side`.
    """

    def __init__(
        self,
        images: ImageSource,
        mode: str,
        transform: Callable[[Image.Image], Tensor],
        *,
        random: bool,
        reading: Reading,
        shorter_side: int | None,
    ):
        self.images = images
        self.mode = mode
        self.transform = transform
        self.random = random
        self.reading = reading
        self.shorter_side = shorter_side
        self._remarked: set[str] = set()

    def __getitems__(self, keys: list[tuple[int, int]]) -> _Part:
        # A worker process has its own global generators. Those of the caller's process must not change.
        in_this_process = self.random and get_worker_info() is None
        part = _Part()
        with restored_globals() if in_this_process else nullcontext():
            try:
                for index, seed in keys:
                    self._add(part, index, seed)
            except (LoaderError, UsageError) as error:
                part.error = error
            except (MemoryError, OSError, RuntimeError) as error:
                part.error = _resource_error(error)
        return part

    def _add(self, part: _Part, index: int, seed: int) -> None:
        """Load and transform an image, or in training the next one that is readable."""
        for place in range(index, index + (_TRIES if self.random else 1)):
            place %= len(self.images)
            with self.reading.image(place):
                try:
                    image, label = self._load(place, part)
                except LoaderError:
                    raise
                except DataError as error:
                    part.failures.append(Unreadable(error.message, error.hint))
                    continue
                if self.random:
                    seed_globals(seed)
                part.samples.append((self.transform(image), label))
                return

    def _load(self, place: int, part: _Part) -> tuple[Image.Image, int]:
        image, label = self.images.load(place)
        width, height = image.size
        if self.shorter_side is not None:
            pixels = self.shorter_side**2 * max(width, height) / min(width, height)
            if pixels > max(_MOST_PIXELS, _MOST_INPUTS * self.shorter_side**2):
                raise DataError(
                    f"Cannot read the image {self.images.where(place)}: it is {width:,} x {height:,} pixels, and "
                    f"would have {pixels / 1e6:,.0f} million after resizing its shorter side to {self.shorter_side}.",
                    hint="Cut it into parts, or move it out of the data folder.",
                )
        for text in remarks_on(image):
            if text not in self._remarked:
                self._remarked.add(text)
                part.remarks.append(_Remark(text, self.images.where(place)))
        if image.mode != self.mode:
            image = convert_mode(image, self.mode, self.images.where(place))
        return image, label


def _collate(part: Any) -> _Part:
    """Make a batch of what `_TransformedImages.__getitems__` returns."""
    if part.samples and part.error is None:
        try:
            part.batch = default_collate(part.samples)
            if get_worker_info() is not None:
                # Otherwise a thread would do this while it sends them; if it fails there, nobody hears of it.
                part.batch = [tensor.share_memory_() for tensor in part.batch]
        except (MemoryError, OSError, RuntimeError) as error:
            part.error = _resource_error(error)
    part.samples = []
    return cast(_Part, part)


def _resource_error(error: Exception) -> LoaderError:
    """Turn an error into one that says what the machine lacks; raise any other error again."""
    problem = resource_problem(error)
    if problem is None:
        raise error
    return LoaderError(f"Cannot load images: {problem.what}.", hint=problem.hint)


class _ReadableBatches:
    """The batches of a loader. Unreadable images are counted, and raised, in the caller's process."""

    def __init__(self, loader: Any, unreadable: UnreadableImages, on_empty: Callable[[], object]) -> None:
        self.loader = loader
        self.unreadable = unreadable
        self.on_empty = on_empty

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for part in self._parts():
            for remark in part.remarks:
                self.unreadable.remark(remark.text, remark.where)
            for failure in part.failures:
                self.unreadable.add(failure)
            if part.error is not None:
                raise part.error
            if len(part.failures) >= _TRIES and self.loader.dataset.random:
                self._check_complete(part.batch, part.failures)
            if part.batch:
                yield part.batch[0], part.batch[1]
            else:
                self.on_empty()

    def _parts(self) -> Iterator[_Part]:
        """Iterate over the loader, and explain how it ends if a process is lost."""
        try:
            with starting_workers():
                parts = iter(self.loader)
            while True:
                try:
                    part = next(parts)
                except StopIteration:
                    return
                yield part
        except (RuntimeError, OSError, MemoryError, *BROKEN) as error:
            images = self.loader.dataset
            found = explain(error, workers_of(self.loader), images.reading, images.images)
            if found is None:
                raise
            end_workers(self.loader)
            raise found from error

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
