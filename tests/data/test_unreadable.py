"""Images that cannot be read are replaced, left out or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fixify.data import Augmentation, OpenedData, Unreadable, UnreadableImages, make_loader, open_data
from fixify.data.idx import ArrayImages
from fixify.errors import DataError

GRAY = {"input_size": (1, 16, 16), "mean": (0.4,), "std": (0.2,), "crop_pct": 1.0}


class Damaged(ArrayImages):
    """Images filled with their own index as gray value; some of them cannot be read."""

    def __init__(self, count: int, damaged: set[int]) -> None:
        pixels = np.arange(count, dtype=np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)
        super().__init__(pixels, np.arange(count) % 4)
        self.damaged = damaged

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index in self.damaged:
            raise DataError(f"Cannot read the image {index}.png: it is not an image.", hint="Replace the file.")
        return super().load(index)


def opened(count: int, damaged: set[int]) -> OpenedData:
    return OpenedData(Damaged(count, damaged), tuple("abcd"), "", "", "", "train")


def places(batches: list[Any]) -> list[list[int]]:
    """Tell from the gray values which images these are."""
    return [((images[:, 0, 0, 0] * 0.2 + 0.4) * 255).round().int().tolist() for images, _ in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_the_next_readable_image_takes_the_place(workers: int) -> None:
    given: dict[str, Any] = {
        "training": True,
        "batch_size": 4,
        "workers": workers,
        "augmentation": Augmentation(no_aug=True),
    }
    whole = make_loader(opened(20, set()), GRAY, **{**given, "workers": 0})
    found: list[tuple[str, int]] = []
    unreadable = UnreadableImages(20, 0.2, lambda message, count: found.append((message, count)))
    damaged = make_loader(opened(20, {3, 4, 19}), GRAY, unreadable=unreadable, **given)
    for epoch in range(2):
        whole.set_epoch(epoch)
        damaged.set_epoch(epoch)
        expected = [[{3: 5, 4: 5, 19: 0}.get(place, place) for place in batch] for batch in places(list(whole))]
        batches = list(damaged)
        assert places(batches) == expected
        assert [labels.tolist() for _, labels in batches] == [[place % 4 for place in batch] for batch in expected]
    assert len(unreadable) == 3
    # Each is reported once, not once per epoch.
    assert sorted(message for message, _ in found) == sorted(
        f"Cannot read the image {i}.png: it is not an image." for i in (3, 4, 19)
    )
    assert [count for _, count in found] == [1, 2, 3]
    damaged.close()


def test_the_augmentation_of_other_images_does_not_change() -> None:
    given: dict[str, Any] = {"training": True, "batch_size": 4, "augmentation": Augmentation(reprob=0.5, mixup=0.5)}
    whole = list(make_loader(opened(20, set()), GRAY, **given))
    damaged = list(make_loader(opened(20, {3}), GRAY, unreadable=UnreadableImages(20, 0.1), **given))
    same = [torch.equal(ours, theirs) for (ours, _), (theirs, _) in zip(damaged, whole, strict=True)]
    assert sorted(same) == [False, True, True, True, True]


@pytest.mark.parametrize("workers", [0, 1])
def test_otherwise_it_is_left_out_even_a_whole_batch(workers: int) -> None:
    unreadable = UnreadableImages(11, 0.5)
    data = opened(11, {1, 4, 5, 6, 7})
    loader = make_loader(data, GRAY, training=False, batch_size=4, workers=workers, unreadable=unreadable)
    assert places(list(loader)) == places(list(loader)) == [[0, 2, 3], [8, 9, 10]]
    assert len(unreadable) == 5
    assert (len(loader), loader.own_batches) == (3, 2)
    loader.close()


def test_too_many_are_an_error_that_says_how_many_are_allowed() -> None:
    loader = make_loader(
        opened(20, {2, 9, 13}), GRAY, training=False, batch_size=4, unreadable=UnreadableImages(20, 0.1)
    )
    with pytest.raises(DataError) as caught:
        list(loader)
    message, hint = caught.value.message, str(caught.value.hint)
    assert message.startswith("3 of 20 images") and " 0.1 of them" in message
    assert message.endswith("Cannot read the image 13.png: it is not an image.")
    assert hint.startswith("Replace the file.") and hint.endswith("--max-unreadable 1")


def test_by_default_the_first_is_an_error() -> None:
    for training in (True, False):
        with pytest.raises(DataError, match=r"^Cannot read the image 7\.png: it is not an image\.\nReplace"):
            list(make_loader(opened(8, {7}), GRAY, training=training, batch_size=4))


def test_a_gap_in_the_data_is_an_error_not_a_smaller_batch() -> None:
    unreadable = UnreadableImages(100, 1.0)
    loader = make_loader(opened(100, set(range(20, 80))), GRAY, training=True, batch_size=50, unreadable=unreadable)
    with pytest.raises(DataError, match=r"\b50 images"):
        list(loader)


def test_a_truncated_file(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    path = root / "val" / "bee" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    rgb = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.2,) * 3, "crop_pct": 1.0}
    unreadable = UnreadableImages(9, 0.5)
    loader = make_loader(open_data(str(root), split="val"), rgb, training=False, batch_size=4, unreadable=unreadable)
    total = sum(len(labels) for _, labels in loader)
    (message,) = unreadable.messages
    assert str(path) in message
    assert total == len(open_data(str(root), split="val")) - 1


def test_what_is_unusual_is_said_once_for_each_kind(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    for name in ("ant/0.png", "ant/1.png", "bee/0.png"):
        Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(root / "val" / name)
    Image.new("RGBA", (9, 9)).save(root / "val" / "cat" / "0.png")
    rgb = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.2,) * 3, "crop_pct": 1.0}
    for workers in (0, 2):
        said: list[str] = []
        unreadable = UnreadableImages(9, on_remark=said.append)
        loader = make_loader(
            open_data(str(root), split="val"),
            rgb,
            training=False,
            batch_size=2,
            workers=workers,
            unreadable=unreadable,
        )
        with loader:
            values = torch.cat([images for _ in range(2) for images, _ in loader])
        assert len(said) == len(unreadable.remarks) == 2 and "16 bits" in said[0] and "cat/0.png" in said[1]
        assert torch.allclose(values[0] * 0.2 + 0.5, torch.tensor(156 / 255))
    assert len(unreadable) == 0


@pytest.mark.parametrize(
    ("size", "input_size", "training", "read"),
    [
        ((1, 100_000), 224, False, False),
        ((100_000, 1), 224, False, False),
        ((1, 500), 224, False, True),
        ((1, 100_000), 224, True, True),
        ((2, 10), 4096, False, True),
    ],
)
def test_a_strip_that_would_become_gigabytes_is_refused(
    tmp_path: Path, size: tuple[int, int], input_size: int, training: bool, read: bool
) -> None:
    path = tmp_path / "train" / "a"
    path.mkdir(parents=True)
    for number in range(2):
        Image.new("L", size).save(path / f"{number}.png")
    gray = {**GRAY, "input_size": (1, input_size, input_size), "crop_pct": 0.875}
    unreadable = UnreadableImages(2, 1.0)
    loader = make_loader(
        open_data(str(tmp_path), split="train"), gray, training=training, batch_size=2, unreadable=unreadable
    )
    assert (sum(len(labels) for _, labels in loader), len(unreadable)) == ((2, 0) if read else (0, 2))
    assert all("100,000" in message for message in unreadable.messages)


def test_how_many_may_be_unreadable_is_enough() -> None:
    unreadable = UnreadableImages(7, 0.01)
    with pytest.raises(DataError) as caught:
        unreadable.add(Unreadable("Cannot read a.png."))
    share = float(str(caught.value.hint).split()[-1])
    allowed = UnreadableImages(7, share)
    allowed.add(Unreadable("Cannot read a.png."))
    assert allowed.summary() == "1 of 7 images cannot be read; left out."
    with pytest.raises(DataError) as caught:
        UnreadableImages(7, 0.01, option=None).add(Unreadable("Cannot read a.png."))
    assert "--" not in str(caught.value)
