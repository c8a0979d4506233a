from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torchvision.datasets

from fixify.data import DATA_NAMES, DataOptions, draw_images, open_data
from fixify.errors import DataError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FIXIFY_DATA", raising=False)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'fashon-mnist'.* 'fashion-mnist'") as caught:
        open_data("fashon-mnist", split="train")
    assert all(name in str(caught.value.hint) for name in DATA_NAMES)


def test_an_unknown_torch_name() -> None:
    with pytest.raises(DataError, match=r"'torch/cifar11'.* 'torch/cifar10'"):
        open_data("torch/cifar11", split="train")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"images\.zip"):
        open_data("images.zip", split="train")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"nothing\b.* empty"):
        open_data("nothing", split="train")


@pytest.mark.parametrize("name", ["torch/cifar10", "cifar10", "cifar100", "torch/mnist"])
def test_torch_data_that_is_not_here_says_how_to_get_it(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name.removeprefix('torch/')}\b.* /.*/data and /") as caught:
        open_data(name, split="val")
    assert "--download" in str(caught.value.hint)


def test_torch_data_is_read_from_fixify_data(
    tmp_path: Path, write_four: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_four(tmp_path / "disk" / "MNIST" / "raw", zipped=False)
    monkeypatch.setenv("FIXIFY_DATA", str(tmp_path / "disk"))
    val = open_data("torch/mnist", split="val")
    assert (len(val), val.num_classes, val.name) == (10, 10, "torch/mnist")
    image, label = val.images.load(3)
    assert (image.size, image.mode, label) == ((28, 28), "L", 3)
    assert len(open_data("torch/mnist", split="train")) == 20


def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    with pytest.raises(DataError, match=r"torch/cifar10 to data\b.*no route to host"):
        open_data("torch/cifar10", split="train", download=True)


def test_a_folder_by_its_name_in_the_data_folders(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_folder()
    monkeypatch.setenv("FIXIFY_DATA", str(folder.parent))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_data(folder.name, split="train").num_classes == 3
    assert len(draw_images(folder.name, count=4)) == 4


def test_a_folder_without_splits_can_be_evaluated_on(make_folder: Callable[..., Path]) -> None:
    folder = make_folder() / "val"
    opened = open_data(str(folder), split="val")
    assert (opened.class_names, len(opened)) == (("ant", "bee", "cat"), 9)
    with pytest.raises(DataError, match=r"val .*train/"):
        open_data(str(folder), split="train")
    # But a folder that has only another split cannot.
    for missing, wanted in (("train", "train"), ("val", "val")):
        other = folder.parent / missing
        hidden = other.rename(other.with_name(f"old-{missing}"))
        with pytest.raises(DataError, match=rf"data .*\b{wanted}/"):
            open_data(str(folder.parent), split=wanted)  # type: ignore[arg-type]
        hidden.rename(other)


def test_options_that_do_not_apply_to_the_data_are_refused(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"target_key .*hfds/.* wds/"):
        open_data(str(make_folder()), split="val", options=DataOptions(target_key="label"))
