"""Classifiers without a network: which file holds one, what is read of it, and what is asked."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fixify.checkpoints.matrix import MatrixOptions, is_matrix, read_matrix
from fixify.errors import SourceError, UnsafeCheckpointError, UsageError

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((30, 48)).astype(np.float32)
BIAS = RNG.standard_normal(30).astype(np.float32)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, dtype: str, order: Any) -> None:
    np.save(tmp_path / "w.npy", np.asarray(WEIGHT, dtype=dtype, order=order))
    assert is_matrix(tmp_path / "w.npy")
    found = read_matrix(tmp_path / "w.npy")
    assert torch.equal(found.weight, torch.from_numpy(WEIGHT.astype(dtype).astype(np.float32)))
    assert (found.bias, found.labels, found.transposed) == (None, None, False)
    assert found.stored_bytes == 30 * 48 * np.dtype(dtype).itemsize
    assert found.num_bytes == (tmp_path / "w.npy").stat().st_size


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_a_bias(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "w.npz", **{"fc.weight": WEIGHT, "fc.bias": BIAS, "step": np.int64(3)})
    found = read_matrix(tmp_path / "w.npz")
    assert torch.equal(found.weight, torch.from_numpy(WEIGHT)) and found.keys == ("fc.weight", "fc.bias")
    assert found.bias is not None and torch.equal(found.bias, torch.from_numpy(BIAS))
    assert any("step" in note for note in found.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.from_numpy(WEIGHT).to(dtype)
    names = [f"class {number}" for number in range(30)]
    metadata = {"labels": json.dumps(names)}
    save_file({"head.weight": weight, "head.bias": torch.from_numpy(BIAS)}, tmp_path / "w.safetensors", metadata)
    found = read_matrix(tmp_path / "w.safetensors")
    assert torch.equal(found.weight, weight.float()) and found.bias is not None and found.labels == names


def test_a_network_is_no_matrix(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(3, 4), "b.weight": torch.ones(2, 3), "b.bias": torch.ones(2)}
    save_file(state, tmp_path / "net.safetensors")
    save_file({"conv.weight": torch.ones(3, 3, 3, 3), "fc.weight": torch.ones(2, 3)}, tmp_path / "conv.safetensors")
    assert not is_matrix(tmp_path / "net.safetensors") and not is_matrix(tmp_path / "conv.safetensors")
    with pytest.raises(UsageError, match="2 matrices"):
        read_matrix(tmp_path / "net.safetensors")
    for keys in (["b"], ["b.weight"], ["b.weight", "b.bias"]):
        found = read_matrix(tmp_path / "net.safetensors", MatrixOptions(keys=keys))
        assert found.keys == ("b.weight", "b.bias") and found.weight.shape == (2, 3)
    for keys in (["c"], ["b.bias"], ["a.weight", "b.weight"]):
        with pytest.raises((SourceError, UsageError)):
            read_matrix(tmp_path / "net.safetensors", MatrixOptions(keys=keys))


def test_a_convolution_of_size_one_is_a_matrix(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.from_numpy(WEIGHT)[:, :, None, None].contiguous()}, tmp_path / "w.safetensors")
    assert torch.equal(read_matrix(tmp_path / "w.safetensors").weight, torch.from_numpy(WEIGHT))


def test_which_side_the_classes_are_on(tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    np.save(path, RNG.standard_normal((64, 20)).astype(np.float32))
    with pytest.raises(UsageError) as asked:  # 64 classes of 20 features, or 64 features of 20 classes
        read_matrix(path)
    assert "64" in asked.value.message and "20" in asked.value.message and "--rows" in (asked.value.hint or "")
    (tmp_path / "names.txt").write_text("".join(f"name {number}\n" for number in range(20)))
    for options, shape in (
        (MatrixOptions(rows="classes"), (64, 20)),
        (MatrixOptions(rows="features"), (20, 64)),
        (MatrixOptions(labels=str(tmp_path / "names.txt")), (20, 64)),
        (MatrixOptions(widths=(64, 512)), (20, 64)),
        (MatrixOptions(widths=(20,)), (64, 20)),
    ):
        assert tuple(read_matrix(path, options).weight.shape) == shape
    with pytest.raises(SourceError):
        read_matrix(path, MatrixOptions(widths=(512,)))


def test_unit_vectors_show_the_side(tmp_path: Path) -> None:
    rows = RNG.standard_normal((64, 20)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "columns.npy", rows.T)
    assert torch.equal(read_matrix(tmp_path / "rows.npy").weight, read_matrix(tmp_path / "columns.npy").weight)


def test_what_could_change_the_answers_is_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"text": torch.from_numpy(WEIGHT), "logit_scale": torch.tensor(4.6052)}, path)
    with pytest.raises(UsageError) as asked:
        read_matrix(path)
    assert "--logit-scale 100" in (asked.value.hint or "")
    assert read_matrix(path, MatrixOptions(logit_scale=100.0)).keys == ("text",)
    assert read_matrix(path, MatrixOptions(keys=["text"])).keys == ("text",)
    save_file({"text": torch.from_numpy(WEIGHT), "prior": torch.from_numpy(BIAS)}, path)
    with pytest.raises(UsageError):
        read_matrix(path)
    assert read_matrix(path, MatrixOptions(keys=["text", "prior"])).bias is not None


def test_files_that_are_no_classifier(tmp_path: Path) -> None:
    np.save(tmp_path / "ints.npy", np.ones((4, 5), dtype=np.int64))
    np.save(tmp_path / "vector.npy", BIAS)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "nan.npy", np.full((4, 5), np.nan, dtype=np.float32))
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.npz").write_text("hello")
    for name in ("ints", "vector", "objects", "nan", "text"):
        with pytest.raises(SourceError):
            read_matrix(tmp_path / f"{name}.npy")
    with pytest.raises(SourceError):
        read_matrix(tmp_path / "text.npz")
    with pytest.raises(SourceError):
        read_matrix(tmp_path / "none.npy")
    torch.save(torch.ones(3, 4), tmp_path / "w.pt")
    with pytest.raises(SourceError, match="safetensors"):
        read_matrix(tmp_path / "w.pt")


def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    np.save(path, WEIGHT)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:40], whole.replace(b"(30, 48)", b"(90, 48)"), whole[:6] + b"\x09" + whole[7:]):
        path.write_bytes(broken)
        with pytest.raises(SourceError):
            read_matrix(path)
    path.write_bytes(whole[:6] + b"\x02\x00" + struct.pack("<I", 1 << 31) + whole[10:])
    with pytest.raises(UnsafeCheckpointError):
        read_matrix(path)
    np.savez(tmp_path / "name.npz", wé=WEIGHT)
    packed = (tmp_path / "name.npz").read_bytes()
    (tmp_path / "name.npz").write_bytes(packed.replace("w\u00e9".encode(), b"w\xff\xa4"))
    with pytest.raises(SourceError):
        read_matrix(tmp_path / "name.npz")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", whole[:128] + bytes(100_000_000))
    with pytest.raises(UnsafeCheckpointError):
        read_matrix(tmp_path / "bomb.npz")


def test_numbers_that_float32_cannot_hold_are_refused_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", WEIGHT.astype(np.float64) * 1e200)
    with pytest.raises(SourceError):
        read_matrix(tmp_path / "w.npy")
