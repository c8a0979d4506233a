from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fixify.data import draw_images, open_unlabelled
from fixify.data.dataset import Subset
from fixify.errors import DataError

Make = Callable[..., Path]
NAMES = ("ant", "bee", "cow")


def flatten(folder: Path) -> None:
    """Move the images of all class folders into the folder itself."""
    for image in sorted(folder.glob("*/*")):
        image.rename(folder / f"{image.parent.name}-{image.name}")
    for child in folder.iterdir():
        if child.is_dir():
            shutil.rmtree(child)


def test_class_folders_of_training_images_do_not_matter(make_folder: Make) -> None:
    root = make_folder(classes=("x", "y"), images=3, splits=("train",))
    (root / "train" / "x" / "deep").mkdir()
    shutil.copy(root / "train" / "x" / "0.png", root / "train" / "x" / "deep" / "more.png")
    shutil.copy(root / "train" / "x" / "0.png", root / "train" / "loose.png")
    train, val = open_unlabelled(str(root), NAMES)
    assert len(train) + len(val) == 3 + 3 + 2
    assert train.class_names == val.class_names == NAMES
    assert not train.labelled and not val.labelled


def test_validation_in_class_folders_is_labelled(make_folder: Make) -> None:
    root = make_folder(classes=("ant", "bee"), images=2)
    flatten(root / "train")
    train, val = open_unlabelled(str(root), ("cow", "bee", "ant"))
    assert (len(train), train.labelled) == (4, False)
    assert (len(val), val.labelled) == (4, True)
    # In the checkpoint's order, although not every class has images.
    assert val.class_names == ("cow", "bee", "ant")
    assert [val.images.load(index)[1] for index in range(4)] == [2, 2, 1, 1]
    # With another vocabulary it is the order of the folders, which `check_classes` compares.
    assert open_unlabelled(str(root), ("0", "1"))[1].class_names == ("ant", "bee")


def test_validation_without_class_folders_is_not(make_folder: Make) -> None:
    root = make_folder(classes=("ant",), images=2)
    flatten(root / "train")
    flatten(root / "val")
    train, val = open_unlabelled(str(root), NAMES)
    assert (len(train), len(val), val.labelled) == (2, 2, False)
    assert "without labels from val/" in val.description


def test_a_folder_of_images_is_enough_and_a_tenth_is_held_out(make_folder: Make) -> None:
    root = make_folder(classes=("ant",), images=30, splits=("train",)) / "train"
    flatten(root)
    parts = open_unlabelled(str(root), NAMES, seed=1)
    indices = []
    for part in parts:
        assert isinstance(part.images, Subset)
        indices.append(part.images.indices)
    assert [len(part) for part in parts] == [27, 3]
    assert sorted(indices[0] + indices[1]) == list(range(30))
    again, other = (open_unlabelled(str(root), NAMES, seed=seed)[1].images for seed in (1, 2))
    assert isinstance(again, Subset) and isinstance(other, Subset)
    assert again.indices == indices[1] != other.indices
    assert parts[0].description == "27 images without labels from train/"


def test_what_is_refused(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder(splits=("val",))
    with pytest.raises(DataError, match=r"data .*train/.* val/") as caught:
        open_unlabelled(str(root), NAMES)
    assert "train/" in str(caught.value.hint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        open_unlabelled(str(tmp_path / "empty"), NAMES)
    with pytest.raises(DataError, match="missing"):
        open_unlabelled(str(tmp_path / "missing"), NAMES)


def test_validation_on_training_images_is_refused(make_folder: Make) -> None:
    root = make_folder(splits=("train",))
    shutil.copytree(root / "train", root / "val")
    with pytest.raises(DataError, match=r"val is the training split .*train"):
        open_unlabelled(str(root), NAMES)


def test_images_are_drawn_from_train_or_from_anywhere(make_folder: Make) -> None:
    root = make_folder(classes=("x", "y"), images=10)
    drawn = [draw_images(str(root), count=15, seed=seed) for seed in (0, 0, 1)]
    indices = []
    for data in drawn:
        assert isinstance(data.images, Subset) and not data.labelled and data.name == "data"
        assert Path(data.location).name == "train"
        indices.append(data.images.indices)
    assert indices[0] == indices[1] != indices[2]
    assert len(set(indices[0])) == 15
    assert len(draw_images(str(root), count=100)) == 20
    flat = root / "val"
    flatten(flat)
    assert len(draw_images(str(flat), count=100)) == 20
    with pytest.raises(DataError, match="missing"):
        draw_images(str(root / "missing"), count=5)
