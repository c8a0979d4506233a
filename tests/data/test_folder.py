from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fixify.data import open_data, open_train_val
from fixify.data.folder import FolderImages
from fixify.errors import DataError


def labels_by_name(root: Path, split: str) -> dict[str, int]:
    opened = open_data(str(root), split=split)  # type: ignore[arg-type]
    assert isinstance(opened.images, FolderImages)
    return {str(opened.images.path(i).relative_to(root)): opened.images.load(i)[1] for i in range(len(opened))}


def test_labels_follow_the_natural_order_of_the_class_folders(make_folder: Callable[..., Path]) -> None:
    root = make_folder(classes=("c10", "c2", "C1"), images=2)
    opened = open_data(str(root), split="train")
    assert opened.class_names == ("C1", "c2", "c10")
    assert len(opened) == 6
    found = labels_by_name(root, "train")
    assert {path: label for path, label in found.items() if "c10" in path} == {
        "train/c10/0.png": 2,
        "train/c10/1.png": 2,
    }


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "test"])
def test_the_validation_split_may_have_several_names_and_says_which(
    make_folder: Callable[..., Path], name: str
) -> None:
    root = make_folder(splits=("train", name))
    opened = open_data(str(root), split="val")
    assert Path(opened.location).name == name
    assert f"from {name}/" in opened.description


def test_val_goes_before_test_unless_test_is_asked_for(make_folder: Callable[..., Path]) -> None:
    root = make_folder(splits=("train", "val", "test"))
    assert Path(open_data(str(root), split="val").location).name == "val"
    assert Path(open_data(str(root), split="test").location).name == "test"


def test_a_class_without_validation_images_does_not_shift_the_labels(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    shutil.rmtree(root / "val" / "ant")
    assert {label for path, label in labels_by_name(root, "val").items() if "bee" in path} == {1}
    assert "1 class has no images there" in open_data(str(root), split="val").description


def test_a_validation_class_that_training_lacks_is_refused(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    shutil.rmtree(root / "train" / "bee")
    with pytest.raises(DataError, match=r"\b1 class folders .*train .*: bee"):
        open_data(str(root), split="val")


def test_images_may_lie_deeper_and_hidden_folders_are_no_classes(
    make_folder: Callable[..., Path], write_image: Callable[..., None]
) -> None:
    root = make_folder(classes=("ant", "bee"), images=1)
    write_image(root / "train" / "ant" / "images" / "deep.png", seed=1)
    write_image(root / "train" / ".thumbnails" / "x.png", seed=2)
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    assert labels_by_name(root, "train") == {
        "train/ant/0.png": 0,
        "train/ant/images/deep.png": 0,
        "train/bee/0.png": 1,
    }


def test_a_flat_folder_is_refused_with_what_is_expected(make_folder: Callable[..., Path]) -> None:
    root = make_folder(splits=("train",))
    with pytest.raises(DataError) as caught:
        open_train_val(str(root / "train"))
    assert str(root / "train") in caught.value.message
    assert "train/" in caught.value.message and "ant/, bee/, cat/" in caught.value.message
    assert "DATA/train/<class>/*.jpg" in str(caught.value.hint)


def test_training_is_never_silently_the_validation_split(make_folder: Callable[..., Path]) -> None:
    root = make_folder(splits=("train",))
    with pytest.raises(DataError, match=r"validation .*val/, valid/, .*test/\); it holds train/"):
        open_train_val(str(root))


def test_loose_images_and_empty_classes_are_refused(
    make_folder: Callable[..., Path], write_image: Callable[..., None]
) -> None:
    root = make_folder()
    write_image(root / "train" / "loose.png", seed=1)
    with pytest.raises(DataError, match=r"\b1 images .* loose\.png"):
        open_data(str(root), split="train")
    (root / "train" / "loose.png").unlink()
    (root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"train/empty .*\.png"):
        open_data(str(root), split="train")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_unreadable_image_is_named(make_folder: Callable[..., Path], content: bytes) -> None:
    root = make_folder()
    (root / "train" / "bee" / "1.png").write_bytes(content)
    images = open_data(str(root), split="train").images
    with pytest.raises(DataError, match=r"train/bee/1\.png: "):
        images.load(4)


def test_a_truncated_image_is_named(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    path = root / "train" / "ant" / "0.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"ant/0\.png"):
        open_data(str(root), split="train").images.load(0)


SAME = "val is the training split .*train.*{}"


class TestOverlappingSplits:
    def test_a_linked_folder(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder(splits=("train",))
        (root / "val").symlink_to(root / "train")
        with pytest.raises(DataError, match=SAME.format("the same folder")):
            open_train_val(str(root))

    def test_linked_class_folders(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder(splits=("train",))
        (root / "val").mkdir()
        for name in ("ant", "bee", "cat"):
            (root / "val" / name).symlink_to(root / "train" / name)
        with pytest.raises(DataError, match=SAME.format("val/ant/0.png .*link")):
            open_train_val(str(root))

    def test_hard_links(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder(splits=("train",))
        shutil.copytree(root / "train", root / "val", copy_function=os.link)
        with pytest.raises(DataError, match=SAME.format("val/ant/0.png and .*train/ant/0.png")):
            open_train_val(str(root))

    def test_a_copy(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder(splits=("train",))
        shutil.copytree(root / "train", root / "val")
        with pytest.raises(DataError, match=SAME.format(r"\(9\)")):
            open_train_val(str(root))

    def test_equal_file_names_alone_are_fine(self, make_folder: Callable[..., Path]) -> None:
        train, val = open_train_val(str(make_folder()))
        assert train.class_names == val.class_names
