"""fixify.checkpoints.labels: class names from ImageNet's tables and from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fixify.checkpoints import imagenet_labels, labels, read_class_map
from fixify.errors import SourceError


@pytest.mark.parametrize("num_classes", [1000, 11221, 11821, 21841, 21842, 21843])
def test_every_version_of_imagenet(num_classes: int) -> None:
    labels = imagenet_labels(num_classes)
    assert labels is not None and len(labels) == num_classes
    assert all(isinstance(label, str) and label for label in labels)


def test_the_order_of_imagenet() -> None:
    labels = imagenet_labels(1000)
    assert labels is not None
    assert labels[0].startswith("tench") and labels[285] == "Egyptian cat" and labels[967] == "espresso"


@pytest.mark.parametrize("num_classes", [0, 10, 999, 21840])
def test_no_version_of_imagenet(num_classes: int) -> None:
    assert imagenet_labels(num_classes) is None


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\nred fox\n",
        "cat 0\ndog 1\nred fox 2\n",
        "red fox\t2\ncat\t0\ndog\t1\n",
        "cat, 0\ndog, 1\nred fox, 2",
        "0 cat\n1 dog\n2 red fox\n",
        "0: cat\r\n1: dog\r\n\r\n2: red fox\r\n",
        "\ufeffcat\ndog\nred fox\n",
        '["cat", "dog", "red fox"]',
        '{"0": "cat", "1": "dog", "2": "red fox"}',
        '{"cat": 0, "red fox": 2, "dog": 1}',
        '{"0": ["n02", "cat"], "1": ["n03", "dog"], "2": ["n04", "red fox"]}',
    ],
)
def test_class_maps(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_class_map(path) == ["cat", "dog", "red fox"]


def test_two_classes_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("crane 0\ncrane 1\ncat 2\ndog 3\n")
    assert read_class_map(path) == ["crane", "crane", "cat", "dog"]


@pytest.mark.parametrize("names", [["class 0", "class 1", "class 2"], ["0", "1", "2"], ["a 5", "b 7"], ["3", "x", "y"]])
def test_names_that_end_in_numbers_stay(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(names))
    assert read_class_map(path) == names


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ""),
        (b" \n\n", ""),
        (b"\xff\xfe\x00c", "UTF-8"),
        (b'{"a": ', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"cat": 0, "dog": 2}', "JSON"),
        (b'["cat", 3]', "JSON"),
        (b"[]", "JSON"),
    ],
)
def test_files_that_are_no_class_maps(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_class_map(path)
    assert expected in str(caught.value) and "classes.txt" in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"classes\.txt"):
        read_class_map(tmp_path / "classes.txt")


def test_json_round_trip_of_odd_names(tmp_path: Path) -> None:
    names = ["a, b", "c: 3", "", "é\n"]
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(names))
    assert read_class_map(path) == names


PLAIN_YAML = (
    *(
        "0: tench\n1: great white shark, (a) shark\n",
        "- cat\n- dog's\n",
        "- yes\n- No\n",
        "0: null\n1: b\n",
        "0: a\n0: b\n",
    ),
    *(
        "00: a\n1: b\n",
        "0: a\n- b\n",
        "0: a\n  b\n",
        "0: a # b\n",
        "0: a\r\n1: b\r\n",
        "0: a: b\n",
        "- a\x0b- b\n",
        "0: 1e3\n",
    ),
)


@pytest.mark.parametrize("text", PLAIN_YAML)
def test_the_quick_way_through_yaml_reads_what_the_parser_reads(text: str) -> None:
    quick = labels._plain_yaml(text)
    try:
        slow = yaml.safe_load(text)
    except yaml.YAMLError:
        slow = None
    assert quick is None or quick == slow
    assert quick is not None or text not in PLAIN_YAML[:2]


def test_a_long_class_map_is_read_without_a_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels.yaml, "load", None)
    names = [f"class of number {index}" for index in range(200_000)]
    path = tmp_path / "names.yaml"
    path.write_text("".join(f"{index}: {name}\n" for index, name in enumerate(names)))
    assert read_class_map(path) == names


def test_other_yaml_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "names.yaml"
    path.write_text("".join(f"{index}: 'name {index}'\n" for index in range(140_000)))
    with pytest.raises(SourceError, match="as JSON"):
        read_class_map(path)
