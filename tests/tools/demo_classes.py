"""Choose the 500 characters of the demo, in about half a minute.

    python tests/tools/demo_classes.py OUT.txt

This made `fixify/demo/classes.txt`. Candidates are the characters that all twelve faces have and that fit into the
image. A character is kept if, in every face, it differs enough from all characters kept before it: Latin A is kept,
Cyrillic А and Greek Α are not. ASCII letters and digits come first, then other letters, then signs. The threshold is
the highest one that leaves 500.
"""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.ft2font import FT2Font
from scipy.ndimage import gaussian_filter

from fixify._files import write_atomic
from fixify.demo.glyphs import ALL_FACES, GlyphClass, draw, face_path, fits

NUM_CLASSES = 500
_CATEGORIES = {"Lu", "Ll", "Lt", "Lo", "Nd", "No", "Sm", "So", "Sc", "Po", "Ps", "Pe", "Pd", "Pi", "Pf"}
# Braille dots, box-drawing lines and blocks are made to be joined or counted, not read.
_LEFT_OUT = (range(0x2500, 0x25A0), range(0x2800, 0x2900))
_ASCII_DISTANCE = 0.13  # a lower threshold for ASCII: I and l of DejaVu Sans still fail it, O and Q pass

Distances = npt.NDArray[np.float32]


def candidates() -> list[int]:
    """List the code points that every face can draw, in ascending order."""
    shared = set.intersection(*(set(FT2Font(str(face_path(face))).get_charmap()) for face in ALL_FACES))
    wanted = [
        point
        for point in sorted(shared)
        if unicodedata.category(chr(point)) in _CATEGORIES
        and not any(point in block for block in _LEFT_OUT)
        and not any(character.isdigit() for character in GlyphClass.of(point).name)
    ]
    return [point for point in wanted if all(fits(face, point) for face in ALL_FACES)]


def distances(face: str, code_points: list[int]) -> Distances:
    """Measure how much each pair of characters differs in a face, [n, n], at the best shift by up to one pixel.

    The distance is 0 for equal images and about 1 where half of the ink of each is elsewhere. The images are slightly
    blurred first, so that tiny differences do not count.
    """
    ink = draw(face, code_points).astype(np.float32) / 255
    n = len(ink)
    ink = ink.reshape(n, 32, 2, 32, 2).mean((2, 4))
    ink = np.pad(gaussian_filter(ink, (0, 0.7, 0.7)), ((0, 0), (2, 2), (2, 2)))
    flat = ink.reshape(n, -1)
    size = (flat**2).sum(1)
    overlap = np.full((n, n), -np.inf, np.float32)
    for down in (-1, 0, 1):
        for across in (-1, 0, 1):
            np.maximum(overlap, flat @ np.roll(ink, (down, across), (1, 2)).reshape(n, -1).T, out=overlap)
    apart = size[:, None] + size[None, :] - 2 * np.maximum(overlap, overlap.T)
    return np.sqrt(np.maximum(apart, 0) / np.sqrt(size[:, None] * size[None, :]))


def select(code_points: list[int], apart: Distances, count: int = NUM_CLASSES) -> list[int]:
    """Choose `count` characters to keep, given the distance of each pair."""
    rank = [_rank(point) for point in code_points]
    order = sorted(range(len(code_points)), key=lambda index: (rank[index], code_points[index]))

    def keep(threshold: float) -> list[int]:
        kept: list[int] = []
        for index in order:
            smallest = _ASCII_DISTANCE if rank[index] == 0 else threshold
            if not kept or apart[index, kept].min() >= smallest:
                kept.append(index)
        return kept

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if len(keep(middle)) >= count else (low, middle)
    return [code_points[index] for index in keep(low)[:count]]


def _rank(code_point: int) -> int:
    character = chr(code_point)
    if character.isascii() and character.isalnum():
        return 0
    return 1 if character.isalpha() else 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where to write the list")
    out = parser.parse_args().out
    points = candidates()
    apart = np.minimum.reduce([distances(face, points) for face in ALL_FACES])
    chosen = sorted(GlyphClass.of(point) for point in select(points, apart))
    write_atomic(out, "".join(f"{entry.code_point:04X} {entry.name}\n" for entry in chosen))


if __name__ == "__main__":
    main()
