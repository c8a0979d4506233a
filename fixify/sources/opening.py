"""Any way of naming a checkpoint -> `Source`."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from fixify.errors import SourceError
from fixify.sources.files import open_file
from fixify.sources.source import Source

_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".tar", ".ckpt", ".th", ".pkl", ".zip")


def open_source(ref: str | os.PathLike[str], *, ema: bool = False, meta: bool = False) -> Source:
    """Open a checkpoint.

    Args:
        ref: A file.
        ema: Take the moving average of the weights, if the checkpoint holds one.
        meta: Read only names, shapes and dtypes (tensors on the meta device): of a large safetensors file just
            the header.

    Raises:
        UnsafeCheckpointError: it would run code, or lies about what it holds. Nothing was run.
        SourceError: there is nothing of that name, or it cannot be read.
    """
    text = os.fspath(ref)
    path = Path(text).expanduser()
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are too long
        return open_file(path, ema=ema, meta=meta)
    raise _no_such_file(text, path)


def _no_such_file(text: str, path: Path) -> SourceError:
    folder = path.parent
    if not folder.is_dir():
        return SourceError(f"There is no file {text}: the folder {folder} does not exist.")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(_SUFFIXES))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return SourceError(f"There is no file {text}.", hint=f"Did you mean {' or '.join(near)}?")
    if names:
        return SourceError(f"There is no file {text}.", hint=f"In {folder} there are {', '.join(names[:5])}.")
    return SourceError(f"There is no file {text}, and no checkpoint in {folder}.")
