"""Small image folders and idx files."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def _write_image(path: Path, seed: int, *, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> None:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _write_four(folder: Path, *, zipped: bool = True, classes: int = 10) -> np.ndarray[Any, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    train = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for stem, pixels in (("train", train), ("t10k", train[:10])):
        labels = (np.arange(len(pixels)) % classes).astype(np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            data = _idx_bytes(array)
            path = folder / f"{stem}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    return train


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write DATA/<split>/<class>/<number>.png, every image different, and return DATA."""

    def make(
        splits: Sequence[str] = ("train", "val"), classes: Sequence[str] = ("ant", "bee", "cat"), images: int = 3
    ) -> Path:
        root = tmp_path / "data"
        for s, split in enumerate(splits):
            for c, name in enumerate(classes):
                for i in range(images):
                    _write_image(root / split / name / f"{i}.png", seed=10_000 * s + 100 * c + i)
        return root

    return make


@pytest.fixture
def write_image() -> Callable[..., None]:
    """Write one random image: write_image(path, seed, mode="RGB", size=(width, height))."""
    return _write_image


@pytest.fixture
def idx_bytes() -> Callable[..., bytes]:
    """Encode an array of unsigned bytes in idx format."""
    return _idx_bytes


@pytest.fixture
def write_four() -> Callable[..., Any]:
    """Write MNIST's four files, with 20 training and 10 test images, and return the training pixels."""
    return _write_four
