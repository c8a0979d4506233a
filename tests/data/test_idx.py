from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fixify.data import open_data, open_train_val
from fixify.data.idx import DEBIAN_FOLDER, FASHION_CLASSES, read_idx
from fixify.errors import DataError

WriteFour = Callable[..., np.ndarray]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_with_the_four_files(tmp_path: Path, write_four: WriteFour, zipped: bool) -> None:
    pixels = write_four(tmp_path / "digits", zipped=zipped)
    train, val = open_train_val(str(tmp_path / "digits"))
    assert (len(train), len(val)) == (20, 10)
    assert train.class_names == val.class_names == tuple("0123456789")
    image, label = train.images.load(13)
    assert image.mode == "L" and label == 3
    assert np.array_equal(np.asarray(image), pixels[13])


def test_numbered_classes_are_counted_in_the_training_labels(tmp_path: Path, write_four: WriteFour) -> None:
    write_four(tmp_path, classes=20)  # the test labels reach only 9
    assert open_data(str(tmp_path), split="val").num_classes == 20


def test_fashion_mnist_is_found_under_fixify_data(
    tmp_path: Path, write_four: WriteFour, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_four(tmp_path / "FashionMNIST" / "raw", zipped=False)  # where torchvision puts it
    monkeypatch.setenv("FIXIFY_DATA", f"/nowhere:{tmp_path}")
    opened = open_data("fashion-mnist", split="train")
    assert opened.location == str(tmp_path / "FashionMNIST" / "raw")
    assert opened.class_names == FASHION_CLASSES


def test_where_fashion_mnist_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fixify.data.idx.DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("FIXIFY_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        open_data("fashion-mnist", split="train")
    for place in (tmp_path / "fashion-mnist", "data/fashion-mnist", tmp_path / "debian"):
        assert str(place) in caught.value.message
    assert "apt install dataset-fashion-mnist" in str(caught.value.hint)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FIXIFY_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    train, val = open_train_val("fashion-mnist")
    assert (len(train), len(val)) == (60_000, 10_000)
    assert train.images.load(0)[1] == 9  # the first training image is an ankle boot
    assert train.name == open_data(str(DEBIAN_FOLDER), split="train").name == "fashion-mnist"


ARRAY = np.zeros((4, 2), np.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"\x1f\x8b not gzip", ""),
        (lambda whole: gzip.compress(b"hello, world"), "idx"),
        (lambda whole: gzip.compress(whole[:-1]), r"\[4, 2\].* 7 bytes"),
        (lambda whole: gzip.compress(whole)[:-9], ""),
    ],
)
def test_damaged_files(
    tmp_path: Path, idx_bytes: Callable[..., bytes], damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "damaged.gz"
    path.write_bytes(damage(idx_bytes(ARRAY)))
    with pytest.raises(DataError, match=rf"damaged\.gz\b.*{message}"):
        read_idx(path)


def test_images_and_labels_of_different_lengths(
    tmp_path: Path, write_four: WriteFour, idx_bytes: Callable[..., bytes]
) -> None:
    write_four(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(5, np.uint8))))
    with pytest.raises(DataError, match=r"train-images.*train-labels.*\(20, 28, 28\).*\(5,\)"):
        open_data(str(tmp_path), split="train")
