"""One checkpoint file -> `Source`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fixify import _io
from fixify.errors import SourceError
from fixify.sources.hints import facts_of_metadata, facts_of_training
from fixify.sources.names import clean
from fixify.sources.pickles import read_legacy, read_zip
from fixify.sources.safetensors_file import LANGUAGE_KEY, SLIM_KEY, read_safetensors
from fixify.sources.sniffing import kind_of
from fixify.sources.source import Facts, Source
from fixify.sources.wrappers import find_state_dict

_OURS = {SLIM_KEY: "a slim checkpoint already", LANGUAGE_KEY: "a language model, not one of images"}


def open_file(path: Path, *, ema: bool = False, meta: bool = False, name: str | None = None) -> Source:
    """Read one checkpoint file: PyTorch's zip, its older pickle, or safetensors; its content decides which.

    Args:
        path: The file.
        ema: Take the moving average of the weights.
        meta: Read only names, shapes and dtypes: tensors on the meta device, no SHA-256.
        name: What to call it; its file name if None.

    Raises:
        UnsafeCheckpointError: it would run code, or lies about what it holds. Nothing was run.
        SourceError: it is no checkpoint, is damaged, holds no weights or (if asked for) no moving average of them.
    """
    tree, facts = read_tree(path, meta=meta)
    num_bytes = path.stat().st_size
    weights = clean(find_state_dict(tree, path.name, ema=ema), path.name, file_bytes=num_bytes, ema=ema)
    source = Source(
        name=name or path.name,
        tensors=shapes_only(weights.tensors) if meta else weights.tensors,
        sha256=None if meta else _io.sha256_of(path),
        num_bytes=num_bytes,
        used_ema=weights.used_ema,
        has_ema=weights.has_ema,
        dropped=weights.dropped,
    )
    return source.with_facts(facts)


def read_tree(path: Path, *, meta: bool) -> tuple[object, Facts]:
    """What a file holds, as it was saved, and what it says about the model.

    Args:
        meta: Of a safetensors file only the header is read. The tensors of a zip are mapped in any case and cost
            nothing until they are looked at.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        contents = read_safetensors(path, meta=meta)
        for key, what in (
            (SLIM_KEY, "a slim checkpoint already"),
            (LANGUAGE_KEY, "a language model, not one of images"),
        ):
            if key in contents.metadata:
                raise SourceError(f"{path} is {what}.", hint=f"See what is in it: fixify inspect {path}")
        return contents.tensors, facts_of_metadata(contents.metadata)
    tree = read_zip(path) if kind == "zip" else read_legacy(path)
    _refuse_shapes_only(tree, path)
    return tree, facts_of_training(tree)


def shapes_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names, shapes and dtypes, on the meta device."""
    return {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}


def _refuse_shapes_only(tree: object, path: Path) -> None:
    for key, tensor in find_state_dict(tree, path.name).entries.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise SourceError(
                f"{path} stores only the shape of {key}, no values: the model was on the meta device.",
                hint="Save it after its weights were loaded.",
            )
