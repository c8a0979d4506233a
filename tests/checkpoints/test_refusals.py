"""Refuse bad files: one message each, nothing is run, no memory is taken."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixify.checkpoints import open_source
from fixify.errors import SourceError, UnsafeCheckpointError

GOOD = OrderedDict(weight=torch.ones(4, 3), bias=torch.zeros(4))


def refused(path: Path, *, unsafe: bool = False) -> str:
    """Return the message and hint that refuse `path`, which are the same with and without reading the data."""
    said = []
    for meta in (False, True):
        with pytest.raises(SourceError) as caught:
            open_source(path, meta=meta)
        assert isinstance(caught.value, UnsafeCheckpointError) == unsafe, caught.value
        assert path.name in caught.value.message
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint(tmp_path: Path, payload: Any, legacy: bool) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": GOOD, "args": payload}, path, _use_new_zipfile_serialization=not legacy)
    said = refused(path, unsafe=True)
    assert f"{os.system.__module__}.system" in said


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_plain_pickle(tmp_path: Path, payload: Any, protocol: int) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(payload, protocol=protocol))
    assert "system" in refused(path, unsafe=True)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_code_behind_a_protocol_that_the_safe_reader_does_not_know(tmp_path: Path, payload: Any, protocol: int) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": GOOD, "args": payload}, path, pickle_protocol=protocol)
    assert "system" in refused(path, unsafe=True)


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__])
def test_builtins(tmp_path: Path, function: Any) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return function, ("1",)

    path = tmp_path / "evil.pth"
    torch.save({"state_dict": GOOD, "x": Call()}, path)
    assert f"builtins.{function.__name__}" in refused(path, unsafe=True)


def test_an_environment_variable_does_not_weaken_it(
    tmp_path: Path, payload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "evil.pth"
    torch.save({"x": payload}, path)
    refused(path, unsafe=True)


@pytest.mark.parametrize(
    ("mark", "who", "key"),
    [
        ({"pytorch-lightning_version": "2.5"}, "Lightning", "state_dict"),
        ({"meta": {"mmengine_version": "0.10"}}, "mmengine", "state_dict"),
        ({"ds_version": "0.14"}, "DeepSpeed", "module"),
    ],
)
def test_the_hint_fits_the_trainer(tmp_path: Path, payload: Any, mark: dict[str, Any], who: str, key: str) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({key: GOOD, "callbacks": payload, **mark}, path)
    said = refused(path, unsafe=True)
    assert who in said and f"['{key}']" in said


def test_a_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    said = refused(path, unsafe=True)
    assert "torch.nn.modules.container.Sequential" in said and "model.state_dict()" in said


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))
    said = refused(path)
    assert "TorchScript" in said and "state_dict()" in said


def test_an_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/models/model.json", "{}")
    assert "torch.export" in refused(path)


class OwnTensor(torch.Tensor):
    """A stand-in for DTensor and the classes of torchao, which torch allows once they are imported."""


def test_tensors_of_another_class(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"fc.weight": torch.ones(2).as_subclass(OwnTensor)}, path)
    assert "OwnTensor" in refused(path, unsafe=True)
    with torch.serialization.safe_globals([OwnTensor]):
        said = refused(path)
    assert "fc.weight" in said and "OwnTensor" in said and "full_state_dict=True" in said


def test_another_pickle_protocol(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(GOOD, path, pickle_protocol=4)
    assert "pickle_protocol" in refused(path)


@pytest.mark.parametrize(
    ("content", "expected", "advice"),
    [
        (b"", "0 bytes", "again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page", "link"),
        (b"  <html>\n<body>Sign in</body></html>", "web page", "link"),
        (b'{"error": "Invalid credentials"}', "JSON", "config.json"),
        ("Entry not found, désolé\n".encode(), "Entry not found", "link"),
        (b"\x1f\x8b\x08\x00" + bytes(60), "gzip", "gunzip"),
        (b"\xfd7zXZ\x00" + bytes(60), "xz", "xz -d"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5", "PyTorch"),
        (b"GGUF" + bytes(60), "GGUF", "PyTorch"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "PNG", "predict"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, expected: str, advice: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    said = refused(path)
    assert expected in said and advice in said


@pytest.mark.parametrize(
    "content",
    [bytes(100), b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"PK\x03\x04" + bytes(60), b"(lp0\n"],
    ids=["zeros", "legacy magic number", "zip magic number", "pickle of protocol 0"],
)
def test_beginnings_of_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    refused(path)


def test_truncated(tmp_path: Path) -> None:
    whole = tmp_path / "w.pth"
    torch.save({"w": torch.ones(1000)}, whole)
    for legacy in (False, True):
        torch.save({"w": torch.ones(1000)}, whole, _use_new_zipfile_serialization=not legacy)
        content = whole.read_bytes()
        path = tmp_path / "short.pth"
        path.write_bytes(content[: len(content) // 2])
        refused(path)


def test_tar(tmp_path: Path) -> None:
    path = tmp_path / "w.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    said = refused(path)
    assert "tar -xf w.tar" in said


def test_numpy(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.ones(3))
    assert ".npz" in refused(tmp_path / "w.npz")
    np.save(tmp_path / "w.npy", np.ones(3))
    assert "NumPy" in refused(tmp_path / "w.npy")


def test_another_zip(tmp_path: Path) -> None:
    path = tmp_path / "w.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.pth", b"1")
    refused(path)


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(50_000_000))
        archive.writestr("bomb/data/0", bytes(1000))
    assert path.stat().st_size < 100_000
    said = refused(path, unsafe=True)
    assert "50000000" in said and "data.pkl" in said


def test_a_zip_whose_entries_overlap(tmp_path: Path) -> None:
    """Entries of the directory point at the same bytes, so they claim more than the file holds."""
    path = tmp_path / "w.pth"
    torch.save({"w": torch.ones(10_000)}, path)
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", content[end + 16 : end + 20])[0]
    (count,) = struct.unpack("<H", content[end + 10 : end + 12])
    directory = content[start:end]
    if b"PK\x06\x06" in directory:
        directory = directory[: directory.index(b"PK\x06\x06")]
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2 * count, 2 * count, 2 * len(directory), start, 0)
    path.write_bytes(content[:start] + 2 * directory + tail)
    assert "data.pkl" in refused(path, unsafe=True)


def test_a_view_that_repeats_one_value_into_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.ones(1).expand(1 << 40)}, path)
    assert path.stat().st_size < 10_000
    assert str(1 << 42) in refused(path, unsafe=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_larger_than_its_storage(tmp_path: Path, legacy: bool) -> None:
    class Oversized:
        def __reduce__(self) -> Any:
            storage = torch.ones(4)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1 << 38,), (1,), False, OrderedDict())

    path = tmp_path / "w.pth"
    torch.save({"w": Oversized()}, path, _use_new_zipfile_serialization=not legacy)
    refused(path)


def test_a_tensor_class_called_with_a_size(tmp_path: Path) -> None:
    """torch's safe reader allows `torch.FloatTensor(n)`, which takes memory that is not in the file."""

    class Sized:
        def __reduce__(self) -> Any:
            return torch.FloatTensor, (1 << 28,)

    path = tmp_path / "w.pth"
    torch.save({"w": Sized()}, path)
    assert str(1 << 30) in refused(path, unsafe=True)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_tensors_that_mean_nothing_alone(tmp_path: Path, tensor: torch.Tensor, expected: str) -> None:
    path = tmp_path / "w.pth"
    torch.save(GOOD | {"odd.weight": tensor}, path)
    said = refused(path)
    assert expected in said and "odd.weight" in said


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_quantised_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, path)
    assert "qint8" in refused(path)


def test_tensors_of_the_meta_device(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(torch.nn.Linear(2, 2, device="meta").state_dict(), path)
    assert "weight" in refused(path)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, "empty"),
        ({"epoch": 3, "optimizer": {}}, "epoch, optimizer"),
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({"state_dict": {}}, "state_dict"),
        ({1: torch.ones(2)}, "dictionary"),
    ],
)
def test_no_weights(tmp_path: Path, tree: Any, expected: str) -> None:
    path = tmp_path / "w.pth"
    torch.save(tree, path)
    said = refused(path)
    assert expected in said and "state_dict" in said


def test_only_things_that_are_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"n_averaged": torch.tensor(1)}, path)
    refused(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(GOOD, path)
    path.chmod(0)
    assert "Permission denied" in refused(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth")
