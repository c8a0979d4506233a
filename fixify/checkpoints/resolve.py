"""Open a checkpoint however it is named: a path, a model name, or a repository of the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

from fixify.checkpoints.beside import class_lists_beside
from fixify.checkpoints.files import CONFIG, SUFFIXES, WEIGHTS, config_facts, open_file, open_folder, open_with_config
from fixify.checkpoints.locate import HUB_SCHEMES, LOCAL_SCHEME
from fixify.checkpoints.source import Facts, Source
from fixify.description import Architecture
from fixify.errors import ArchitectureError, SourceError
from fixify.lookup import fit, parse_architecture

# The hub's client and what reads the libraries' own weights take seconds to import: they are imported below, only
# for names that need them.

_ADDRESSES = ("http", "https", "ftp", "s3", "gs")
_SCHEMES = (*HUB_SCHEMES, *_ADDRESSES, LOCAL_SCHEME)


def open_source(ref: str | os.PathLike[str], *, ema: bool = False, meta: bool = False) -> Source:
    """Open a checkpoint.

    Args:
        ref: A path that exists (a file, or a folder with weights and perhaps a config.json) takes precedence. Other
            values are model names: `resnet18`, `timm/resnet18.a1_in1k`, `torchvision/resnet50:IMAGENET1K_V2`,
            `hf-hub:organisation/name@revision`, `local-dir:folder`.
        ema: Read the moving average of the weights.
        meta: Read only names, shapes and dtypes; the tensors are outlines.

    Raises:
        UnsafeCheckpointError: the checkpoint would run code, or lies about what it holds. Nothing was run.
        SourceError: there is no such file or model, it cannot be read, or it lacks the requested moving average.
    """
    text = os.fspath(ref)
    if not text:
        raise SourceError("The name of the checkpoint is empty.", hint="Give a file, a folder or a model name.")
    path = Path(text).expanduser()
    # os.path.exists, because Path.exists raises for impossible paths (too long, with a zero byte)
    if os.path.exists(path):  # noqa: PTH110
        return _open_path(path, ema=ema, meta=meta)
    scheme, colon, rest = text.partition(":")
    if colon and scheme in HUB_SCHEMES:
        from fixify.checkpoints.hub import open_repository

        return open_repository(rest, ema=ema, meta=meta)
    if colon and scheme == LOCAL_SCHEME:
        return _open_local(rest, ema=ema, meta=meta)
    if scheme in _ADDRESSES:
        raise SourceError(f"{text} is a URL, not a file.", hint=f"Download it first: curl -LO {text}")
    if _looks_like_path(text):
        raise _no_such_file(text, path)
    from fixify.checkpoints.pretrained import open_named

    return open_named(_model_name(text), ema=ema, meta=meta)


def named_model(ref: str | os.PathLike[str]) -> Architecture | None:
    """Return the architecture if `open_source` would read `ref` as a library's model name; None for files and others.

    Raises:
        SourceError: `ref` looks like such a name, but no library has that model.

    >>> named_model("resnet18").ref
    'timm/resnet18'
    >>> named_model("weights.pth") is None
    True
    """
    text = os.fspath(ref)
    scheme, colon, _ = text.partition(":")
    if os.path.exists(Path(text).expanduser()) or (colon and scheme in _SCHEMES) or _looks_like_path(text):  # noqa: PTH110
        return None
    return _model_name(text) if text else None


def _open_path(path: Path, *, ema: bool, meta: bool) -> Source:
    lists = class_lists_beside(path)
    if path.is_dir():
        return replace(open_folder(path, ema=ema, meta=meta), class_lists=lists)
    if path.name in WEIGHTS:
        return replace(open_with_config(path, ema=ema, meta=meta), class_lists=lists)
    source = open_file(path, ema=ema, meta=meta)
    facts = source.facts.or_else(_facts_beside(path, source))
    if facts.architecture is None and "-" in path.name and not path.name.endswith(".safetensors"):
        from fixify.checkpoints.pretrained import facts_of_download

        facts = facts_of_download(path).or_else(facts)
    return replace(source, facts=facts, class_lists=lists)


def _facts_beside(path: Path, source: Source) -> Facts:
    """Return the facts of a config.json in the same folder if the file's tensors fit the architecture it names."""
    if not os.path.exists(path.parent / CONFIG):  # noqa: PTH110
        return Facts()
    try:
        facts = config_facts(path.parent / CONFIG)
        if source.facts.architecture is not None or facts.architecture is None:
            return Facts()
        fits = fit(parse_architecture(facts.architecture, **facts.architecture_kwargs), source.shapes)
    except (SourceError, ArchitectureError):
        return Facts()  # it belongs to another program, or to another checkpoint in this folder
    return facts if fits is not None else Facts()


def _open_local(text: str, *, ema: bool, meta: bool) -> Source:
    folder = Path(text).expanduser()
    if not os.path.isdir(folder):  # noqa: PTH112
        raise SourceError(
            f"There is no folder {text!r} for local-dir.", hint="Give a folder that holds model.safetensors."
        )
    return open_folder(folder, ema=ema, meta=meta)


def _model_name(text: str) -> Architecture:
    try:
        return parse_architecture(text.replace(":", ".", 1))
    except ArchitectureError as error:
        raise SourceError(
            f"{text[:100]!r} is neither a file nor a model name: {error.message}", hint=error.hint
        ) from error


def _looks_like_path(text: str) -> bool:
    separators = {"/", os.sep} & set(text)
    return text.endswith(SUFFIXES) or (bool(separators) and not text.startswith(("timm/", "torchvision/", "fixify/")))


def _no_such_file(text: str, path: Path) -> SourceError:
    folder = path.parent
    if not os.path.isdir(folder):  # noqa: PTH112
        hint = f"For a repository of the Hugging Face hub, write hf-hub:{text}" if _could_be_repository(text) else None
        return SourceError(f"There is no file {text}: the folder {folder} does not exist.", hint=hint)
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(SUFFIXES))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return SourceError(f"There is no file {text}.", hint=f"Did you mean {' or '.join(near)}?")
    if names:
        return SourceError(f"There is no file {text}.", hint=f"{folder} holds {', '.join(names[:5])}.")
    return SourceError(f"There is no file {text}, and {folder} holds no checkpoint.")


def _could_be_repository(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith(("/", "~", ".")) and not text.endswith(SUFFIXES)
