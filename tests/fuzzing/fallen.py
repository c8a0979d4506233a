"""What fell once, as small as it can be, each made by a line. Ever since it is refused, or read within the limits."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from fuzzing.kinds import as_safetensors

_TENSOR = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def _safetensors(*names: str) -> bytes:
    return as_safetensors(json.dumps(dict.fromkeys(names, _TENSOR)).encode(), b"")


def _pickle(operations: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + operations + b".")
        archive.writestr("a/version", "3\n")
    return buffer.getvalue()


def _entries(count: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(count):
            archive.writestr(f"a/{number}", b"")
    return buffer.getvalue()


def _checkpoint(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "options.json").write_text('{"meta": false, "ema": false}')
        (folder / "c.pth").write_bytes(content)

    return write


def _class_map(suffix: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"map.{suffix}").write_text(text) and None


def _shard(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "hub").mkdir()
        index = {"weight_map": {"fc.weight": name}}
        (folder / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


# Name: the kind that reads it, and what writes it.
FALLEN: dict[str, tuple[str, Callable[[], Callable[[Path], None]]]] = {
    "200,000 wrappers": (
        "safetensors",
        lambda: _checkpoint(_safetensors("module." * 200_000 + "a", "module." * 200_000 + "b")),
    ),
    "100,000 tensors": ("safetensors", lambda: _checkpoint(_safetensors(*map(str, range(100_000))))),
    "200,000 entries": ("zip", lambda: _checkpoint(_entries(200_000))),
    "marks and tuples": ("pickle", lambda: _checkpoint(_pickle(b"(t" * 100_000))),
    "marks": ("pickle", lambda: _checkpoint(_pickle(b"(" * 100_000))),
    "a long global": ("pickle", lambda: _checkpoint(_pickle(b"cos\n" + b'{"a":' * 100_000 + b"\n"))),
    "a long global without end": ("pickle", lambda: _checkpoint(_pickle(b"cos\n" + b'{"a":' * 100_000))),
    "a tuple of itself": (
        "pickle",
        lambda: _checkpoint(_pickle(b"}K\x01" + b"\x85q\x01h\x01h\x01\x86" * 60 + b"K\x01s")),
    ),
    "a long shard": ("hub", lambda: _shard("a" * 300 + ".safetensors")),
    "a shard with a zero byte": ("hub", lambda: _shard("a\0.safetensors")),
    "YAML of 20,000 lines": ("classes", lambda: _class_map("yaml", "".join(f"c{n}: {n}\n" for n in range(20_000)))),
    "YAML of brackets": ("classes", lambda: _class_map("yaml", "[" * 2000)),
    "a YAML tag": ("classes", lambda: _class_map("yaml", "a: !!bool x\n")),
    "spaces": ("classes", lambda: _class_map("txt", "a" + " " * 60_000 + "b\nc")),
    "digits of others": ("classes", lambda: _class_map("txt", "cat ٣\ndog ٤\n")),
}
