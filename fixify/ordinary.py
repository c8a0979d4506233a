"""An ordinary checkpoint, of a network with a learned classifier, as fixify writes it after training.

A `.safetensors` file of the network's state dict. Its metadata says what a reader would otherwise have to find out, in
the words of timm's config.json: `architecture`, `num_classes`, `model_args`, `pretrained_cfg`, `label_names`.
`fixify.sources` reads them; other programs see a plain file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fixify._io import atomic_path, refuse_existing
from fixify.checkpoint import storable
from fixify.errors import OutputError
from fixify.zoo.architectures import Architecture

SUFFIX = ".safetensors"


def save_ordinary(
    model: nn.Module,
    path: Path | str,
    architecture: Architecture,
    *,
    num_classes: int,
    preprocessing: Mapping[str, Any],
    labels: list[str] | None = None,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a network of this architecture, in one step.

    Args:
        model: The network.
        path: Where to write.
        architecture: What it is.
        num_classes: Of its classifier.
        preprocessing: timm's names; see `fixify.zoo.architectures.preprocessing`.
        labels: Class names in class order.
        training: How it was trained; JSON-safe.
        force: Replace an existing file.

    Raises:
        OutputExistsError, OutputError: the file exists, or cannot be written.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    found = {
        "model_args": dict(architecture.kwargs),
        "pretrained_cfg": dict(preprocessing),
        "label_names": labels,
        "training": None if training is None else dict(training),
    }
    metadata = {
        "format": "pt",  # Hugging Face's loaders insist on it
        "architecture": architecture.ref,
        "num_classes": str(num_classes),
        **{key: json.dumps(value, allow_nan=False) for key, value in found.items() if value is not None},
    }
    with atomic_path(path) as temporary:
        try:
            save_file(storable(model.state_dict()), temporary, metadata=metadata)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OutputError(f"Cannot write {path}: {error}.", hint="Nothing was changed.") from error
    return path
