"""Change JSON values, texts and bytes in the ways that broke something once."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

# Values that broke something once, or are at the edge of what is allowed.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 101, 10**4, 10**9, 2**31, 2**53 + 1, 2**63, 10**30, 10**400),
    *(0.0, -0.5, 1.5, 1e-320, 1e-300, 1e300, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "avg", "token", "a.b", "\x1b[2J", "\x1b]0;x\x07", "\ud800", "٣", "x" * 20_000, "9" * 5000),
    *("timm/resnet18", "resnet18,depth=1000000000", "../../etc/passwd", "module." * 500, " " * 5000 + "x"),
    *([], {}, [[]], [0, 0, 0], [1, 1, 1], [3, 32, 32], [1e308] * 3, [3, 20_000, 20_000], {"a": 1}),
    *({"text": 1}, {"depth": 10**9}, {"img_size": 20_000}, {"embed_dim": 10**6, "depth": 10**6}),
)

# What only a text can hold: numbers as long as a book, and nesting. `json_bytes` puts them in place of these words.
RAW = {
    "RAW:book": "9" * 5000,
    "RAW:infinite": "1e999",
    "RAW:long": "0." + "3" * 5000,
    "RAW:negative": "-" + "1" * 40,
    "RAW:deep": "[" * 100_000 + "]" * 100_000,
    "RAW:objects": '{"a":' * 2000 + "1" + "}" * 2000,
    "RAW:150": "[" * 150 + "]" * 150,
    "RAW:twice": '{"a": 1, "a": [2]}',
    "RAW:half": '"\\ud800"',
    "RAW:nothing": "",
}
_WORD = re.compile('"RAW:[a-z0-9]+"')

KEYS = ("text", "a b", "", "depth", "img_size", "\x1b", "self", "num_classes", "pretrained", "\ud800", "__class__")

# Pieces of text that go into the middle of JSON, YAML, pickles and lines.
PIECES: tuple[bytes, ...] = (
    *(b"[", b"]", b'"', b"{", b"}", b"\x00", b" ", b"\xff", b"(", b"\x86", b": ", b"- ", b"\n", b"\t", b"\r", b"#"),
    *(b"!!bool ", b"!!timestamp ", b"!!python/object/apply:os.system [x]", b"&a ", b"*a ", b"<<: ", b"? ", b"%"),
    *(b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b"[" * 2000, b'{"a":' * 3000, b'"\\ud800"', b" " * 3000, b"\x1b[2J"),
    *("\u202e".encode(), "٣".encode(), b"\xed\xa0\x80", b"-1", b"0x", b"1_000"),
)

Place = tuple[Any, ...]


_LARGEST = 1 << 22
"""Longest piece of an input; pieces that are repeated twice would be more than the harness can hold."""


def places(value: Any, at: Place = ()) -> list[Place]:
    """List the paths of the values inside a value, to a depth of 12; of a long list only the first ones."""
    if len(at) == 12:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    return [path for key, item in items for path in ((*at, key), *places(item, (*at, key)))]


def mutated(value: Any, rng: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """Change one to three values of a dictionary or list: replace, remove, repeat, nest, add or swap them."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = places(value)
        if not found:
            break
        *path, last = rng.choice(found)
        inside = value
        for key in path:
            inside = inside[key]
        how = rng.choice(("value", "value", "value", "remove", "nest", "add", "repeat", "other"))
        if how == "remove":
            del inside[last]
        elif how == "nest":
            for _ in range(rng.choice((1, 2, 60))):
                inside[last] = [inside[last]] if rng.random() < 0.9 else {"a": inside[last]}
        elif how == "add" and isinstance(inside, dict):
            inside[rng.choice(KEYS)] = copy.deepcopy(rng.choice(values))
        elif how == "repeat" and isinstance(inside[last], (list, str)):
            inside[last] = (inside[last] * rng.choice((2, 1000)))[:_LARGEST]
        elif how == "other":
            inside[last] = copy.deepcopy(_found_at(value, rng.choice(found)))
        else:
            inside[last] = copy.deepcopy(rng.choice(values))
    return value


def _found_at(value: Any, place: Place) -> Any:
    """Return what is at a place, or the value itself where an earlier change removed it."""
    for key in place:
        try:
            value = value[key]
        except (LookupError, TypeError):
            break
    return value


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """Write a JSON value after changing its values or, in a quarter of the cases, its text."""
    if rng.random() < 0.75:
        changed = mutated(value, rng, (*VALUES, *RAW))
        text = json.dumps(changed, ensure_ascii=rng.random() < 0.8)
        text = _WORD.sub(lambda found: RAW[found[0][1:-1]], text)
        return text.encode("utf-8", "surrogatepass")[:_LARGEST]
    return damaged(json.dumps(value).encode(), rng)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flip, replace, remove, repeat, move and insert bytes, or cut the end off."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4, 20))):
        place = rng.randrange(len(changed) + 1)
        how = rng.choice(("bit", "bit", "byte", "word", "cut", "remove", "double", "splice", "insert", "insert"))
        if how == "bit" and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif how == "byte" and place < len(changed):
            changed[place] = rng.randrange(256)
        elif how == "word":
            word = rng.choice((0, 1, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)).to_bytes(
                4, rng.choice(("little", "big"))
            )
            changed[place : place + 4] = word
        elif how == "cut" and rng.random() < 0.3:
            del changed[place:]
        elif how == "remove":
            del changed[place : place + rng.randint(1, 40)]
        elif how == "double":
            changed[place:place] = changed[place : place + rng.randint(1, 40)] * rng.choice((1, 1, 1, 100))
        elif how == "splice":
            other = rng.randrange(len(changed) + 1)
            length = rng.randint(1, 200)
            changed[place : place + length] = changed[other : other + length]
        else:
            changed[place:place] = rng.choice(PIECES)
    return bytes(changed[:_LARGEST])
