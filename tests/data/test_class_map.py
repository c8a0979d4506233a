"""Class maps in every format."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fixify.data import DataOptions, match_classes, open_data, open_train_val
from fixify.data.class_matching import read_class_map
from fixify.errors import DataError

EXPECTED = {"bee": 0, "cat": 1, "ant": 2}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.txt", "bee\ncat\nant\n"),  # timm's
        ("map.txt", "ant 2\nbee 0\ncat 1\n"),
        ("map.tsv", "ant\t2\nbee\t0\ncat\t1\n"),
        ("map.json", '["bee", "cat", "ant"]'),
        ("map.json", '{"0": "bee", "1": "cat", "2": "ant"}'),
        ("map.json", '{"ant": 2, "cat": 1, "bee": 0}'),
        ("map.yaml", "- bee\n- cat\n- ant\n"),
        ("map.yml", "ant: 2\nbee: 0\ncat: 1\n"),
        ("map.yaml", "0: bee\n1: cat\n2: ant\n"),
    ],
)
def test_every_format(tmp_path: Path, make_folder: Callable[..., Path], name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert read_class_map(path) == EXPECTED
    val = open_data(str(make_folder(images=1)), split="val", options=DataOptions(class_map=path))
    assert (val.class_names, val.order) == (("bee", "cat", "ant"), "map")
    assert [val.images.load(index)[1] for index in range(3)] == [2, 0, 1]


def test_part_of_a_larger_label_set_and_merged_classes(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    path = tmp_path / "map.tsv"
    path.write_text("ant\t7\ncat\t7\n")
    train, val = open_train_val(str(make_folder(images=2)), options=DataOptions(class_map=path))
    assert len(train) == len(val) == 4 and train.num_classes == 8
    assert {val.images.load(index)[1] for index in range(4)} == {7}
    assert re.match(r"4 images of .*2 classes .*6 images .*1 ", val.description)
    matched = match_classes(val, 10, subset=True).data
    assert matched.num_classes == 10 and matched.images.load(0)[1] == 7
    with pytest.raises(DataError, match=r"label 7\b.* 5 classes"):
        match_classes(val, 5, subset=True)
    with pytest.raises(DataError, match=r"'cat' .*label 1\b.* class map .*label 7\b"):
        match_classes(val, 10, ["ant", "cat", *"cdefghij"], subset=True)


def test_numbers_as_names(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"1": 0, "2": 1, "10": 2}')
    assert read_class_map(path) == {"1": 0, "2": 1, "10": 2}


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("map.pkl", b"cos\nsystem\n", "pickle"),
        ("map.txt", b"", ""),
        ("map.txt", b"ant\nant\n", "'ant'"),
        ("map.json", b'{"ant": "x", "b": 1}', "JSON"),
        ("map.yaml", b"ant: [", "YAML"),
        ("map.yaml", b"just text", "YAML"),
    ],
)
def test_files_that_are_not_class_maps(
    tmp_path: Path, make_folder: Callable[..., Path], name: str, content: bytes, word: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_data(str(make_folder(images=1)), split="val", options=DataOptions(class_map=path))
    assert str(path) in caught.value.message and word in caught.value.message


def test_a_class_map_of_other_classes(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    path = tmp_path / "map.txt"
    path.write_text("wolf\nbear\n")
    root = make_folder(images=1)
    with pytest.raises(DataError) as caught:
        open_data(str(root), split="val", options=DataOptions(class_map=path))
    assert all(word in caught.value.message for word in (str(root), "'wolf'", "'ant'"))
