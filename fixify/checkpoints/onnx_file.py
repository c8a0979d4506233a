"""Open an ONNX file that `fixify.export` wrote, as a model that ONNX Runtime runs on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from fixify._files import require_regular
from fixify._packages import require_onnx
from fixify._values import Count, Number, Text, parse_json
from fixify.checkpoints.header import FORMAT_VERSION, SLIM_KEY, VERSION_KEY, SlimInfo, info_of_text
from fixify.errors import FormatError, UsageError

if TYPE_CHECKING:
    import onnxruntime

ONNX_KEY = "fixify.onnx"
"""Key of the metadata under which `OnnxInfo` is stored as JSON; `SlimInfo` is under the key of slim checkpoints."""
_QUIET = 3  # ONNX Runtime prints errors only


class OnnxInfo(BaseModel):
    """What an exported ONNX file says about its graph.

    Attributes:
        part: "model", or "head" for a head alone.
        preprocessing: Whether the graph takes pixels, uint8 [batch, height, width, channels], and normalises them.
        mean, std: What it normalises them with, one number per channel.
        softmax: Whether it returns probabilities.
        top_k: How many values it returns with their classes; None for all, in class order.
        portable: Whether it has standard operators only.
        batch: The number of images of a call; None for any.
        onnxruntime: The least version of ONNX Runtime that runs it fast; None if any does that knows the opset.
        check: How it was compared with PyTorch; see `fixify.exporting.check.Agreement`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    part: Literal["model", "head"] = "model"
    preprocessing: bool = False
    mean: list[Number] = []
    std: list[Number] = []
    softmax: bool = False
    top_k: Count | None = None
    portable: bool = False
    batch: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    onnxruntime: Text | None = None
    check: list[dict[str, Any]] = []


def new_session(source: str | bytes, *, optimised: bool = True) -> onnxruntime.InferenceSession:
    """Load a model into ONNX Runtime, for the CPU and with as many threads as torch has.

    Args:
        source: A path, or the bytes of a model.
        optimised: Whether the graph is optimised; without, it loads faster and runs slower.

    Raises:
        UsageError: onnxruntime is not installed.
        FormatError: ONNX Runtime cannot load it.
    """
    require_onnx("Running an ONNX file", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _QUIET
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        # Its fallback prints the error, with the file's words, and tries the same again.
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except _runtime_errors() as error:
        name = source if isinstance(source, str) else "The model"
        raise FormatError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {str(error).splitlines()[0][:300]}",
            hint="Upgrade it: pip install --upgrade onnxruntime",
        ) from error


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises for a model that it cannot load or run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    return (
        *(states.Fail, states.InvalidProtobuf, states.InvalidGraph, states.NoSuchFile, states.RuntimeException),
        *(states.InvalidArgument, states.NotImplemented),
        UnicodeDecodeError,  # its message has bytes of the file that are no text
    )


def read_onnx_info(path: Path | str) -> tuple[SlimInfo, OnnxInfo]:
    """Read what an ONNX file says about itself.

    Raises:
        FormatError: it is no ONNX file, was not written by fixify, is damaged or is newer.
        UsageError: onnxruntime is not installed.
    """
    require_regular(path, FormatError)
    session = new_session(str(path), optimised=False)
    return _read(path, session.get_modelmeta().custom_metadata_map)


def open_onnx(path: Path | str) -> tuple[SlimInfo, OnnxModel]:
    """Open an ONNX file as a model.

    Raises:
        FormatError: it is no ONNX file, was not written by fixify, is damaged or is newer.
        UsageError: it returns only the K largest values, or it is a head alone; or onnxruntime is not installed.
    """
    require_regular(path, FormatError)
    session = new_session(str(path))
    info, onnx_info = _read(path, session.get_modelmeta().custom_metadata_map)
    if onnx_info.part == "head":
        raise UsageError(
            f"{Path(path).name} is a head alone; it takes features, not images.",
            hint="Export the model: drop --head-only.",
        )
    if onnx_info.top_k is not None:
        raise UsageError(
            f"{Path(path).name} returns the {onnx_info.top_k} largest values only, and fixify needs those of all "
            "classes.",
            hint="Export it again without --top-k.",
        )
    return info, OnnxModel(session, info, onnx_info, Path(path).name)


def _read(path: Path | str, metadata: Mapping[str, str]) -> tuple[SlimInfo, OnnxInfo]:
    if SLIM_KEY not in metadata or ONNX_KEY not in metadata:
        raise FormatError(
            f"{path} was not written by fixify: it does not say how images are prepared for it.",
            hint="Write one from a slim checkpoint: fixify export CKPT --to onnx",
        )
    version = metadata.get(VERSION_KEY)
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {str(version)[:20]}; this fixify reads version {FORMAT_VERSION}.",
            hint="Upgrade: pip install --upgrade fixify",
        )
    try:
        info, onnx_info = info_of_text(metadata[SLIM_KEY]), OnnxInfo.model_validate(parse_json(metadata[ONNX_KEY]))
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(f"The metadata of {path} is damaged: {first['loc']}: {first['msg']}.") from error
    except ValueError as error:
        raise FormatError(f"The metadata of {path} is damaged: {error}.") from error
    if info.is_bare and onnx_info.part == "model":
        raise FormatError(f"The metadata of {path} is damaged: it describes a model, and a classifier without one.")
    return info, onnx_info


class OnnxModel(nn.Module):
    """An exported model that ONNX Runtime runs on the CPU; it has no parameters and is not trained.

    Args:
        session: The session of ONNX Runtime.
        info: What the file says about the model.
        onnx_info: What it says about the graph.
        name: The file's name, for messages.

    Raises:
        FormatError: Input or output of the graph are not those that the metadata describes.
    """

    def __init__(self, session: onnxruntime.InferenceSession, info: SlimInfo, onnx_info: OnnxInfo, name: str) -> None:
        super().__init__()
        self.session = session
        self.name = name
        self.fixify_info = info
        self.onnx_info = onnx_info
        self.input_size = [int(size) for size in info.data_config["input_size"]]
        channels, height, width = self.input_size
        wanted = [height, width, channels] if onnx_info.preprocessing else [channels, height, width]
        inputs, outputs = session.get_inputs(), session.get_outputs()
        shapes = [list(value.shape[1:]) for value in (*inputs, *outputs)]
        kind = "tensor(uint8)" if onnx_info.preprocessing else "tensor(float)"
        kinds = [value.type for value in (*inputs, *outputs)]
        sizes = [value.shape[0] for value in (*inputs, *outputs) if isinstance(value.shape[0], int)]
        values = [len(onnx_info.mean), len(onnx_info.std)] if onnx_info.preprocessing else [channels, channels]
        fits = shapes == [wanted, [info.num_classes]] and kinds == [kind, "tensor(float)"]
        fits = fits and all(size == onnx_info.batch for size in sizes) and values == [channels, channels]
        if not fits:
            raise FormatError(f"{name} does not take {wanted} to {info.num_classes} classes, as its metadata says.")
        self.input_name = inputs[0].name

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of images.

        Args:
            images: Normalised images, float [B, channels, height, width], of the size that the model was exported for.

        Returns:
            float32 [B, C] on the device of the images; logarithms of the probabilities if the model returns those.

        Raises:
            ValueError: The images have another size.
        """
        if list(images.shape[1:]) != self.input_size:
            raise ValueError(f"it was exported for images of {self.input_size}, not {list(images.shape[1:])}.")
        made = self._run(self.prepared(images.detach().cpu().float()))
        if self.onnx_info.softmax:
            made = made.clamp_min(torch.finfo(torch.float32).tiny).log()
        return made.to(images.device)

    def prepared(self, images: Tensor) -> Tensor:
        """Return images as the graph takes them: if it normalises, the pixels that they were made of."""
        if not self.onnx_info.preprocessing:
            return images
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.onnx_info.mean, self.onnx_info.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def _run(self, inputs: Tensor) -> Tensor:
        """Run the graph, in parts if it takes a fixed number of images."""
        size = self.onnx_info.batch
        count = len(inputs)
        if size is None:
            return self._call(inputs)
        missing = -count % size
        if missing:
            inputs = torch.cat([inputs, inputs[-1:].expand(missing, *inputs.shape[1:])])
        return torch.cat([self._call(part) for part in inputs.split(size)])[:count]

    def _call(self, inputs: Tensor) -> Tensor:
        try:
            (made,) = self.session.run(None, {self.input_name: inputs.contiguous().numpy()})
        except _runtime_errors() as error:
            raise FormatError(f"ONNX Runtime cannot run {self.name}: {str(error).splitlines()[0][:300]}") from error
        return torch.from_numpy(made).float()
