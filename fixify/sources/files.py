"""One checkpoint file -> `Source`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fixify import _io
from fixify.errors import SourceError
from fixify.sources.hints import facts_of_metadata, facts_of_training
from fixify.sources.pickles import read_legacy, read_zip
from fixify.sources.safetensors_file import read_safetensors
from fixify.sources.sniffing import kind_of
from fixify.sources.source import Facts, Source
from fixify.sources.wrappers import clean, find_state_dict


def open_file(path: Path, *, ema: bool = False, meta: bool = False, name: str | None = None) -> Source:
    """Read one checkpoint file: PyTorch's zip, its older pickle, or safetensors; its content decides which.

    Args:
        path: The file.
        ema: Take the moving average of the weights.
        meta: Read only names, shapes and dtypes: tensors on the meta device, no SHA-256.
        name: What to call it; its file name if None.

    Raises:
        SourceError: see the readers.
    """
    kind = kind_of(path)
    num_bytes = path.stat().st_size
    tree: object
    if kind == "safetensors":
        contents = read_safetensors(path, meta=meta)
        if "fixify" in contents.metadata:
            raise SourceError(
                f"{path} is a slim checkpoint already.", hint=f"See what is in it: fixify inspect {path.name}"
            )
        tree, facts = contents.tensors, facts_of_metadata(contents.metadata)
    else:
        tree = read_zip(path) if kind == "zip" else read_legacy(path)
        facts = facts_of_training(tree)
    found = find_state_dict(tree, path.name, ema=ema)
    tensors, dropped = clean(found, path.name, file_bytes=num_bytes)
    if kind != "safetensors":
        _refuse_shapes_only(tensors, path)
    if meta:
        tensors = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    return with_facts(
        Source(
            name=name or path.name,
            tensors=tensors,
            sha256=None if meta else _io.sha256_of(path),
            num_bytes=num_bytes,
            used_ema=found.used_ema,
            has_ema=found.has_ema,
            dropped=dropped,
        ),
        facts,
    )


def with_facts(source: Source, facts: Facts) -> Source:
    """`source`, saying what `facts` say."""
    source.architecture = facts.architecture
    source.architecture_kwargs = facts.architecture_kwargs
    source.num_classes = facts.num_classes
    source.pretrained_cfg = facts.pretrained_cfg
    source.labels = facts.labels
    return source


def _refuse_shapes_only(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise SourceError(f"{path} stores only the shape of {key}, no values: it was saved from the meta device.")
