"""Memory for opening, checking and converting a file of 94 MB."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fixify.checkpoints import check_finite, open_source
from fixify.checkpoints.slim import load
from fixify.conversion import convert
from fixify.models import build, parse_architecture

SMALL, LARGE = "timm/resnet10t", "timm/resnet50"  # 4.9 and 23.5 M parameters with ten classes


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    for name, stem in ((SMALL, "small"), (LARGE, "large")):
        shapes = build(parse_architecture(name), num_classes=10, meta=True).state_dict()
        state = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in shapes.items()}
        safetensors.torch.save_file(state, folder / f"{stem}.safetensors")
        torch.save(state, folder / f"{stem}.pth")
        torch.save(state, folder / f"{stem}-legacy.pth", _use_new_zipfile_serialization=False)
        convert(folder / f"{stem}.safetensors", folder / f"{stem}.fixed.safetensors", arch=name)
    return folder


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def use(path: Path, mode: str) -> None:
    if mode == "convert":
        arch = LARGE if path.name.startswith("large") else SMALL
        convert(path, path.parent / "out.fixed.safetensors", arch=arch, force=True)
        return
    if mode in ("load", "check"):
        load(path, check=mode == "check")
        return
    source = open_source(path, meta=mode == "meta")
    if mode == "data":
        check_finite(source.tensors)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the kernel's count of resident memory")
@pytest.mark.parametrize(
    ("name", "mode", "least", "most"),
    [
        (".safetensors", "meta", 0, 0.1),
        (".pth", "meta", 0, 0.1),
        (".safetensors", "data", 0.9, 1.3),  # every page is read, and nothing is copied
        (".pth", "data", 0.9, 1.3),
        ("-legacy.pth", "data", 0.9, 2.2),
        (".safetensors", "convert", 0.9, 1.3),
        (".pth", "convert", 0.9, 1.3),
        ("-legacy.pth", "convert", 0.9, 2.2),
        (".fixed.safetensors", "load", 0.9, 1.2),
        (".fixed.safetensors", "check", 0.9, 1.2),
    ],
)
def test_peak(files: Path, name: str, mode: str, least: float, most: float) -> None:
    """The peak of resident memory above what was resident before, as a multiple of the file's size."""
    use(files / f"small{name}", mode)  # imports, caches
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is free must not hide what is taken next
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    path = files / f"large{name}"
    use(path, mode)
    taken = (resident("VmHWM") - before) / path.stat().st_size
    assert least <= taken <= most
