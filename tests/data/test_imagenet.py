from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from fixify.data import open_data
from fixify.errors import DataError


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with all 1,000 synsets and one image of one pixel each."""
    root = tmp_path_factory.mktemp("disk") / "imagenet"
    pixel = root / "pixel.png"
    root.mkdir()
    Image.new("RGB", (1, 1)).save(pixel)
    for split in ("train", "val"):
        for synset in ImageNetInfo().label_names():
            (root / split / synset).mkdir(parents=True)
            shutil.copy(pixel, root / split / synset / "0.png")
    pixel.unlink()
    return root


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FIXIFY_DATA", raising=False)


def test_labels_are_those_of_every_imagenet_classifier(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIXIFY_DATA", str(imagenet.parent))
    opened = open_data("imagenet", split="val")
    assert list(opened.class_names) == ImageNetInfo().label_names()
    assert (opened.location, opened.name) == (str(imagenet / "val"), "imagenet")


def test_fixify_data_may_be_the_folder_itself_and_so_may_the_current_folder(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIXIFY_DATA", str(imagenet))
    assert open_data("imagenet", split="train").num_classes == 1000
    monkeypatch.delenv("FIXIFY_DATA")
    monkeypatch.chdir(imagenet)
    assert open_data("imagenet", split="train").num_classes == 1000
    monkeypatch.chdir(imagenet.parent)
    assert open_data("imagenet", split="train").num_classes == 1000


def test_every_place_and_the_layout_are_named_when_it_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIXIFY_DATA", str(tmp_path / "disk"))
    with pytest.raises(DataError) as caught:
        open_data("imagenet", split="train")
    for place in (tmp_path / "disk" / "imagenet", tmp_path / "disk" / "ILSVRC2012", "data/imagenet-1k"):
        assert f"\n  {place}\n" in caught.value.message
    assert "n01440764" in str(caught.value.hint) and "FIXIFY_DATA=" in str(caught.value.hint)


def test_class_folders_that_are_not_the_synsets_are_refused(tmp_path: Path) -> None:
    for name in ("n01440764", "n01443537", "dog"):
        (tmp_path / "imagenet" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (1, 1)).save(tmp_path / "imagenet" / "train" / name / "0.png")
    with pytest.raises(DataError, match=r"\b3 class folders.* 998 .* 1 .*dog"):
        open_data("imagenet", split="train")


def test_the_flat_validation_archive_is_explained(tmp_path: Path) -> None:
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    Image.new("RGB", (1, 1)).save(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.png")
    with pytest.raises(DataError, match=r"val .*ILSVRC2012_val_00000001\.png"):
        open_data("imagenet", split="val")
