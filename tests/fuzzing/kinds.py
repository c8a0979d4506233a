"""The kinds of inputs: how a valid file of each is changed, and what reads it."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

import fixify
from fixify.checkpoints import open_source
from fixify.checkpoints.files import LANGUAGE_KEY
from fixify.checkpoints.labels import read_class_indices, read_class_map
from fixify.checkpoints.matrix import is_matrix, read_matrix
from fixify.checkpoints.open import open_model
from fixify.checkpoints.slim import load, read_info
from fixify.checkpoints.verify import verify
from fixify.data.decoding import convert_mode, decode, remarks_on
from fixify.language.checkpoint import load_language, read_language_info, verify_language
from fixify.language.run import is_language_run, read_language_runs
from fixify.recipes import read_recipe
from fixify.reporting.page import write_page
from fixify.reporting.run_report import report_runs
from fixify.reporting.runs import read_runs
from fixify.reporting.tables import language_table, runs_table
from fixify.savings import Savings
from fixify.training.run_folder import write_sealed
from fuzzing.mutations import damaged, json_bytes, mutated
from fuzzing.seeds import Seeds


@dataclass(frozen=True)
class Kind:
    """One kind of inputs.

    Attributes:
        name: Its name.
        share: How many of 1,000 inputs are of this kind.
        make: Writes an input into a folder.
        read: Reads it in every way that a command would.
    """

    name: str
    share: int
    make: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]


def all_kinds(seeds: Seeds) -> dict[str, Kind]:
    """Return the kinds by name."""
    found = (
        Kind("slim-header", 90, _slim_header(seeds.slim), _read_slim),
        Kind("bare-header", 20, _slim_header(seeds.bare), _read_slim),
        Kind("slim-bytes", 70, _slim_bytes(seeds), _read_slim_bytes),
        Kind("safetensors", 100, _safetensors(seeds), _read_checkpoint),
        Kind("zip", 60, _zip(seeds), _read_checkpoint),
        Kind("pickle", 100, _pickle(seeds), _read_checkpoint),
        Kind("legacy", 70, _legacy(seeds), _read_checkpoint),
        Kind("matrix", 40, _matrix(seeds), _read_matrix),
        Kind("hub", 80, _hub(seeds), _read_hub),
        Kind("model", 20, _model(seeds), _read_model),
        Kind("classes", 90, _classes(seeds), _read_classes),
        Kind("recipe", 60, _recipe(seeds), _read_recipe),
        Kind("run", 30, _run(seeds), _read_run),
        Kind("language-run", 30, _language_run(seeds), _read_language_run),
        Kind("state", 10, _state(seeds), seeds.resume),
        Kind("language-state", 10, _language_state(seeds), seeds.resume_language),
        Kind("language", 40, _language(seeds), _read_language),
        Kind("image", 80, _image(seeds), _read_images),
    )
    return {kind.name: kind for kind in found}


def as_safetensors(header: bytes, body: bytes) -> bytes:
    """Put a header and the bytes of tensors together."""
    return struct.pack("<Q", len(header)) + header + body


def parts_of(content: bytes) -> tuple[Any, bytes]:
    """Return the header of a safetensors file, and the bytes of its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


# Slim checkpoints.


def _slim_header(content: bytes) -> Callable[[random.Random, Path], None]:
    header, body = parts_of(content)

    def make(rng: random.Random, folder: Path) -> None:
        text = json_bytes(json.loads(header["__metadata__"]["fixify"]), rng).decode("utf-8", "replace")
        metadata = {**header["__metadata__"], "fixify": text}
        if rng.random() < 0.05:
            metadata = mutated(metadata, rng)
        whole = json.dumps({**header, "__metadata__": metadata}).encode()
        (folder / "a.fixed.safetensors").write_bytes(as_safetensors(whole, body))

    return make


def _read_slim(folder: Path) -> None:
    path = folder / "a.fixed.safetensors"
    info = read_info(path)
    if info.savings:
        Savings.from_dict(info.savings)
    json.dumps(info.model_dump(), allow_nan=False).encode()
    fixify.inspect(path)
    if max(info.preprocessing.get("input_size", [224])) <= 256:
        verify(path)
    load(path)


def _slim_bytes(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    def make(rng: random.Random, folder: Path) -> None:
        end = rng.choice((100, 3000, 20_000, len(seeds.slim)))
        content = damaged(seeds.slim[:end], rng) + seeds.slim[end:]
        (folder / "a.fixed.safetensors").write_bytes(content)

    return make


def _read_all(path: Path, readers: Iterable[Callable[[Path], object]]) -> None:
    """Try every reader; one that refuses keeps none of the others from being tried."""
    first: Exception | None = None
    for read in readers:
        try:
            read(path)
        except fixify.errors.FixifyError as error:
            first = first or error
    if first is not None:
        raise first


def _read_slim_bytes(folder: Path) -> None:
    path = folder / "a.fixed.safetensors"
    _read_all(path, (load, open_model, open_source, verify))


# Ordinary checkpoints.


def _safetensors(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    header, body = parts_of(seeds.weights)

    def make(rng: random.Random, folder: Path) -> None:
        how = rng.random()
        if how < 0.3:
            content = damaged(seeds.weights, rng)
        elif how < 0.6:
            content = as_safetensors(json_bytes(header, rng), body)
        else:  # what the file says of itself: JSON inside of strings
            facts = mutated(seeds.facts, rng)
            metadata = {
                key: json_bytes(value, rng).decode("utf-8", "replace")
                if isinstance(value, (dict, list))
                else str(value)[:100_000]
                for key, value in facts.items()
            }
            text = json.dumps({**header, "__metadata__": metadata}).encode("utf-8", "replace")
            content = as_safetensors(text, body)
        _write_checkpoint(folder, content, rng)

    return make


def _zip(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    def make(rng: random.Random, folder: Path) -> None:
        _write_checkpoint(folder, damaged(rng.choice(seeds.zips), rng), rng)

    return make


def _legacy(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    def make(rng: random.Random, folder: Path) -> None:
        content = rng.choice(seeds.legacy)
        end = 2000 if rng.random() < 0.5 else len(content)  # the tree, not the tensors behind it
        content = damaged(content[:end], rng) + content[end:]
        _write_checkpoint(folder, content, rng)

    return make


def _pickle(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    """Change the pickle inside of an archive whose checksums are right: its bytes, its operations, or what it holds."""

    def make(rng: random.Random, folder: Path) -> None:
        archive = rng.choice(seeds.zips)
        how = rng.random()
        if how < 0.3:
            content = rezipped(archive, damaged(pickle_of(archive), rng))
        elif how < 0.6:
            content = rezipped(archive, _other_operations(pickle_of(archive), rng))
        else:
            tree = _changed_tree(seeds.tree, rng)
            buffer = io.BytesIO()
            try:
                torch.save(tree, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
            except (RecursionError, UnicodeEncodeError):  # no pickle can hold it
                buffer = io.BytesIO(archive)
            content = buffer.getvalue()
        _write_checkpoint(folder, content, rng)

    return make


def pickle_of(archive: bytes) -> bytes:
    """Return the pickle inside of a zip checkpoint."""
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        return entries.read(next(name for name in entries.namelist() if name.endswith("data.pkl")))


def rezipped(archive: bytes, content: bytes) -> bytes:
    """Put another pickle into a zip checkpoint, with the checksum that belongs to it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


_OPERATIONS = tuple(operation.code.encode("latin-1") for operation in pickletools.opcodes)
_STRINGS = (
    b"X\x04\x00\x00\x00text",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"\x8a\xff" + b"\x7f" * 255,
    b"(" * 300,
    b"\x85" * 300,
    b"q\x01h\x01h\x01\x86" * 60,
    b"J\xff\xff\xff\x7f",
)


def _other_operations(content: bytes, rng: random.Random) -> bytes:
    """Remove, repeat, replace and insert whole operations of a pickle."""
    found = [place for _, _, place in pickletools.genops(content) if place is not None]
    pieces = [content[start:end] for start, end in zip(found, [*found[1:], len(content)], strict=True)]
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(pieces))
        how = rng.choice(("remove", "repeat", "move", "operation", "string"))
        if how == "remove":
            pieces[place : place + rng.randint(1, 3)] = []
        elif how == "repeat":
            pieces[place:place] = pieces[place : place + rng.randint(1, 8)] * rng.choice((1, 2, 1000))
        elif how == "move":
            pieces[place:place] = [rng.choice(pieces)]
        else:
            pieces[place:place] = [rng.choice(_OPERATIONS if how == "operation" else _STRINGS)]
        if not pieces:
            break
    return b"".join(pieces)


def _changed_tree(tree: Any, rng: random.Random) -> Any:
    odd = (
        None,
        True,
        -1,
        0,
        2.5,
        10**30,
        float("nan"),
        "x",
        "9" * 5000,
        "\x1b[2J",
        b"bytes",
        [],
        [[]],
        {},
        {"a": 1},
        (),
        {1: 2},
        torch.zeros(2),
        torch.zeros(0),
        torch.zeros(()),
        torch.ones(3, 3),
        torch.zeros(2, dtype=torch.complex64),
        {1: torch.zeros(2)},
        torch.zeros(1).expand(10**9),
        torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (3,)),
        torch.zeros(2, 2, dtype=torch.int8),
        torch.full((2, 2), float("nan")),
        torch.empty(10**6, 10**6, device="meta"),
        torch.nn.Parameter(torch.zeros(2)),
        torch.zeros(2, 0, 3),
        torch.float32,
        torch.Size([1, 2]),
        torch.device("cpu"),
    )
    tree = mutated(tree, rng, odd)
    if rng.random() < 0.2:
        tree = {rng.choice(("module", "model", "state_dict", "ema", 1, ("a",), "\x1b")): tree}
    return tree


def _write_checkpoint(folder: Path, content: bytes, rng: random.Random) -> None:
    (folder / "options.json").write_text(json.dumps({"meta": rng.random() < 0.5, "ema": rng.random() < 0.3}))
    (folder / "c.pth").write_bytes(content)


def _read_checkpoint(folder: Path) -> None:
    source = open_source(folder / "c.pth", **json.loads((folder / "options.json").read_text()))
    for tensor in source.tensors.values():
        if not tensor.is_meta:
            tensor.sum()


def _hub(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    def make(rng: random.Random, folder: Path) -> None:
        inner = folder / "hub"
        inner.mkdir(exist_ok=True)
        (inner / "a.safetensors").write_bytes(seeds.weights)
        is_config = rng.random() < 0.5
        (inner / "model.safetensors.index.json").write_bytes(
            json.dumps(seeds.index).encode() if is_config else json_bytes(seeds.index, rng)
        )
        (inner / "config.json").write_bytes(
            json_bytes(rng.choice(seeds.configs), rng) if is_config else json.dumps(seeds.configs[0]).encode()
        )

    return make


def _read_hub(folder: Path) -> None:
    source = open_source(folder / "hub", meta=True)
    json.dumps([source.facts.pretrained_cfg, source.facts.architecture_kwargs], allow_nan=False)


def _matrix(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    """A classifier without a network: an array alone, two in an archive, and the tensors of a safetensors file."""

    def make(rng: random.Random, folder: Path) -> None:
        for old in folder.glob("m.*"):
            old.unlink()
        suffix = rng.choice(("npy", "npy", "npz", "safetensors"))
        if suffix == "npy":
            content = damaged(rng.choice(seeds.arrays), rng)
        elif suffix == "safetensors":
            header, body = parts_of(seeds.matrix)
            content = as_safetensors(json_bytes(header, rng), body)
        else:
            archive = io.BytesIO()
            with zipfile.ZipFile(archive, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as packed:
                for name in ("weight", "bias"):
                    array = rng.choice(seeds.arrays)
                    packed.writestr(f"{name}.npy", damaged(array, rng) if rng.random() < 0.7 else array)
            content = archive.getvalue()
            content = damaged(content, rng) if rng.random() < 0.5 else content
        (folder / f"m.{suffix}").write_bytes(content)

    return make


def _read_matrix(folder: Path) -> None:
    (path,) = folder.glob("m.*")
    _read_all(path, (is_matrix, read_matrix))


def _model(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    """A whole network and what its file says of it: which architecture, which arguments, which classes."""

    def make(rng: random.Random, folder: Path) -> None:
        inner = folder / "net"
        inner.mkdir(exist_ok=True)
        (inner / "model.safetensors").write_bytes(seeds.network)
        (inner / "config.json").write_bytes(json_bytes(seeds.configs[0], rng))

    return make


def _read_model(folder: Path) -> None:
    open_model(folder / "net")


# Texts.


def _classes(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    def make(rng: random.Random, folder: Path) -> None:
        for old in folder.glob("map.*"):
            old.unlink()
        suffix, content = rng.choice(seeds.maps)
        content = content * rng.choice((1, 1, 1, 30, 300))
        if suffix == "json" and rng.random() < 0.5:
            content = json_bytes(json.loads(rng.choice([text for kind, text in seeds.maps if kind == "json"])), rng)
        else:
            content = damaged(content, rng)
        (folder / f"map.{suffix}").write_bytes(content)

    return make


def _read_classes(folder: Path) -> None:
    (path,) = folder.glob("map.*")
    _read_all(path, (read_class_map, read_class_indices))


def _recipe(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    def make(rng: random.Random, folder: Path) -> None:
        path = folder / "recipe.yaml"
        if rng.random() < 0.5:
            path.write_bytes(json_bytes(rng.choice(seeds.recipe_values), rng))  # JSON is YAML
        else:
            path.write_bytes(damaged(rng.choice(seeds.recipes), rng))

    return make


def _read_recipe(folder: Path) -> None:
    recipe = read_recipe(folder / "recipe.yaml")
    assert recipe.sections


# Folders of runs.


def _run(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    return lambda rng, folder: _change_one(seeds.runs, rng, folder / "runs")


def _language_run(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    return lambda rng, folder: _change_one(seeds.language_run, rng, folder / "language")


def _change_one(files: dict[str, bytes], rng: random.Random, folder: Path) -> None:
    """Write files, one of them changed: JSON, lines of JSON, or bytes."""
    chosen = rng.choice(sorted(files))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == chosen:
            content = _changed_lines(content, rng) if name.endswith(".jsonl") else json_bytes(json.loads(content), rng)
        path.write_bytes(content)


def _changed_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    if rng.random() < 0.3:
        return damaged(content, rng)
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(lines))
        lines[place] = json_bytes(json.loads(content.splitlines()[place]), rng)
    return b"\n".join(lines * rng.choice((1, 1, 1, 20)))


def _read_run(folder: Path) -> None:
    runs = sorted((folder / "runs").iterdir())
    assert not any(map(is_language_run, runs))
    report = report_runs(read_runs(runs))
    write_page(report)
    json.dumps(report.to_dict(), allow_nan=False).encode()
    Console(file=io.StringIO(), width=120).print(runs_table(report))


def _read_language_run(folder: Path) -> None:
    runs = read_language_runs([folder / "language"])
    json.dumps([run.to_dict() for run in runs], allow_nan=False).encode()
    Console(file=io.StringIO(), width=120).print(language_table(runs))


def _state(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    return lambda rng, folder: _change_state(seeds.state, rng, folder / "state")


def _language_state(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    return lambda rng, folder: _change_state(seeds.language_state, rng, folder / "language-state")


def _change_state(content: Any, rng: random.Random, folder: Path) -> None:
    """Change what a state holds, or its bytes; the file of the state before it is left out."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("state*"):
        old.unlink()
    if rng.random() < 0.2:
        write_sealed(folder, content)
        (folder / "state.pt").write_bytes(damaged((folder / "state.pt").read_bytes(), rng))
        return
    try:
        write_sealed(folder, _changed_tree(content, rng))
    except (RecursionError, UnicodeEncodeError):
        write_sealed(folder, content)
    (folder / "state-previous.pt").unlink(missing_ok=True)


# Language models.


def _language(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    def make(rng: random.Random, folder: Path) -> None:
        content = rng.choice(seeds.languages)
        header, body = parts_of(content)
        how = rng.random()
        if how < 0.25:
            end = rng.choice((1000, len(content)))
            changed = damaged(content[:end], rng) + content[end:]
        elif how < 0.4:
            changed = as_safetensors(json_bytes(header, rng), body)
        else:
            text = json_bytes(json.loads(header["__metadata__"][LANGUAGE_KEY]), rng).decode("utf-8", "replace")
            whole = {**header, "__metadata__": {**header["__metadata__"], LANGUAGE_KEY: text}}
            changed = as_safetensors(json.dumps(whole).encode(), body)
        (folder / "language.safetensors").write_bytes(changed)

    return make


def _read_language(folder: Path) -> None:
    path = folder / "language.safetensors"
    info = read_language_info(path)
    json.dumps(info.to_dict(), allow_nan=False).encode()
    verify_language(path)
    load_language(path)


# Images.


def _image(seeds: Seeds) -> Callable[[random.Random, Path], None]:
    def make(rng: random.Random, folder: Path) -> None:
        content = rng.choice(seeds.images)
        end = 64 if rng.random() < 0.3 else len(content)  # the header, where the sizes are
        content = damaged(content[:end], rng) + content[end:]
        (folder / "image").write_bytes(content)

    return make


def _read_images(folder: Path) -> None:
    image = decode(folder / "image", "image")
    remarks_on(image)
    for mode in ("RGB", "L"):
        converted: Image.Image = convert_mode(image, mode, "image")
        assert converted.mode == mode
