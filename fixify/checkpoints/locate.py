"""Find the file of a slim checkpoint by its name: a file, a folder, or a repository of the Hugging Face hub.

Importing this module needs no torch, so that `fixify inspect` is quick.
"""

from __future__ import annotations

import os
from pathlib import Path

from fixify.checkpoints.header import SLIM_KEY, has_metadata
from fixify.errors import FormatError

HUB_SCHEMES = ("hf-hub", "hf_hub")
LOCAL_SCHEME = "local-dir"
SLIM_WEIGHTS = "model.safetensors"
"""The name of a slim checkpoint in a folder for timm, and on the hub."""


def find_slim(ref: str | os.PathLike[str]) -> Path | None:
    """Return the slim checkpoint that a name leads to; None if it leads to something else, or nowhere.

    Args:
        ref: A file, a folder (`model.safetensors` in it), `local-dir:FOLDER`, or `hf-hub:organisation/name`, with
            `@revision` for a revision other than the main branch. The newest file of the hub is downloaded, unless it
            is in the cache.

    Raises:
        SourceError: the repository does not exist, needs permission, or the hub cannot be reached.
    """
    text = os.fspath(ref)
    # os.path.exists, because Path.exists raises for impossible paths (too long, with a zero byte)
    if text and os.path.exists(text):  # noqa: PTH110
        return _at(Path(text))
    scheme, colon, rest = text.partition(":")
    if colon and scheme in HUB_SCHEMES:
        from fixify.checkpoints.hub import slim_in_repository

        return slim_in_repository(rest)
    if colon and scheme == LOCAL_SCHEME:
        return _at(Path(rest).expanduser())
    return None


def locate_slim(ref: str | os.PathLike[str]) -> Path:
    """Return the file that a slim checkpoint is read from. A path of a file is returned as it is, unread.

    Args:
        ref: See `find_slim`.

    Raises:
        FormatError: the folder or repository holds no slim checkpoint.
        SourceError: see `find_slim`.
    """
    text = os.fspath(ref)
    scheme, colon, _ = text.partition(":")
    is_name = bool(colon) and scheme in (*HUB_SCHEMES, LOCAL_SCHEME) and not os.path.exists(text)  # noqa: PTH110
    if not is_name and not os.path.isdir(text):  # noqa: PTH112
        return Path(text)
    found = find_slim(ref)
    if found is None:
        raise FormatError(
            f"{text} holds no slim checkpoint.",
            hint=f"If it holds an ordinary one, make a slim one of it: fixify convert {text}",
        )
    return found


def short_name(ref: str | os.PathLike[str]) -> str:
    """Return the name of a checkpoint for messages and tables, without folders.

    >>> short_name("models/net.fixed.safetensors"), short_name("hf-hub:someone/birds@v2")
    ('net.fixed.safetensors', 'someone/birds@v2')
    """
    text = os.fspath(ref)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in HUB_SCHEMES:
        return rest
    path = Path(rest if colon and scheme == LOCAL_SCHEME else text)
    return path.name or path.resolve().name


def _at(path: Path) -> Path | None:
    path = path / SLIM_WEIGHTS if path.is_dir() else path
    return path if has_metadata(path, SLIM_KEY) else None
