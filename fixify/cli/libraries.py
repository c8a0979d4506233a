"""Import torch and timm for a command, in less time than an import statement takes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Iterator

from fixify.checkpoints.header import SLIM_KEY, has_metadata
from fixify.checkpoints.locate import LOCAL_SCHEME, find_slim


def import_libraries() -> None:
    """Import torch, timm and torchvision, with which commands open models, without collecting garbage meanwhile.

    The three make half a million objects, which stay. Python's collector looks at all of them again and again while
    they are made, a fifth of the time of the import, and in each full collection afterwards. So it waits for the end of
    the import, and then leaves these objects alone. Where they exist already, nothing is done.
    """
    if "fixify.models.architectures" in sys.modules:
        return
    with _without_collection():
        import fixify.models.architectures  # noqa: F401


def import_libraries_for(sources: Iterable[str]) -> None:
    """Import the libraries, unless every source is a safetensors file of which the header is probably enough."""
    if not all(map(_has_header_only, sources)):
        import_libraries()


def _has_header_only(source: str) -> bool:
    path = source.removeprefix(f"{LOCAL_SCHEME}:")
    if os.path.isdir(path):  # noqa: PTH112  # Path raises for impossible paths (too long, with a zero byte)
        names = os.listdir(path)  # noqa: PTH208
        return any(name.endswith(".safetensors") for name in names) and find_slim(path) is None
    return path.endswith(".safetensors") and not has_metadata(path, SLIM_KEY)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Collect no garbage in a block, and never what exists at its end; nothing is done if collection is off already."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
