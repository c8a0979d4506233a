"""Whatever bytes a reader gets, it gives a valid result or a FixifyError, soon and without code of the file running.

The number of inputs is fixed, not the time. More of them: `FIXIFY_FUZZ=100000 pytest -m slow FILE`.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import fixify
from fixify.checkpoints import open_source
from fixify.checkpoints.labels import read_class_indices, read_class_map
from fixify.checkpoints.slim import load, read_info
from fixify.checkpoints.verify import verify
from fixify.errors import FixifyError
from fixify.savings import Savings

_MANY = int(os.environ.get("FIXIFY_FUZZ", "20000"))

# Values that broke something once, or are at the edge of what is allowed.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 10**4, 10**9, 2**31, 2**63, 10**30, 0.0, -0.5, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", "x", "0", "avg", "token", "\x1b[2J", "\ud800", "x" * 20_000, "timm/resnet18"),
    *([], {}, [[]], [0, 0, 0], [1, 1, 1], [3, 32, 32], {"text": 1}, {"depth": 10**9}, {"img_size": 20_000}),
)

_PIECES = (b"[", b'"', b"}", b"\x00", b" ", b"\xff", b"(", b"\x86", b": ", b"!!bool ", b"!!timestamp ", b"9" * 5000)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in ((*at, key), *_places(item, (*at, key)))]


def _mutated(value: Any, rng: random.Random) -> Any:
    """Change one to three values of a JSON object: replace, remove, repeat, nest or rename them."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = _places(value)
        if not places:
            break
        *path, last = rng.choice(places)
        inside = value
        for key in path:
            inside = inside[key]
        how = rng.choice(("value", "value", "value", "remove", "nest", "add", "repeat", "other"))
        if how == "remove":
            del inside[last]
        elif how == "nest":
            for _ in range(rng.choice((1, 2, 150))):
                inside[last] = [inside[last]]
        elif how == "add" and isinstance(inside, dict):
            inside[rng.choice(("text", "a b", "", "depth", "img_size", "\x1b"))] = copy.deepcopy(rng.choice(_VALUES))
        elif how == "repeat" and isinstance(inside[last], list):
            inside[last] = inside[last] * rng.choice((2, 1000))
        elif how == "other":
            *start, end = rng.choice(places)
            try:
                found = value
                for key in (*start, end):
                    found = found[key]
                inside[last] = copy.deepcopy(found)
            except (LookupError, TypeError):
                pass  # it was changed before
        else:
            inside[last] = copy.deepcopy(rng.choice(_VALUES))
    return value


def _damaged(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        how = rng.choice(("bit", "byte", "cut", "remove", "double", "insert"))
        if how in ("bit", "byte") and place < len(changed):
            changed[place] = changed[place] ^ 1 << rng.randrange(8) if how == "bit" else rng.randrange(256)
        elif how == "cut" and rng.random() < 0.3:
            del changed[place:]
        elif how == "remove":
            del changed[place : place + rng.randint(1, 40)]
        elif how == "double":
            changed[place:place] = changed[place : place + rng.randint(1, 40)]
        else:
            changed[place:place] = rng.choice(
                (b"[", b'"', b"}", b"\x00", b" ", b"\xff", b"(", b"\x86", b": ", b"!!bool ")
            )
    return bytes(changed)


class _Seeds:
    """Valid inputs, and how each kind is changed and read."""

    def __init__(self, folder: Path, slim: Path) -> None:
        self.folder = folder
        with safe_open(slim, framework="pt") as file:
            self.metadata = dict(file.metadata())
        self.tensors = safetensors.torch.load_file(slim)
        self.slim_bytes = slim.read_bytes()
        state = OrderedDict([("module.conv.weight", torch.ones(2, 3, 1, 1)), ("module.n", torch.tensor(3))])
        tree = {"state_dict": state, "arch": "resnet18", "betas": (0.9, (1, 2)), "state_dict_ema": state}
        self.pickles = []
        for is_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(tree, buffer, _use_new_zipfile_serialization=is_zip)
            self.pickles.append(buffer.getvalue())
        self.weights = safetensors.torch.save(dict(state))
        self.config = {
            "architecture": "test_efficientnet",
            "num_classes": 4,
            "label_names": ["a", "b"],
            "pretrained_cfg": {
                "tag": "r160_in1k",
                "input_size": [3, 160, 160],
                "std": [0.2, 0.2, 0.2],
                "crop_pct": 0.9,
            },
            "model_args": {"in_chans": 1, "img_size": 32},
        }
        self.index = {
            "metadata": {},
            "weight_map": {"module.conv.weight": "a.safetensors", "module.n": "a.safetensors"},
        }
        self.maps = (
            ("txt", b"cat 0\ndog 1\nbird\t2\n"),
            ("txt", b"0 cat\n1: dog\n"),
            ("json", b'{"0": ["n01", "cat"], "1": ["n02", "dog"]}'),
            ("json", b'["cat", "dog"]'),
            ("yaml", b"- cat\n- dog\n- {a: 1}\n"),
            ("yaml", b"cat: 0\ndog: 1\n? [x]\n: !!int 3\n"),
        )

    def header(self, rng: random.Random) -> None:
        path = self.folder / "a.fixed.safetensors"
        info = _mutated(json.loads(self.metadata["fixify"]), rng)
        if rng.random() < 0.1:
            text = _damaged(self.metadata["fixify"].encode(), rng).decode("utf-8", "replace")
        else:
            text = json.dumps(info)
        safetensors.torch.save_file(self.tensors, path, metadata={**self.metadata, "fixify": text})
        info = _result(read_info, path)
        if info is None:
            return
        Savings.from_dict(info.savings) if info.savings else None
        json.dumps(info.model_dump(), allow_nan=False).encode()
        assert _result(fixify.inspect, path) is not None
        if max(info.preprocessing.get("input_size", [224])) <= 256:
            _result(verify, path)
        _result(load, path)

    def bytes(self, rng: random.Random) -> None:
        path = self.folder / "b.fixed.safetensors"
        path.write_bytes(_damaged(self.slim_bytes[:3000], rng) + self.slim_bytes[3000:])
        _result(load, path, check=True)
        _result(open_source, path, meta=True)

    def checkpoint(self, rng: random.Random) -> None:
        path = self.folder / "c.pth"
        path.write_bytes(_damaged(rng.choice([*self.pickles, self.weights]), rng))
        _result(open_source, path, meta=rng.random() < 0.5, ema=rng.random() < 0.3)

    def beside(self, rng: random.Random) -> None:
        inner = self.folder / "hub"
        inner.mkdir(exist_ok=True)
        (inner / "a.safetensors").write_bytes(self.weights)
        (inner / "model.safetensors.index.json").write_text(json.dumps(_mutated(self.index, rng)))
        (inner / "config.json").write_text(json.dumps(_mutated(self.config, rng)))
        _result(open_source, inner, meta=rng.random() < 0.5)

    def names(self, rng: random.Random) -> None:
        suffix, content = rng.choice(self.maps)
        path = self.folder / f"map.{suffix}"
        path.write_bytes(_damaged(content * rng.choice((1, 1, 30)), rng))
        _result(read_class_map, path)
        _result(read_class_indices, path)


def _result(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return read(*arguments, **options)
    except FixifyError as error:
        assert error.message
        return None


@pytest.fixture(scope="module")
def seeds(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> _Seeds:
    folder = tmp_path_factory.mktemp("fuzz")
    return _Seeds(folder, fixify.convert(tiny / "learned.pth", folder / "seed.fixed.safetensors").path)


def _run(seeds: _Seeds, kind: str, numbers: range) -> list[str]:
    """Return what fell, as "kind number: error"; the number is the seed that makes the input again."""
    fell = []
    for number in numbers:
        started = time.process_time()
        try:
            getattr(seeds, kind)(random.Random(f"{kind} {number}"))
        except Exception as error:  # any exception but FixifyError is a finding
            fell.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:200]}")
        if (took := time.process_time() - started) > 20:  # what never ends takes longer, on any machine
            fell.append(f"{kind} {number}: {took:.0f} seconds")
    return fell


_KINDS = {"header": 150, "bytes": 100, "checkpoint": 300, "beside": 100, "names": 300}


@pytest.mark.parametrize("kind", _KINDS)
def test_some_inputs(seeds: _Seeds, kind: str) -> None:
    fell = _run(seeds, kind, range(_KINDS[kind]))
    assert not fell, "\n".join(fell)


@pytest.mark.slow
@pytest.mark.parametrize("kind", _KINDS)
def test_many_inputs(seeds: _Seeds, kind: str) -> None:
    fell = _run(seeds, kind, range(1000, 1000 + _MANY // len(_KINDS)))
    assert not fell, "\n".join(fell)
