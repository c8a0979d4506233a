"""What a file may say, how large it may be, and that it stays the same: checked once, when it is read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fixify
from fixify.checkpoints import open_source
from fixify.checkpoints import slim as slim_module
from fixify.checkpoints.header import DIGEST_KEY, SlimInfo, has_metadata
from fixify.checkpoints.labels import read_class_indices, read_class_map
from fixify.checkpoints.open import open_model
from fixify.checkpoints.slim import digest_of, load, read_info, write_slim
from fixify.checkpoints.verify import verify
from fixify.errors import (
    ArchitectureError,
    FixifyError,
    FormatError,
    OutputExistsError,
    SourceError,
    UnsafeCheckpointError,
    UsageError,
)
from fixify.models.architectures import Architecture, build, parse_architecture, preprocessing
from fixify.models.build import Bounds


@pytest.fixture(scope="module")
def slim(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("door") / "net.fixed.safetensors"
    return fixify.convert(tiny / "learned.pth", out).path


def _rewritten(slim: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a slim file whose header was changed by hand."""
    with safe_open(slim, framework="pt") as file:
        metadata = file.metadata()
    info = json.loads(metadata["fixify"])
    change(info)
    save_file(load_file(slim), out, metadata={**metadata, "fixify": json.dumps(info)})
    return out


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(info: Any) -> None:
        for key in path[:-1]:
            info = info[key]
        info[path[-1]] = to

    return change


# What a header says.

_DEEP: list[Any] = []
for _ in range(300):
    _DEEP = [_DEEP]

_BAD_HEADERS = {
    "nan": _set("savings", "removed_share", to=float("nan")),
    "infinity": _set("training", to={"after": {"val_top1": float("inf")}}),
    "a number as long as a book": _set("source", "bytes", to=10**4000),
    "a number of 30 digits": _set("source", "bytes", to=10**30),
    "deep": _set("training", to={"x": _DEEP}),
    "text": _set("architecture", "kwargs", to={"text": "resnet18"}),
    "model_name": _set("architecture", "kwargs", to={"model_name": "resnet18"}),
    "pretrained": _set("architecture", "kwargs", to={"pretrained": True}),
    "an argument that is no name": _set("architecture", "kwargs", to={"a b": 1}),
    "many arguments": _set("architecture", "kwargs", to={f"a{number}": 1 for number in range(1000)}),
    "a long argument": _set("architecture", "kwargs", to={"act_layer": "x" * 100_000}),
    "arguments as a list": _set("architecture", "kwargs", to=[1]),
    "no architecture": _set("architecture", to=None),
    "a long architecture": _set("architecture", "name", to="x" * 1_000_000),
    "no heads": _set("heads", to=[]),
    "heads null": _set("heads", to=None),
    "a number of heads": _set("heads", to=3),
    "std zero": _set("preprocessing", "std", to=[0.0, 0.0, 0.0]),
    "std negative": _set("preprocessing", "std", to=[-1.0, 1.0, 1.0]),
    "mean of words": _set("preprocessing", "mean", to=["a", "b", "c"]),
    "mean null": _set("preprocessing", "mean", to=None),
    "no mean": _set("preprocessing", "mean", to=[]),
    "size of words": _set("preprocessing", "input_size", to=["3", "32", "32"]),
    "size zero": _set("preprocessing", "input_size", to=[3, 0, 32]),
    "size of flags": _set("preprocessing", "input_size", to=[True, 32, 32]),
    "size of two": _set("preprocessing", "input_size", to=[32, 32]),
    "size huge": _set("preprocessing", "input_size", to=[3, 16384, 16384]),
    "interpolation": _set("preprocessing", "interpolation", to="magic"),
    "crop mode": _set("preprocessing", "crop_mode", to="magic"),
    "crop zero": _set("preprocessing", "crop_pct", to=0),
    "crop text": _set("preprocessing", "crop_pct", to="1"),
    "few labels": _set("labels", to=["a"]),
    "many labels": _set("labels", to=["a"] * 5),
    "labels of numbers": _set("labels", to=[1, 2, 3, 4]),
    "half a character": _set("labels", to=["a", "b", "c", "\ud800"]),
    "savings zero": _set("savings", "parameters_before", to=0),
    "savings text": _set("savings", "removed", to="1"),
    "savings missing": _set("savings", to={"removed": 1}),
    "source of numbers": _set("source", "name", to=3),
    "source without digits": _set("source", "sha256", to="xyz"),
    "calibration": _set("calibration", to={"data": 3}),
    "training of numbers": _set("training", to={"class_names": [1, 2]}),
    "training of lists": _set("training", to={"before": [1]}),
    "dtype": _set("dtype", to="float8"),
}


@pytest.mark.parametrize("name", _BAD_HEADERS)
def test_bad_headers_are_refused(slim: Path, tmp_path: Path, name: str) -> None:
    path = _rewritten(slim, tmp_path / "bad.safetensors", _BAD_HEADERS[name])
    with pytest.raises(FixifyError) as caught:
        load(path)
    assert len(str(caught.value)) < 2000
    with contextlib.suppress(FixifyError):  # too damaged to be checked
        assert not all(check.passed for check in verify(path))


def test_repeated_heads_are_refused(slim: Path, tmp_path: Path) -> None:
    for times in (2, 100_000):
        path = _rewritten(
            slim, tmp_path / "bad.safetensors", lambda info, n=times: info.update(heads=info["heads"] * n)
        )
        with pytest.raises(FormatError, match="heads"):
            read_info(path)


def test_headers_of_older_versions_are_read(slim: Path, tmp_path: Path) -> None:
    for change in (_set("labels", to=None), _set("training", to={"data": "x", "new": [1, {"a": None}]})):
        info = read_info(_rewritten(slim, tmp_path / "old.safetensors", change))
        assert info.num_classes == 4
    del_all = _rewritten(
        slim, tmp_path / "old.safetensors", lambda info: [info.pop(key) for key in ("savings", "source", "calibration")]
    )
    assert load(del_all).fixify_info.savings == {}


def test_what_a_reader_refuses_is_not_written(slim: Path, tmp_path: Path) -> None:
    info = read_info(slim).model_copy(update={"labels": ["a"]})
    with pytest.raises(UsageError, match="labels"):
        write_slim(tmp_path / "a.fixed.safetensors", load_file(slim), info)
    assert not list(tmp_path.iterdir())


def test_an_input_that_cannot_be_run_fails_the_check(slim: Path, tmp_path: Path) -> None:
    path = _rewritten(slim, tmp_path / "bad.safetensors", _set("preprocessing", "input_size", to=[5, 32, 32]))
    assert [check.name for check in verify(path) if not check.passed] == ["forward"]


# Sizes.


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"depth": 10**9}),
        ("vit_tiny_patch16_224", {"depth": 60_000}),
        ("vit_tiny_patch16_224", {"img_size": 20_000, "patch_size": 1}),
        ("vit_tiny_patch16_224", {"patch_size": 0}),
        ("vit_tiny_patch16_224", {"num_heads": 0}),
        ("vit_tiny_patch16_224", {"global_pool": "magic"}),
        ("swin_tiny_patch4_window7_224", {"img_size": 16_000}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 60_000}),
        ("resnet18", {"layers": [60_000, 60_000, 1, 1]}),
        ("resnet18", {"layers": [1] * 100_000}),
        ("resnet18", {"block": "none"}),
        ("resnet18", {"stem_width": float("nan")}),
        ("convnext_tiny", {"depths": []}),
        ("mixer_b16_224", {"img_size": "large"}),
        ("regnetx_002", {"w0": 0}),
        ("mlp", {}),
    ],
)
def test_absurd_networks_are_refused(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError):
        architecture = Architecture.from_dict({"library": "timm", "name": name, "tag": None, "kwargs": kwargs})
        preprocessing(architecture)
        build(architecture, num_classes=10, blank=True, within=Bounds(2_000, 200_000_000))


def test_a_network_is_bounded_by_the_file(slim: Path, tmp_path: Path) -> None:
    for name, kwargs in (
        ("vit_giant_patch14_224", {}),
        ("vit_tiny_patch16_224", {"depth": 5_000}),
        ("test_vit", {"embed_dim": 16_384}),
        ("swin_base_patch4_window7_224", {"img_size": 8_000}),
    ):
        path = _rewritten(
            slim,
            tmp_path / "bad.safetensors",
            _set("architecture", to={"library": "timm", "name": name, "tag": None, "kwargs": kwargs}),
        )
        with pytest.raises(ArchitectureError, match="more than"):
            load(path)


def test_bounds_are_removed_after_a_build() -> None:
    with pytest.raises(ArchitectureError, match="modules"):
        build(parse_architecture("test_vit"), within=Bounds(3, 10**9), meta=True)
    with pytest.raises(ArchitectureError, match="parameters"):
        build(parse_architecture("test_vit"), within=Bounds(10**6, 3), meta=True)
    torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(5)))
    assert build(parse_architecture("test_vit,img_size=1280"), blank=True) is not None


@pytest.mark.parametrize(
    "text", ["test_vit,a=" + "[" * 5000, "test_vit,a=" + "9" * 5000, "test_vit,a=NaN", "x" * 10**6]
)
def test_spelled_arguments_are_bounded(text: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        build(parse_architecture(text), meta=True)
    assert len(str(caught.value)) < 20_000


# Files that are no files.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX's")
def test_pipes_devices_and_folders_are_refused(tiny: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    named = tmp_path / "model.safetensors"
    os.mkfifo(named)
    for path, what in (
        (pipe, "named pipe"),
        (named, "named pipe"),
        (Path("/dev/null"), "device"),
        (tmp_path, "folder"),
    ):
        assert not has_metadata(path, "fixify")
        for read in (read_info, verify, load, fixify.inspect):
            with pytest.raises(FormatError, match=what):
                read(path)
        if path != tmp_path:
            for open_it in (fixify.identify, fixify.plan, open_model, fixify.convert):
                with pytest.raises(SourceError, match=what):
                    open_it(path)
        for read_names in (read_class_map, read_class_indices):
            with pytest.raises(SourceError, match=what):
                read_names(path)
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "sub" / "config.json")
    (tmp_path / "sub" / "model.safetensors").write_bytes((tiny / "learned.pth").read_bytes())
    with pytest.raises(SourceError, match="named pipe"):
        open_source(tmp_path / "sub")


# Digests and checksums.


def _flipped(path: Path, out: Path, place: int, bit: int) -> Path:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    out.write_bytes(content)
    return out


def test_a_flipped_bit_in_the_weights_is_noticed(slim: Path, tmp_path: Path) -> None:
    content = slim.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    places = torch.randint(start, len(content), (40,), generator=torch.Generator().manual_seed(0)).tolist()
    for number, place in enumerate([start, len(content) - 1, *places]):
        path = _flipped(slim, tmp_path / "flipped.safetensors", place, number % 8)
        assert "digest" in {check.name for check in verify(path) if not check.passed}
        with pytest.raises(FormatError, match="digest"):
            load(path, check=True)
        with pytest.raises((FormatError, SourceError)):  # what the commands do
            open_model(path)


def test_the_digest_covers_names_types_and_shapes() -> None:
    tensors = {"a": torch.zeros(4), "b": torch.zeros(2, 2)}
    others = [
        {"a": torch.zeros(4), "c": torch.zeros(2, 2)},
        {"a": torch.zeros(4), "b": torch.zeros(4)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.zeros(2, 2)},
        {"a": torch.zeros(4), "b": torch.tensor([[0.0, 0.0], [0.0, -0.0]])},
    ]
    assert len({digest_of(each) for each in (tensors, *others)}) == 5
    assert digest_of(tensors) == digest_of(dict(reversed(tensors.items())))
    for tensor in (torch.zeros(()), torch.zeros(0, 3), torch.ones(3).bool(), torch.ones(2, 2).bfloat16().t()):
        assert digest_of({"a": tensor}).startswith("sha256:")


def test_files_without_digest_say_so() -> None:
    golden = Path(__file__).parents[1] / "golden" / "v1.fixed.safetensors"
    load(golden, check=True)
    (check,) = [check for check in verify(golden) if check.name == "digest"]
    assert check.passed and "none" in check.detail


def test_a_damaged_digest_is_refused(slim: Path, tmp_path: Path) -> None:
    with safe_open(slim, framework="pt") as file:
        save_file(load_file(slim), tmp_path / "a.safetensors", metadata={**file.metadata(), DIGEST_KEY: "\x1b[2J"})
    with pytest.raises(FormatError, match="digest"):
        read_info(tmp_path / "a.safetensors")


def test_a_flipped_bit_in_an_archive_is_noticed(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "learned.pth"
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/data" in entry.filename and entry.file_size > 100]
    content = path.read_bytes()
    for number, entry in enumerate(entries[:30]):
        place = content.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
        place += int.from_bytes(content[entry.header_offset + 28 : entry.header_offset + 30], "little")
        flipped = _flipped(path, tmp_path / "flipped.pth", place + number % entry.file_size, number % 8)
        with pytest.raises(SourceError, match="damaged"):
            open_source(flipped)


def test_an_archive_without_checksums_is_read(tiny: Path, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"conv.weight": torch.arange(12.0).view(3, 4)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert open_source(tmp_path / "a.pth").tensors["conv.weight"].sum() == 66


# Two at once.


def test_only_one_of_several_writers_succeeds(slim: Path, tmp_path: Path) -> None:
    info, tensors = read_info(slim), load_file(slim)
    barrier = threading.Barrier(8)
    outcomes: list[str] = []

    def write(number: int) -> None:
        mine = info.model_copy(update={"labels": [f"{number}"] * 4})
        barrier.wait()
        try:
            write_slim(tmp_path / "out.fixed.safetensors", tensors, mine)
            outcomes.append(f"{number}")
        except OutputExistsError:
            outcomes.append("exists")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("exists") == 7
    (winner,) = set(outcomes) - {"exists"}
    assert read_info(tmp_path / "out.fixed.safetensors").labels == [winner] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.fixed.safetensors"]


@pytest.mark.parametrize("change", ["replaced", "longer", "removed"])
def test_an_input_that_changes_while_it_is_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from fixify import _files

    path = tmp_path / "a.pth"
    path.write_bytes((tiny / "learned.pth").read_bytes())
    hashed = _files.sha256_of

    def meanwhile(given: Path) -> str:
        if change == "replaced":
            other = tmp_path / "b"
            other.write_bytes(path.read_bytes())
            other.replace(path)
        elif change == "longer":
            with open(path, "ab") as file:
                file.write(b"x")
        digest = hashed(given)
        if change == "removed":
            path.unlink()
        return digest

    monkeypatch.setattr(_files, "sha256_of", meanwhile)
    with pytest.raises(SourceError, match="changed"):
        open_source(path)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_was_read_stays_when_the_file_is_cut_off(tmp_path: Path, name: str) -> None:
    path, tensors = tmp_path / name, {"conv.weight": torch.arange(100_000.0).view(100, 1000)}
    save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    source = open_source(path)
    os.truncate(path, 10)
    assert torch.equal(source.tensors["conv.weight"], tensors["conv.weight"])


def test_a_slim_file_that_is_cut_off_while_it_is_loaded(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.fixed.safetensors"
    shutil.copy(slim, path)
    size = path.stat().st_size

    def cut(*given: Any) -> Any:
        os.truncate(path, size // 2)
        return build(*given)

    build = slim_module._build
    monkeypatch.setattr(slim_module, "_build", cut)
    with pytest.raises(FormatError, match="changed while it was read"):
        load(path)


def test_header_and_tensors_are_of_the_same_file(slim: Path, tmp_path: Path) -> None:
    """A writer that replaces the file all the time is noticed or not, but nobody gets a mixed file."""
    path, info, tensors = tmp_path / "a.fixed.safetensors", read_info(slim), load_file(slim)
    key = next(iter(tensors))
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            changed = {**tensors, key: torch.full_like(tensors[key], number)}
            write_slim(path, changed, info.model_copy(update={"labels": [str(number)] * 4}), force=True)

    write_slim(path, {**tensors, key: torch.zeros_like(tensors[key])}, info.model_copy(update={"labels": ["0"] * 4}))
    thread = threading.Thread(target=write)
    thread.start()
    read = 0
    try:
        for _ in range(40):
            try:
                model = load(path, check=True)
            except FormatError as error:
                assert "changed" in error.message
                continue
            read += 1
            assert float(model.state_dict()[key].flatten()[0]) == float(model.fixify_info.labels[0])
    finally:
        stop.set()
        thread.join()
    assert isinstance(read_info(path), SlimInfo)


# Pickles and archives that keep the reader busy.


def _nested_key(depth: int) -> bytes:
    doubled = b"".join(b"q" + bytes([place]) + b"h" + bytes([place]) + b"\x86" for place in range(depth))
    return b"\x80\x02})" + doubled + b"K\x01s."


@pytest.mark.parametrize("container", ["legacy", "zip"])
def test_a_key_that_holds_itself_again_and_again(tmp_path: Path, container: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(_nested_key(150))
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", _nested_key(150))
            archive.writestr("a/version", "3\n")
    with pytest.raises(UnsafeCheckpointError, match="tuple"):
        open_source(path)


@pytest.mark.parametrize("use_zip", [True, False])
def test_ordinary_tuples_are_read(tmp_path: Path, use_zip: bool) -> None:
    shared = tuple(range(500))
    tree = {
        "state_dict": {"a.weight": torch.ones(2, 2)},
        "betas": (0.9, (1, (2, (3,)))),
        "x": [shared] * 100,
        (1, 2): 3,
    }
    torch.save(tree, tmp_path / "a.pth", _use_new_zipfile_serialization=use_zip)
    assert list(open_source(tmp_path / "a.pth").tensors) == ["a.weight"]


def test_an_archive_of_many_entries(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        for number in range(50_001):
            archive.writestr(f"a/data/{number}", b"")
    with pytest.raises(UnsafeCheckpointError, match="50,002"):
        open_source(tmp_path / "a.pth")


@pytest.mark.parametrize("use_zip", [True, False])
@pytest.mark.parametrize("inner", [{1: torch.ones(2, 2)}, {"model": {1: torch.ones(2)}}, {(1, 2): torch.ones(2, 2)}])
def test_tensors_without_names(tmp_path: Path, inner: dict[Any, Any], use_zip: bool) -> None:
    torch.save({"state_dict": inner}, tmp_path / "a.pth", _use_new_zipfile_serialization=use_zip)
    with pytest.raises(SourceError, match="no weights"):
        open_source(tmp_path / "a.pth")


# Class maps.


@pytest.mark.parametrize(
    "text", ["a" + " " * 60_000 + "b", "0" + " ," * 60_000 + "x", " x" * 30_000 + "\n 1", "1 " + "1 " * 50_000]
)
def test_long_lines_of_a_class_map(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.txt").write_text(text)
    assert read_class_map(tmp_path / "map.txt")
    assert read_class_indices(tmp_path / "map.txt")


def test_other_digits_belong_to_the_name(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("cat \u0661\ndog \u0660\nbird \u00b2\n")
    assert read_class_indices(tmp_path / "map.txt") == {"cat \u0661": 0, "dog \u0660": 1, "bird \u00b2": 2}


@pytest.mark.parametrize(
    "text",
    ["[" * 1000, "!!bool x: 1", "- !!bool x", "- !!timestamp x", "- !!int x", "!!float {}", "? [a]\n: 1", "!!set {a}"],
)
def test_yaml_that_is_no_class_map(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    for read in (read_class_map, read_class_indices):
        with pytest.raises(SourceError):
            read(tmp_path / "map.yaml")
