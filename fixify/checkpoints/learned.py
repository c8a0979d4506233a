"""Read and write ordinary checkpoints: networks with a learned classifier.

`read_original` reads a checkpoint whose architecture it finds out (`fixify.checkpoints.recognition`).
`save_ordinary` writes what fixify trains: a `.safetensors` file of the network's state dict. Its metadata names the
architecture, the classes and the preprocessing with the keys of timm's config.json (`architecture`, `num_classes`,
`model_args`, `pretrained_cfg`, `label_names`). fixify reads them back; other programs see a plain safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fixify._files import refuse_existing
from fixify.checkpoints.recognition import Recognised, read_outlined
from fixify.checkpoints.slim import write_safetensors
from fixify.errors import SourceError
from fixify.models.architectures import Architecture, Preprocessing
from fixify.models.build import load_weights
from fixify.models.projection import build_with
from fixify.surgery import apply_heads_

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Original(Recognised):
    """A checkpoint whose architecture is known, as a model.

    Attributes:
        projection: The layer whose output goes to the classifier, if that was put behind it; else None.
    """

    projection: str | None = None

    def build(self, *, meta: bool = False) -> nn.Module:
        """Build the model with its learned classifier, without values."""
        model = build_with(
            self.architecture,
            self.num_classes,
            projection=self.projection,
            width=self.sites[0].num_features,
            meta=meta,
            blank=not meta,
        )
        for site in self.sites:
            if not site.has_bias:  # a classifier that was put in the place of one with a bias
                model.get_submodule(site.path).register_parameter("bias", None)
        return model

    def model(self) -> nn.Module:
        """Build the model and load its weights (float32, eval mode).

        Raises:
            SourceError: the tensors do not fit, which is rare because `read_original` compares all shapes; or a head of
                the reference code cannot be rebuilt.
            HeadSpecError: see `ReferenceCodeHead.spec`.
        """
        model = self.build()
        heads = [self.reference_code_record(site) for site in self.sites if site.path in self.reference_code_heads]
        apply_heads_(model, heads)
        try:
            load_weights(model, self.tensors)
        except RuntimeError as error:
            raise SourceError(f"{self.source.name} does not fit {self.architecture.ref}: {error}") from error
        return model.eval()


def read_original(ref: str | Path, *, arch: str | None = None, ema: bool = False, meta: bool = False) -> Original:
    """Read a checkpoint file or a model name, and determine its architecture.

    The architecture is `arch` if given, else the one that the file names, else the one that its names and shapes fit.

    Args:
        ref: A file, a folder, or a model name.
        arch: The architecture, if the caller knows it.
        ema: Read the moving average of the weights.
        meta: Read only names, shapes and dtypes; the tensors are outlines (`fixify.checkpoints.outline.Outline`).

    Raises:
        SourceError: the checkpoint cannot be read, or holds integers where the architecture has floating point.
        ArchitectureError: no architecture fits, the given or named one does not, or it cannot pool as the file says.
        AmbiguousArchitectureError: several architectures fit; the message lists what differs.
        NoClassifierError: the model has no classifier, or is the image tower of a CLIP model.
    """
    return Original(**read_outlined(ref, arch=arch, ema=ema, meta=meta).recognised)


def save_ordinary(
    model: nn.Module,
    path: Path | str,
    architecture: Architecture,
    *,
    num_classes: int,
    preprocessing: Preprocessing,
    labels: list[str] | None = None,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a network as an ordinary checkpoint; the file is replaced in one step.

    Args:
        model: The network.
        path: The file to write.
        architecture: The network's architecture.
        num_classes: Number of classes of its classifier.
        preprocessing: timm's names; see `fixify.models.architectures.preprocessing`.
        labels: Class names in class order.
        training: How it was trained; JSON-safe.
        force: Replace an existing file.

    Raises:
        OutputExistsError: the file exists and `force` is not given.
        OutputError: the file cannot be written.
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
        "format": "pt",  # required by Hugging Face's loaders
        "architecture": architecture.ref,
        "num_classes": str(num_classes),
        **{key: json.dumps(value, allow_nan=False) for key, value in found.items() if value is not None},
    }
    write_safetensors(path, model.state_dict(), metadata)
    return path
