"""`wds/...` data names, on shards written here."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixify.data import Augmentation, DataOptions, draw_images, make_loader, open_data, open_train_val
from fixify.data.webdataset import index_shards
from fixify.errors import DataError

GRAY = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def _shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return path


def _samples(first: int, count: int, classes: int = 3) -> dict[str, bytes]:
    """Make gray images whose value is their number; the class is the number modulo the number of classes."""
    members = {}
    for number in range(first, first + count):
        members |= {f"a/{number:04}.png": _png(number), f"a/{number:04}.cls": str(number % classes).encode()}
    return members


def _values(opened: Any) -> list[tuple[int, int]]:
    found = [opened.images.load(index) for index in range(len(opened))]
    return [(np.asarray(image)[0, 0].item(), label) for image, label in found]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two training shards (9 images) and one validation shard (4 images)."""
    folder = tmp_path / "shards"
    _shard(folder / "x-train-0000.tar", _samples(0, 5))
    _shard(folder / "x-train-0001.tar", _samples(5, 4))
    _shard(folder / "x-val-0000.tar", _samples(100, 4))
    return folder


def test_a_folder_whose_shards_are_named_by_split(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = open_train_val(f"wds/{shards}")
    assert train.class_names == val.class_names == ("0", "1", "2")
    assert _values(train) == [(number, number % 3) for number in range(9)]
    assert _values(val) == [(number, number % 3) for number in range(100, 104)]
    assert all(word in train.description for word in ("9 images", "3 classes", "2 shards", "wds/shards"))
    monkeypatch.setenv("FIXIFY_DATA", str(shards.parent))
    assert len(open_data("wds/shards", split="val")) == len(draw_images("wds/shards", count=4)) == 4
    for pattern in ("x-train-{0000..0001}.tar", "x-train-*.tar"):
        assert _values(open_data(f"wds/{shards}/{pattern}", split="val")) == _values(train)


def test_shuffled_and_continued_exactly(shards: Path) -> None:
    """As with any other data, an epoch is a permutation and may begin in the middle."""
    train = open_data(f"wds/{shards}", split="train")

    def batches(first: int) -> list[list[float]]:
        loader = make_loader(train, GRAY, training=True, batch_size=2, seed=3, augmentation=Augmentation(no_aug=True))
        loader.set_epoch(1, first)
        return [images.mean(dim=(1, 2, 3)).tolist() for images, _ in loader]

    whole = batches(0)
    assert len({value for batch in whole for value in batch}) == 8  # the last of the 9 is dropped
    assert batches(2) == whole[2:]
    assert sorted(whole) != whole


def test_folders_of_splits_and_the_shards_that_webdataset_writes(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for split, numbers in (("train", range(6)), ("val", range(6, 9))):
        (tmp_path / split).mkdir()
        with webdataset.TarWriter(str(tmp_path / split / "0.tar")) as writer:
            for number in numbers:
                image = Image.open(io.BytesIO(_png(number)))
                writer.write({"__key__": f"s{number}", "png": image, "cls": number % 2, "txt": "words"})
    train, val = open_train_val(f"wds/{tmp_path}")
    assert _values(train) == [(number, number % 2) for number in range(6)]
    assert _values(val) == [(6, 0), (7, 1), (8, 0)]


def test_timms_info_file_and_its_json_labels(tmp_path: Path) -> None:
    for name, first in (("p0.tar", 0), ("p1.tar", 2), ("q.tar", 7)):
        members = {}
        for number in (first, first + 1):
            label = json.dumps({"label": number % 2 if number != 3 else -1, "word": f"w{number % 2}"}).encode()
            members |= {f"{number}.png": _png(number), f"{number}.json": label}
        _shard(tmp_path / name, members)
    splits = {
        "train": {"name": "train", "filenames": ["p0.tar", "p1.tar"], "shard_lengths": [2, 2], "num_samples": 4},
        "validation": {"name": "validation", "filenames": ["q.tar"], "shard_lengths": [2], "num_samples": 2},
    }
    for each in splits.values():
        each["alt_label"] = "label"
    info = tmp_path / "_info.json"
    info.write_text(json.dumps({"splits": splits}))
    train, val = open_train_val(f"wds/{tmp_path}")
    assert _values(train) == [(0, 0), (1, 1), (2, 0)]  # timm leaves labels below 0 out
    assert "(1 more" in train.description
    assert _values(val) == [(7, 1), (8, 0)]
    words = open_data(f"wds/{tmp_path}", split="val", options=DataOptions(target_key="word"))
    assert words.class_names == ("w0", "w1") and [label for _, label in _values(words)] == [1, 0]
    with pytest.raises(DataError, match=r"'wrd'.* label, word"):
        open_data(f"wds/{tmp_path}", split="val", options=DataOptions(target_key="wrd"))
    splits["validation"]["num_samples"] = 3
    info.write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match=r"\b2 images.*_info\.json .* 3\b"):
        open_data(f"wds/{tmp_path}", split="val")
    info.write_text('{"splits": {"train": {"filenames": ["p9.tar"]}}}')
    with pytest.raises(DataError, match=r"\b1 of the 1 .*p9\.tar"):
        open_data(f"wds/{tmp_path}", split="train")
    with pytest.raises(DataError, match=r"_info\.json .*val .* train"):
        open_data(f"wds/{tmp_path}", split="val")
    info.write_text("[]")
    with pytest.raises(DataError, match=r"_info\.json"):
        open_data(f"wds/{tmp_path}", split="train")


def test_names_of_classes(shards: Path) -> None:
    (shards / "classnames.txt").write_text("ant\nbee\ncat\n")
    assert open_data(f"wds/{shards}", split="val").class_names == ("ant", "bee", "cat")
    (shards / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match=r"classnames\.txt .* 2 names.* label 2\b"):
        open_data(f"wds/{shards}", split="val")


def test_damaged_and_missing_shards_are_named(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "x-train-0000.tar").read_bytes()
    (shards / "x-train-0001.tar").write_bytes(whole[:3000])
    with pytest.raises(DataError, match=r"x-train-0001\.tar"):
        open_data(f"wds/{shards}", split="train")
    with pytest.raises(DataError, match=r"\b1 of the 3 .*0002\.tar"):
        open_data(f"wds/{shards}/x-train-{{0000..0002}}.tar", split="train")
    packed = tmp_path / "packed-val.tar"
    packed.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"packed-val\.tar"):
        open_data(f"wds/{packed}", split="val")
    for name, named in (
        ("https://host/x.tar", "https://host/x.tar"),
        ("pipe:cat x.tar", "pipe:cat x.tar"),
        ("nowhere", "'nowhere'"),
        ("nowhere/*.tar", "wds/nowhere/*.tar"),
        (str(tmp_path / "shards" / "none-{0009..0001}.tar"), "{0009..0001}"),
    ):
        with pytest.raises(DataError) as caught:
            open_data(f"wds/{name}", split="val")
        assert named in caught.value.message
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none .*val.* \.tar"):
        open_data(f"wds/{tmp_path / 'none'}", split="val")
    bare = _shard(tmp_path / "bare.tar", {"1.png": _png(1)})
    with pytest.raises(DataError, match=r"\.cls"):
        open_data(f"wds/{bare}", split="val")
    with pytest.raises(DataError, match=r"tiff.*bare\.tar"):
        open_data(f"wds/{bare}", split="val", options=DataOptions(input_key="tiff"))
    with pytest.raises(DataError, match=r"training split .*x-train-0000\.tar"):
        open_train_val(f"wds/{shards}/x-train-0000.tar")


def test_if_a_sample_has_several_images_the_first_extension_in_the_list_wins(tmp_path: Path) -> None:
    members = {"s.mask.png": _png(1), "s.png": _png(2), "s.webp": _png(3), "s.cls": b"0", "t.txt": b"no image"}
    index = index_shards((_shard(tmp_path / "x.tar", members),))
    assert index.names.tolist() == [b"s.png"]
    assert index_shards((tmp_path / "x.tar",), ("webp", "png")).names.tolist() == [b"s.webp"]


def test_samples_without_an_image_that_is_read_are_counted(tmp_path: Path) -> None:
    members = {**_samples(0, 3), "a/8.gif": b"GIF89a", "a/8.cls": b"1", "a/readme.txt": b"hello"}
    _shard(tmp_path / "shards" / "x-val-0000.tar", members)
    opened = open_data(f"wds/{tmp_path / 'shards'}", split="val")
    assert len(opened) == 3 and opened.description.endswith("not read: 1)") and len(opened.asides) == 1
