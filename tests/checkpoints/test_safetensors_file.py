"""Open safetensors files: headers that lie are refused, hints in the metadata are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fixify.checkpoints import open_source
from fixify.errors import SourceError, UnsafeCheckpointError


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(path: Path, header: dict[str, Any] | bytes, data: int, *, claim: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claim is None else claim) + text + bytes(data))
    return path


GOOD = {"a": entry([3], 0, 12)}


@pytest.mark.parametrize(
    ("header", "data", "claim", "expected"),
    [
        (GOOD, 12, 10_000_000_000, "10000000000"),
        (GOOD, 12, (1 << 64) - 1, "18446744073709551615"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, None, ""),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, None, ""),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, None, ""),
        ({"a": entry([1], 4, 0)}, 4, None, ""),
        ({"a": entry([4], 0, 12)}, 12, None, ""),
        ({"a": entry([1], 0, 12)}, 12, None, ""),
        ({"a": entry([-1], 0, 4)}, 4, None, ""),
        ({"a": entry([1 << 33, 1 << 33], 0, 4)}, 4, None, ""),
        ({"a": entry([1 << 64], 0, 4)}, 4, None, ""),
        ({"a": entry([0, 1 << 62, 1 << 62], 0, 0)}, 0, None, "4611686018427387904"),
        ({"a": entry([0, 1 << 63], 0, 0)}, 0, None, "9223372036854775808"),
        (GOOD, 20, None, ""),
        (b'{"a": nope}', 0, None, ""),
        (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 0, None, ""),
        (b'{"\xff": 1}', 0, None, ""),
        ({"__metadata__": {"a": 1}, **GOOD}, 12, None, ""),
    ],
)
def test_a_header_that_lies(
    tmp_path: Path, header: dict[str, Any] | bytes, data: int, claim: int | None, expected: str
) -> None:
    path = write(tmp_path / "w.safetensors", header, data, claim=claim)
    for meta in (False, True):
        with pytest.raises(UnsafeCheckpointError) as caught:
            open_source(path, meta=meta)
        assert expected in caught.value.message and "w.safetensors" in caught.value.message
        assert caught.value.hint is not None


@pytest.mark.parametrize("cut", [3, 7, 20, 80, 1000])
def test_cut_short(tmp_path: Path, resnet_state: dict[str, torch.Tensor], cut: int) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(resnet_state, path)
    size = path.stat().st_size
    kept = cut if cut < 100 else size - cut
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert not isinstance(caught.value, UnsafeCheckpointError)
    assert str(kept) in caught.value.message
    if kept > 1000:
        assert str(size) in caught.value.message


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64"])
def test_dtypes_that_mean_nothing_alone(tmp_path: Path, dtype: str) -> None:
    bytes_each = 8 if dtype == "C64" else 1
    path = write(tmp_path / "w.safetensors", {"a.weight": entry([4], 0, 4 * bytes_each, dtype)}, 4 * bytes_each)
    with pytest.raises(SourceError, match=rf"a\.weight.*{dtype}"):
        open_source(path)


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"format": "pt"}}])
def test_no_tensors(tmp_path: Path, header: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=r"w\.safetensors"):
        open_source(write(tmp_path / "w.safetensors", header, 0))


def test_a_slim_checkpoint_is_not_a_source(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"fixify": "{}", "fixify.version": "1"})
    with pytest.raises(SourceError, match=r"w\.safetensors") as caught:
        open_source(path)
    assert "fixify inspect" in (caught.value.hint or "")


def test_hints_in_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    metadata = {"architecture": "resnet18", "num_classes": "3", "label_names": '["a", "b", "c"]'}
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata=metadata)
    source = open_source(path)
    assert source.facts.architecture == "timm/resnet18"
    assert source.facts.num_classes == 3 and source.facts.labels == ["a", "b", "c"]


@pytest.mark.parametrize("metadata", [{"architecture": "nonesuch"}, {"num_classes": "many"}, {"num_classes": "٣"}])
def test_hints_that_mean_nothing_are_ignored(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata=metadata)
    source = open_source(path)
    assert source.facts.architecture is None and source.facts.num_classes is None


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A sparse file of 1 GB: only its header is read."""
    path = tmp_path / "large.safetensors"
    elements = 1 << 28
    header = json.dumps({"weight": entry([elements // 1024, 1024], 0, 4 * elements)}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * elements)
    source = open_source(path, meta=True)
    assert source.shapes == {"weight": (elements // 1024, 1024)}
    assert source.num_bytes is not None and source.num_bytes > 1 << 30


def test_an_unaligned_header(tmp_path: Path) -> None:
    header = json.dumps({"a": entry([3], 0, 12)}).encode()
    header += b" " * (1 + -len(header) % 4)
    data = struct.pack("<3f", 1.0, 2.0, 3.0)
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    tensor = open_source(path).tensors["a"]
    assert tensor.tolist() == [1.0, 2.0, 3.0] and tensor.data_ptr() % 4 == 0
