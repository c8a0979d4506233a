from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fixify.data import draw_images, open_data, open_train_val, open_unlabelled
from fixify.data.folder import FolderImages, images_below
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
    with pytest.raises(DataError, match=r"\b1 class folder .*train .*: bee"):
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
    with pytest.raises(DataError, match=r"\b1 image .* loose\.png"):
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


class TestWhatIsNotRead:
    def test_a_loop_of_links_is_not_followed_and_said(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder()
        before = labels_by_name(root, "train")
        (root / "train" / "ant" / "again").symlink_to(root / "train" / "ant")
        (root / "train" / "ant" / "up").symlink_to("..")
        (root / "train" / "bee" / "root").symlink_to("/")
        opened = open_data(str(root), split="train")
        assert labels_by_name(root, "train") == before
        assert "train/ant/again and 2 more links" in opened.description and opened.asides

    def test_links_to_each_other_end(self, make_folder: Callable[..., Path], write_image: Callable[..., None]) -> None:
        root = make_folder(splits=("train",), images=1)
        for name, other in (("one", "two"), ("two", "one")):
            write_image(root / name / f"{name}.png", seed=9)
            (root / name / "other").symlink_to(root / other)
        (root / "train" / "cat" / "one").symlink_to(root / "one")
        found = images_below(root / "train", "cat")
        assert found.paths == ["cat/0.png", "cat/one/one.png", "cat/one/other/two.png"]
        assert found.loops == ["train/cat/one/other/other"]

    def test_a_link_to_another_folder_is_followed_each_time(
        self, make_folder: Callable[..., Path], write_image: Callable[..., None]
    ) -> None:
        root = make_folder(images=1)
        write_image(root / "more" / "deep" / "1.png", seed=5)
        for link in ("one", "two"):
            (root / "train" / "bee" / link).symlink_to(root / "more")
        opened = open_data(str(root), split="train")
        assert len(opened) == 5 and opened.asides == ()

    def test_other_suffixes_are_counted(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder()
        for name in ("a.gif", "b.GIF", "c.avif", "d.txt", "Thumbs.db", ".e.gif"):
            (root / "val" / "bee" / name).touch()
        opened = open_data(str(root), split="val")
        assert opened.description.endswith("(not read: 2 .gif, 1 .avif)") and len(opened) == 9

    def test_a_class_of_other_suffixes_says_so(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder()
        for path in (root / "train" / "bee").iterdir():
            path.rename(path.with_suffix(".heic"))
        with pytest.raises(DataError, match=r"train/bee .*3 \.heic"):
            open_data(str(root), split="train")

    def test_images_without_labels(self, tmp_path: Path, write_image: Callable[..., None]) -> None:
        root = tmp_path
        (root / "a.jfif").touch()
        with pytest.raises(DataError, match=r"not read: 1 \.jfif"):
            draw_images(str(root), count=1)
        write_image(root / "b.png", seed=0)
        assert "not read: 1 .jfif" in draw_images(str(root), count=1).description

    def test_a_folder_that_cannot_be_read_is_named(
        self, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = make_folder()
        scandir = os.scandir

        def refuse(path: str) -> object:
            if str(path).endswith("bee"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match=r"train/bee: Permission denied"):
            open_data(str(root), split="train")


class TestEmptyValidationClass:
    @pytest.mark.parametrize("stray", [(), ("Thumbs.db", "notes.txt")])
    def test_is_as_a_missing_one(self, make_folder: Callable[..., Path], stray: tuple[str, ...]) -> None:
        root = make_folder()
        for path in (root / "val" / "bee").iterdir():
            path.unlink()
        for name in stray:
            (root / "val" / "bee" / name).touch()
        empty = open_data(str(root), split="val")
        shutil.rmtree(root / "val" / "bee")
        missing = open_data(str(root), split="val")
        assert empty.description == missing.description and "1 class has no images there" in empty.description
        assert empty.class_names == missing.class_names == ("ant", "bee", "cat")
        assert labels_by_name(root, "val")["val/cat/0.png"] == 2

    def test_also_without_training_labels(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder()
        for path in (root / "val" / "bee").iterdir():
            path.unlink()
        _, val = open_unlabelled(str(root), ["ant", "bee", "cat"])
        assert val.labelled and len(val) == 6 and "2 classes" in val.description

    def test_not_all_of_them(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder()
        for path in (root / "val").glob("*/*.png"):
            path.unlink()
        with pytest.raises(DataError, match="no images"):
            open_data(str(root), split="val")


class TestPipes:
    def test_among_the_images(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder()
        os.mkfifo(root / "val" / "ant" / "pipe.png")
        images = open_data(str(root), split="val").images
        assert images.where(3).endswith("pipe.png")
        with pytest.raises(DataError, match=r"pipe\.png"):
            images.load(3)

    def test_when_splits_are_compared(self, make_folder: Callable[..., Path]) -> None:
        root = make_folder()
        for split in ("train", "val"):
            os.mkfifo(root / split / "ant" / "pipe.png")
        train, val = open_train_val(str(root))
        assert len(train) == len(val) == 10

    def test_as_a_shard(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "val.tar")
        for name in (f"wds/{tmp_path}", f"wds/{tmp_path}/val.tar", f"wds/{tmp_path}/*.tar"):
            with pytest.raises(DataError):
                open_data(name, split="val")
