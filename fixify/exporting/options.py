"""Options of `fixify.export`. Importing this module needs neither torch nor timm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from fixify._options import CheckedOptions, Conflict, option

OPSET = 18
"""Default version of ONNX's standard operators: torch's exporter is written for it."""
_NEWEST_OPSET = 23
_OF_ONNX = ("portable", "opset")
_OF_WHOLE_ONNX = ("batch", "include_preprocessing", "include_softmax", "top_k")


class ExportOptions(CheckedOptions):
    """Options of `fixify.export`: the format, and what goes into the file.

    >>> ExportOptions.create(to="onnx", top_k=5).top_k
    5
    """

    to: Literal["onnx", "torch-export", "dense"] = option(
        "onnx", "Format: an ONNX file, a .pt2 file for torch.export.load, or a folder that timm loads (local-dir:)."
    )
    head_only: bool = option(False, "Write only the head: an ONNX file, and beside it its constants for NumPy (.npz).")
    portable: bool = option(
        False, "ONNX: standard operators only. The head is exact then, and its signs are floats in memory."
    )
    opset: int | None = option(
        None, f"ONNX: version of the standard operators. Default: {OPSET}.", ge=OPSET, le=_NEWEST_OPSET
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = option(
        None, "Type in which weights are stored; they are computed in float32. Default: the checkpoint's."
    )
    batch: int | None = option(None, "ONNX: number of images of a call. Default: any number.", ge=1)
    include_preprocessing: bool = option(
        False,
        "ONNX: take the pixels of resized and cropped images, uint8 [batch, height, width, channels], and normalise "
        "them.",
    )
    include_softmax: bool = option(False, "ONNX: return probabilities instead of logits.")
    top_k: int | None = option(None, "ONNX: return the K largest values and their classes.", ge=1)
    images: str | None = option(
        None,
        "A folder of images, or a data name as for finetune: compare the file with PyTorch on 32 of them, besides "
        "random ones.",
        metavar="DATA",
    )

    @field_validator("images", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    def _conflicts(self) -> Iterator[Conflict]:
        given = {name for name in (*_OF_ONNX, *_OF_WHOLE_ONNX) if getattr(self, name) not in (None, False)}
        if self.to != "onnx":
            for name in (*_OF_ONNX, *_OF_WHOLE_ONNX):
                if name in given:
                    yield Conflict(
                        (name, "to"), f"{name} belongs to ONNX, not to {self.to}", "Drop it, or add --to onnx."
                    )
            if self.head_only:
                yield Conflict(("head_only", "to"), f"A head alone is written as ONNX, not as {self.to}", "Drop --to.")
        if self.head_only:
            for name in (*_OF_WHOLE_ONNX, "images"):
                if name in given or (name == "images" and self.images is not None):
                    yield Conflict((name, "head_only"), f"{name} needs the whole model, not the head alone")
        if self.to == "dense" and self.images is not None:
            yield Conflict(("images", "to"), "A dense copy is compared on random features", "Drop --images.")
