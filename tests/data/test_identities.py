"""Synthetic identities: made from their numbers, the same every time, without files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from fixify.data import DataOptions, draw_images, listing_digest, open_data, open_train_val
from fixify.data.identities import IdentityImages
from fixify.errors import DataError
from fixify.heads import HeadSpec, codebook


@pytest.mark.parametrize("num_classes", [300, 1024, 3000])
def test_the_points_are_the_codes_of_a_hadamard_head(num_classes: int) -> None:
    images = IdentityImages(num_classes, 8, "train")
    codes = codebook(HeadSpec("hadamard", 512, num_classes))
    for label in (0, 5, num_classes - 1):
        assert np.array_equal(images.point(label), np.sign(codes[label]))


def test_an_image_depends_on_its_number_and_the_split_alone() -> None:
    train, val = open_train_val("identities/3000")
    assert (len(train), len(val), train.num_classes) == (3000, 1024, 3000)
    first, label = train.images.load(7)
    again, same = pickle.loads(pickle.dumps(open_data("identities/3000", split="train").images)).load(7)
    assert np.array_equal(first, again) and label == same
    assert first.size == (16, 16) and first.mode == "RGB"
    other, _ = IdentityImages(3000, 3000, "val").load(7)
    assert not np.array_equal(first, other)
    pixels = np.asarray(first)
    assert 25 < pixels.std() < 60 and not np.isin(pixels, (0, 255)).any()


def test_two_images_of_an_identity_are_alike_but_not_the_same() -> None:
    images = open_data("identities/2/64", split="train").images
    assert isinstance(images, IdentityImages)
    by_label: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for index in range(64):
        image, label = images.load(index)
        by_label[label].append(np.asarray(image, dtype=np.float64).ravel())
    zeros, ones = (np.corrcoef(np.array(by_label[label])) for label in (0, 1))
    between = np.corrcoef(np.array(by_label[0][:1] + by_label[1]))[0, 1:]
    assert min(zeros.min(), ones.min()) > 0.6 > between.max()
    assert np.sort(zeros.ravel())[-33] < 1  # but for each image with itself


def test_each_identity_has_as_many_images_as_another() -> None:
    assert sorted(IdentityImages(50, 50, "train").labels) == list(range(50))
    assert set(np.bincount(IdentityImages(50, 120, "train").labels, minlength=50)) == {2, 3}
    assert len(set(IdentityImages(1000, 40, "train").labels)) == 40


def test_the_names_are_numbers_that_nothing_records() -> None:
    opened = open_data("identities/12/3", split="test")
    assert opened.class_names[11] == "11" and opened.recorded_names is None
    assert opened.name == "identities/12/3"
    assert len(draw_images("identities/12/30", count=5)) == 5
    digests = {
        listing_digest(open_data(name, split=split))
        for name in ("identities/12/3", "identities/12/4")
        for split in ("train", "val")
    }
    assert len(digests) == 3  # the validation images are the same


@pytest.mark.parametrize("numbers", ["", "many", "1", "5/0", "5/6/7"])
def test_other_names_say_what_is_allowed(numbers: str) -> None:
    with pytest.raises(DataError) as caught:
        open_data(f"identities/{numbers}", split="train")
    assert "identities/" in str(caught.value)


def test_an_order_of_class_folders_does_not_apply() -> None:
    with pytest.raises(DataError, match="class_order"):
        open_data("identities/12", split="train", options=DataOptions(class_order="lexical"))
