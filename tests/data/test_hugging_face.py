"""`hfds/...` data names, on data sets written here by the package itself."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixify.data import DataOptions, draw_images, open_data, open_train_val
from fixify.errors import DataError

datasets = pytest.importorskip("datasets")


def _png(seed: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def _table(seed: int, labels: list[Any], feature: Any = None, **columns: Any) -> Any:
    feature = datasets.ClassLabel(names=["ant", "bee", "cat"]) if feature is None else feature
    images = [_png(seed + number) for number in range(len(labels))]
    values = {"image": images, "label": labels, **{name: column for name, (column, _) in columns.items()}}
    features = {"image": datasets.Image(), "label": feature, **{name: kind for name, (_, kind) in columns.items()}}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DatasetDict on disk: 5 training images and 4 validation images, one of those without label."""
    folder = tmp_path / "pets"
    parts = {"train": _table(0, [0, 1, 2, 2, 0]), "validation": _table(100, [2, 1, -1, 0])}
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_what_save_to_disk_wrote(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = open_train_val(f"hfds/{saved}")
    assert train.class_names == val.class_names == ("ant", "bee", "cat")
    assert (train.name, train.order, len(train)) == ("hfds/pets", "own", 5)
    assert all(word in val.description for word in ("3 images", "3 classes", "validation", "hfds/pets", "(1 more"))
    found = [val.images.load(index) for index in range(3)]
    assert [label for _, label in found] == [2, 1, 0]
    expected = np.asarray(Image.open(io.BytesIO(_png(103)["bytes"])))
    assert np.array_equal(np.asarray(found[2][0]), expected)
    assert sorted(train.images.listing()) != sorted(val.images.listing())
    # By its name, in a folder of $FIXIFY_DATA.
    monkeypatch.setenv("FIXIFY_DATA", str(saved.parent))
    assert len(open_data("hfds/pets", split="train")) == 5
    assert len(draw_images("hfds/pets", count=2)) == 2


def test_parquet_files_with_columns_of_other_names(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    coarse = datasets.ClassLabel(names=["small", "large"])
    for part, seed in (("train", 0), ("test", 50)):
        table = _table(seed, [2, 0, 1], coarse=([1, 0, 0], coarse))
        table = table.rename_columns({"image": "img", "label": "fine"})
        table.to_parquet(folder / f"{part}.parquet")
    with pytest.raises(DataError, match="fine, coarse") as caught:
        open_data(f"hfds/{folder}", split="val")
    assert "--target-key" in str(caught.value.hint)
    opened = open_data(f"hfds/{folder}", split="val", options=DataOptions(target_key="coarse"))
    assert opened.class_names == ("small", "large")
    assert [opened.images.load(index)[1] for index in range(3)] == [1, 0, 0]
    assert len(draw_images(f"hfds/{folder}", count=9)) == 3  # calibration needs no labels
    with pytest.raises(DataError, match=r"--input-key fine\b.* img\b"):
        open_data(f"hfds/{folder}", split="val", options=DataOptions(input_key="fine"))
    with pytest.raises(DataError, match=r"'zzz'.* img, fine, coarse"):
        open_data(f"hfds/{folder}", split="val", options=DataOptions(target_key="zzz"))


def test_a_folder_of_images_as_datasets_reads_it(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(images=2)
    opened = open_data(f"hfds/{folder}", split="val")
    assert (opened.class_names, len(opened)) == (("ant", "bee", "cat"), 6)


def test_labels_that_are_text_or_numbers(tmp_path: Path) -> None:
    text = {
        "train": _table(0, ["10", "2", "1"], datasets.Value("string")),
        "val": _table(9, ["2", "10"], datasets.Value("string")),
    }
    datasets.DatasetDict(text).save_to_disk(tmp_path / "text")
    opened = open_data(f"hfds/{tmp_path / 'text'}", split="val")
    assert opened.class_names == ("1", "2", "10")
    assert [opened.images.load(index)[1] for index in range(2)] == [1, 2]
    numbers = {"train": _table(0, [3, 0], datasets.Value("int64")), "val": _table(9, [1], datasets.Value("int64"))}
    datasets.DatasetDict(numbers).save_to_disk(tmp_path / "numbers")
    assert open_data(f"hfds/{tmp_path / 'numbers'}", split="train").class_names == ("0", "1", "2", "3")


def test_mistakes_are_data_errors(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"hfds/.* test .* train, validation"):
        open_data(f"hfds/{saved}", split="test")
    _table(0, [0, 1]).save_to_disk(tmp_path / "one")
    assert len(open_data(f"hfds/{tmp_path / 'one'}", split="val")) == 2
    with pytest.raises(DataError, match=r"hfds/.*one is the training split hfds/.*one"):
        open_train_val(f"hfds/{tmp_path / 'one'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"hfds/.*empty"):
        open_data(f"hfds/{tmp_path / 'empty'}", split="val")
    with pytest.raises(DataError, match=r"hfds/pets .*class_order"):
        open_data(f"hfds/{saved}", split="val", options=DataOptions(class_order="lexical"))
    with pytest.raises(DataError, match="tfds/"):
        open_data("tfds/mnist", split="val")
    # A damaged image is named when it is needed.
    broken = {"image": [{"bytes": b"no", "path": None}], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    datasets.Dataset.from_dict(broken, features=features).save_to_disk(tmp_path / "broken")
    with pytest.raises(DataError, match=r"number 0 of hfds/broken"):
        open_data(f"hfds/{tmp_path / 'broken'}", split="val").images.load(0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"\bdatasets\b") as caught:
        open_data("hfds/pets", split="val")
    assert caught.value.hint == "pip install datasets"
