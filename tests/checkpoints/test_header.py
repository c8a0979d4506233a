"""The header of a file, read without the libraries that build networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fixify
from fixify.checkpoints.header import SLIM_KEY, has_metadata, read_header, read_metadata
from fixify.checkpoints.slim import read_info
from fixify.errors import ArchitectureError, FormatError

GOLDEN = Path(__file__).parent.parent / "golden"


def with_header(path: Path, header: bytes, tensors: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + tensors)
    return path


@pytest.mark.parametrize("name", ["v1", "v1-binary", "v1-ternary", "v1-levels"])
def test_it_says_what_the_whole_file_says(name: str) -> None:
    path = GOLDEN / f"{name}.fixed.safetensors"
    assert read_header(path).info == read_info(path) == fixify.inspect(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (10**9).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (2).to_bytes(8, "little") + b"{}more",
        (20).to_bytes(8, "little") + b'{"__metadata__": [1]}'.ljust(20)[:20],
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        read_metadata(path)
    assert not has_metadata(path, SLIM_KEY)


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": 3},
        {"__metadata__": {"fixify": 1}, "a": {"data_offsets": [0, 4]}},
        {"__metadata__": "fixify", "a": {"data_offsets": [0, 4]}},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entries: dict) -> None:
    path = with_header(tmp_path / "a.safetensors", json.dumps(entries).encode(), b"0000")
    with pytest.raises(FormatError):
        read_metadata(path)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((GOLDEN / "v1.fixed.safetensors").read_bytes()[:-1])
    with pytest.raises(FormatError, match="describes"):
        fixify.inspect(path)


def test_an_architecture_of_another_version_is_shown(tmp_path: Path) -> None:
    """`inspect` says what is written; `read_info`, which everything else uses, asks the installed libraries."""
    content = (GOLDEN / "v1.fixed.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"][SLIM_KEY])
    about["architecture"]["name"] = "net_of_tomorrow"
    header["__metadata__"][SLIM_KEY] = json.dumps(about)
    path = with_header(tmp_path / "new.safetensors", json.dumps(header).encode(), content[8 + length :])
    assert fixify.inspect(path).architecture.ref == "timm/net_of_tomorrow"  # type: ignore[union-attr]
    with pytest.raises(ArchitectureError):
        read_info(path)
