"""Import torch and timm for a command, in less time than an import statement takes."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


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
