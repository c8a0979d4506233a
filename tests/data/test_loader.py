"""Batches: the same with any number of workers and processes, and the same as timm's."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import create_dataset, create_loader
from timm.data.loader import PrefetchLoader

from fixify.data import Augmentation, OpenedData, Shard, make_loader, open_data
from fixify.data.idx import ArrayImages
from fixify.errors import DataError, UsageError

RGB = {
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
GRAY = {**RGB, "input_size": (1, 16, 16), "mean": (0.4,), "std": (0.2,)}
EVERYTHING = Augmentation(reprob=0.5, mixup=0.4, cutmix=1.0, auto_augment="rand-m9-mstd0.5", vflip=0.5)


@pytest.fixture(scope="module")
def digits() -> OpenedData:
    """22 random gray images of 4 classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (22, 20, 20), dtype=np.uint8)
    names = ("a", "b", "c", "d")
    return OpenedData(ArrayImages(pixels, np.arange(22) % 4), names, "", "", "digits", "train")


def refuse(_image: Any) -> None:
    raise ValueError("bits must be between or equal to 1 and 8")


def epoch(loader: Any, number: int = 0, first_batch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.set_epoch(number, first_batch)
    return list(loader)


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)
    )


class TestTraining:
    def loader(self, data: OpenedData, **given: Any) -> Any:
        return make_loader(data, GRAY, **{"training": True, "batch_size": 4, "augmentation": EVERYTHING, **given})

    def test_an_epoch_is_the_same_with_any_number_of_workers(self, digits: OpenedData) -> None:
        none, two = self.loader(digits), self.loader(digits, workers=2)
        for number, first_batch in ((0, 0), (1, 0), (1, 2)):  # the same workers read all of them
            assert equal(epoch(none, number, first_batch), epoch(two, number, first_batch))
        two.close()

    def test_epochs_and_seeds_differ_and_repeat(self, digits: OpenedData) -> None:
        loader = self.loader(digits)
        first = epoch(loader, 0)
        assert not equal(first, epoch(loader, 1))
        assert not equal(first, epoch(self.loader(digits, seed=1), 0))
        assert equal(first, epoch(self.loader(digits), 0))

    def test_an_epoch_may_begin_in_the_middle(self, digits: OpenedData) -> None:
        loader = self.loader(digits)
        assert equal(epoch(loader, 3)[2:], epoch(loader, 3, first_batch=2))

    @pytest.mark.parametrize(("count", "size"), [(2, 4), (4, 2), (2, 3)])
    def test_shards_are_the_batches_of_one_process(self, digits: OpenedData, count: int, size: int) -> None:
        """They are augmented, erased and mixed alike, in another order; a batch of odd size is not mixed."""
        augmentation = EVERYTHING if size % 2 == 0 else replace(EVERYTHING, mixup=0.0, cutmix=0.0)
        whole = epoch(self.loader(digits, batch_size=count * size, augmentation=augmentation), 1, 1)
        loaders = [
            self.loader(digits, batch_size=size, augmentation=augmentation, shard=Shard(rank, count))
            for rank in range(count)
        ]
        shards = [epoch(loader, 1, 1) for loader in loaders]
        assert {loader.num_images for loader in loaders} == {22 - 22 % (count * size)}
        for images, targets, *parts in zip(*zip(*whole, strict=True), *shards, strict=True):
            left = [
                image.numpy().tobytes() + target.numpy().tobytes()
                for image, target in zip(images, targets, strict=True)
            ]
            for own_images, own_targets in parts:
                for image, target in zip(own_images, own_targets, strict=True):
                    left.remove(image.numpy().tobytes() + target.numpy().tobytes())
            assert left == []

    def test_too_few_images_for_the_number_of_processes(self, digits: OpenedData) -> None:
        with pytest.raises(DataError, match=r"\b22 .*\b23 "):
            self.loader(digits, shard=Shard(0, 23))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_the_callers_random_state_is_untouched(self, digits: OpenedData, workers: int) -> None:
        before = random.getstate(), np.random.get_state()[1], torch.get_rng_state()  # noqa: NPY002
        loader = self.loader(digits, workers=workers)
        epoch(loader)
        loader.close()
        assert before[0] == random.getstate()
        assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
        assert torch.equal(before[2], torch.get_rng_state())

    def test_batches_do_not_depend_on_the_callers_random_state(self, digits: OpenedData) -> None:
        first = epoch(self.loader(digits))
        random.seed(99)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            assert equal(first, epoch(self.loader(digits)))

    def test_each_image_appears_once_and_the_incomplete_batch_is_dropped(self, digits: OpenedData) -> None:
        plain = self.loader(digits, augmentation=Augmentation(no_aug=True))
        images = torch.cat([images for images, _ in epoch(plain)])
        assert (len(plain), plain.num_images, len(images)) == (5, 20, 20)
        assert len({image.numpy().tobytes() for image in images}) == 20

    def test_fewer_images_than_a_batch_make_one_batch(self, digits: OpenedData) -> None:
        assert [len(images) for images, _ in self.loader(digits, batch_size=64)] == [22]
        with pytest.raises(DataError, match=r"\b1 image\b"):
            self.loader(
                OpenedData(ArrayImages(np.zeros((1, 4, 4), np.uint8), np.zeros(1)), ("a",), "", "", "", "train")
            )

    def test_mixing_turns_labels_into_distributions(self, digits: OpenedData) -> None:
        augmentation = Augmentation(mixup=1.0, smoothing=0.1)
        (_, targets), *_ = epoch(self.loader(digits, augmentation=augmentation))
        assert targets.shape == (4, 4)
        assert torch.allclose(targets.sum(dim=1), torch.ones(4))
        assert targets.min() >= 0.1 / 4 - 1e-6

    def test_a_padded_crop_shifts_whole_images_within_the_mean(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
        data = OpenedData(ArrayImages(pixels, np.arange(24)), tuple("abcdefghijklmnopqrstuvwx"), "", "", "x", "train")
        augmentation = Augmentation(crop_padding=4, hflip=0, color_jitter=0)

        def loader(**given: Any) -> Any:
            return make_loader(data, RGB, training=True, batch_size=6, augmentation=augmentation, **given)

        mean, std = (np.array(RGB[name], np.float32)[:, None, None] for name in ("mean", "std"))
        padded = np.full((24, 3, 24, 24), np.round(255 * mean), np.float32)
        padded[:, :, 4:-4, 4:-4] = pixels.transpose(0, 3, 1, 2)
        first, offsets = epoch(loader()), set()
        for image, label in ((image, label) for batch in first for image, label in zip(*batch, strict=True)):
            seen = np.round(255 * (image.numpy() * std + mean))
            windows = np.lib.stride_tricks.sliding_window_view(padded[int(label)], (16, 16), axis=(1, 2))
            (offset,) = np.argwhere((windows == seen[:, None, None]).all(axis=(0, 3, 4)))
            offsets.add(tuple(offset.tolist()))
        assert len(offsets) > 12  # of 81
        assert not equal(first, epoch(loader(), 1))

    @pytest.mark.parametrize("size", [(28, 28), (40, 20)])
    def test_a_padded_crop_fits_images_of_other_sizes(self, size: tuple[int, int]) -> None:
        data = OpenedData(
            ArrayImages(np.zeros((4, *size), np.uint8), np.arange(4)), tuple("abcd"), "", "", "x", "train"
        )
        made = make_loader(data, GRAY, training=True, batch_size=4, augmentation=Augmentation(crop_padding=2))
        assert [images.shape for images, _ in epoch(made)] == [(4, 1, 16, 16)]

    def test_erasing_erases(self, digits: OpenedData) -> None:
        plain = Augmentation(no_aug=True)
        erased = Augmentation(no_aug=True, reprob=1.0, remode="const")
        for (ours, _), (theirs, _) in zip(
            self.loader(digits, augmentation=plain), self.loader(digits, augmentation=erased), strict=True
        ):
            changed = (ours != theirs).flatten(1).float().mean(dim=1)
            assert (changed > 0.01).all() and (changed < 0.5).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_timms_prefetcher_gives_the_same_batches(
    digits: OpenedData, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    # With CUDA the prefetcher normalises uint8 batches. Here it does so on the CPU.
    def on_cpu(batches: Any, **given: Any) -> PrefetchLoader:
        return PrefetchLoader(batches, **{**given, "device": torch.device("cpu")})

    monkeypatch.setattr("fixify.data.loader.PrefetchLoader", on_cpu)
    given = {"training": training, "batch_size": 4, "augmentation": Augmentation(auto_augment="rand-m9")}
    plain = epoch(make_loader(digits, GRAY, **given), 2, first_batch=1)
    prefetched = epoch(make_loader(digits, GRAY, device=torch.device("cuda"), **given), 2, first_batch=1)
    assert len(plain) == len(prefetched) == (4 if training else 5)
    for (ours, labels), (theirs, their_labels) in zip(plain, prefetched, strict=True):
        assert torch.equal(labels, their_labels)
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_policy_that_pillow_refuses_is_a_usage_error(digits: OpenedData, workers: int) -> None:
    # At such a strength timm's posterize keeps 0 bits. Pillow 13 refuses that; older versions make the image black.
    loader = make_loader(
        digits, GRAY, training=True, batch_size=4, workers=workers, augmentation=Augmentation(auto_augment="rand-m0")
    )
    loader._loader.dataset.transform = replace(loader._loader.dataset.transform, transform=refuse)
    with pytest.raises(UsageError) as caught:
        list(loader)
    assert "rand-m0" in caught.value.message and "rand-m9-mstd0.5-inc1" in str(caught.value.hint)


class TestEvaluation:
    def test_all_images_in_order(self, digits: OpenedData) -> None:
        batches = epoch(make_loader(digits, GRAY, training=False, batch_size=4))
        assert [len(labels) for _, labels in batches] == [4, 4, 4, 4, 4, 2]
        assert torch.cat([labels for _, labels in batches]).tolist() == [i % 4 for i in range(22)]

    @pytest.mark.parametrize(("count", "size"), [(3, 4), (5, 4), (30, 8)])
    def test_every_image_is_in_one_shard_and_batch_counts_differ_by_one_at_most(
        self, digits: OpenedData, count: int, size: int
    ) -> None:
        seen: list[float] = []
        for rank in range(count):
            loader = make_loader(digits, GRAY, training=False, batch_size=size, shard=Shard(rank, count))
            batches = epoch(loader)
            assert len(batches) == loader.own_batches
            assert len(loader) - 1 <= len(batches) <= len(loader)
            seen += [float(image.sum()) for images, _ in batches for image in images]
        ((images, _),) = epoch(make_loader(digits, GRAY, training=False, batch_size=22))
        assert sorted(seen) == sorted(float(image.sum()) for image in images)

    @pytest.mark.filterwarnings(
        "ignore:unclosed file:ResourceWarning"
    )  # timm leaves its files to the garbage collector
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_images_are_timms(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder()
        theirs = create_loader(
            create_dataset("", root=str(root), split="val"),
            input_size=RGB["input_size"],
            batch_size=4,
            interpolation="bicubic",
            mean=RGB["mean"],
            std=RGB["std"],
            crop_pct=RGB["crop_pct"],
            crop_mode=RGB["crop_mode"],
            num_workers=0,
            device=torch.device("cpu"),
            persistent_workers=False,
        )
        ours = make_loader(open_data(str(root), split="val"), RGB, training=False, batch_size=4)
        assert equal(list(ours), list(theirs))

    def test_gray_images_for_an_rgb_model_and_the_other_way_round(
        self, digits: OpenedData, make_folder: Callable[..., Path]
    ) -> None:
        gray_as_rgb = epoch(make_loader(digits, {**RGB, "mean": (0.5,) * 3}, training=False, batch_size=22))[0][0]
        assert gray_as_rgb.shape == (22, 3, 16, 16)
        assert torch.equal(gray_as_rgb[:, 0], gray_as_rgb[:, 2])
        rgb = open_data(str(make_folder()), split="val")
        assert epoch(make_loader(rgb, GRAY, training=False, batch_size=9))[0][0].shape == (9, 1, 16, 16)

    def test_three_means_of_a_gray_model_are_averaged(self, digits: OpenedData) -> None:
        three = {**GRAY, "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.2, 0.2)}
        ours = epoch(make_loader(digits, three, training=False, batch_size=22))
        assert torch.allclose(ours[0][0], epoch(make_loader(digits, GRAY, training=False, batch_size=22))[0][0])

    def test_an_unreadable_image_in_a_worker_is_an_error_without_a_traceback(
        self, make_folder: Callable[..., Path]
    ) -> None:
        root = make_folder()
        (root / "val" / "bee" / "2.png").write_bytes(b"broken")
        loader = make_loader(open_data(str(root), split="val"), RGB, training=False, batch_size=2, workers=1)
        with pytest.raises(DataError) as caught:
            list(loader)
        loader.close()
        assert "val/bee/2.png" in caught.value.message
        assert "Traceback" not in str(caught.value)

    @pytest.mark.parametrize(
        ("broken", "message"),
        [({"input_size": (4, 16, 16)}, r"\b4\b"), ({"mean": None}, r"\bmean\b")],
    )
    def test_preprocessing_that_is_impossible(self, digits: OpenedData, broken: dict[str, Any], message: str) -> None:
        preprocessing = {key: value for key, value in {**RGB, **broken}.items() if value is not None}
        with pytest.raises(DataError, match=message):
            make_loader(digits, preprocessing, training=False, batch_size=2)
