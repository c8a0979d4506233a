"""Export a model by torch.onnx and put the graphs of its fixed heads into it.

torch.onnx would write a head as the product with a large constant, or as the operations that rebuild one. Therefore
each head is replaced by one call of a custom operator, which becomes one node, which becomes the graph of `onnx_head`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnxscript
import torch
from onnx import ModelProto, NodeProto
from onnx.defs import OpSchema
from torch import Tensor, nn

from fixify.errors import ExportError
from fixify.exporting.onnx_head import MICROSOFT, Graph, add_head
from fixify.exporting.onnx_models import BATCH, IR_VERSION
from fixify.exporting.parts import HeadParts
from fixify.surgery import replace_module

_DOMAIN = "fixify"


@torch.library.custom_op("fixify::exported_head", mutates_args=())
def _exported_head(x: Tensor, index: int, num_classes: int, channel_dim: int) -> Tensor:
    """Stand for a head while the model is traced; never computed."""
    raise NotImplementedError


@_exported_head.register_fake
def _(x: Tensor, index: int, num_classes: int, channel_dim: int) -> Tensor:
    shape = list(x.shape)
    shape[channel_dim] = num_classes
    return x.new_empty(shape)


_HEAD = onnxscript.values.Op(
    onnxscript.values.Opset(_DOMAIN, 1),
    "Head",
    OpSchema(
        "Head",
        _DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("x", "T")],
        outputs=[OpSchema.FormalParameter("logits", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            OpSchema.Attribute("index", OpSchema.AttrType.INT, ""),
            OpSchema.Attribute("rank", OpSchema.AttrType.INT, ""),
        ],
    ),
)


class _Slot(nn.Module):
    """What stands in the place of a head while the model is traced."""

    def __init__(self, index: int, parts: HeadParts) -> None:
        super().__init__()
        self.index, self.parts = index, parts

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.fixify.exported_head(x, self.index, self.parts.num_classes, self.parts.channel_dim)
        return found


def export_backbone(
    model: nn.Module,
    heads: Mapping[str, HeadParts],
    images: Tensor,
    *,
    opset: int,
    portable: bool,
    fixed_batch: bool,
    as_stored: bool,
) -> ModelProto:
    """Export a model with fixed heads.

    Args:
        model: The model in eval mode on the CPU, in float32. Its heads are replaced, so it cannot be used any more.
        heads: The heads by path.
        images: An example of the input, float32 [B, channels, height, width], B >= 2 unless the batch is fixed.
        opset: Version of the standard operators.
        portable: Whether only standard operators are used.
        fixed_batch: Whether the model takes B images and no other number.
        as_stored: Keep the weights as they are. Otherwise BatchNorm is merged into convolutions, which gives weights
            that half precision does not hold exactly.

    Returns:
        A model that maps "images" to "logits".

    Raises:
        ExportError: torch.onnx cannot export the model.
    """
    for index, (path, parts) in enumerate(heads.items()):
        replace_module(model, path, _Slot(index, parts))
    made = _traced(model, images, opset, fixed_batch, as_stored)
    _put_in(made, list(heads.values()), portable)
    _tidy(made)
    return made


def _traced(model: nn.Module, images: Tensor, opset: int, fixed_batch: bool, as_stored: bool) -> ModelProto:
    def translated(x: object, index: int, num_classes: int, channel_dim: int) -> object:
        rank = len(x.shape)  # type: ignore[attr-defined]
        return _HEAD(x, index=index, rank=rank)

    def export() -> torch.onnx.ONNXProgram | None:
        return torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=None if fixed_batch else ({0: torch.export.Dim.DYNAMIC},),
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            custom_translation_table={torch.ops.fixify.exported_head.default: translated},
            verbose=False,
            optimize=not as_stored,
        )

    # The exporter reports its steps on stdout, and warns of what it does about older versions of itself.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                program = export()
            except torch.onnx.OnnxExporterError:
                if not _write_out_attention_(model):
                    raise
                program = export()
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                f"torch.onnx cannot export this model: {_reason(error)}",
                hint=None if fixed_batch else "It may export for one number of images: --batch 1",
            ) from error
    if program is None:
        raise ExportError("torch.onnx returned no model.")
    made: ModelProto = program.model_proto
    found = {each.domain: each.version for each in made.opset_import}.get("", 0)
    if found != opset:
        raise ExportError(f"torch.onnx wrote opset {found}, not {opset}.", hint=f"Add --opset {found}.")
    return made


def _write_out_attention_(model: nn.Module) -> bool:
    """Let timm's attention layers use matrix products and a softmax; return whether one used PyTorch's fused operation.

    The exporter has no form of that for features in windows or groups (five dimensions), nor with some biases.
    """
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    return bool(fused)


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost reason of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _put_in(made: ModelProto, heads: Sequence[HeadParts], portable: bool) -> None:
    """Replace the nodes that stand for heads by their graphs."""
    nodes: list[NodeProto] = []
    used: set[int] = set()
    for node in made.graph.node:
        if node.domain != _DOMAIN:
            nodes.append(node)
            continue
        values = {attribute.name: attribute.i for attribute in node.attribute}
        # A model may call its head more than once; the constants are shared.
        graph = Graph(f"head{values['index']}/" if values["index"] not in used else f"head{values['index']}/again/")
        used.add(values["index"])
        parts = heads[values["index"]]
        add_head(graph, parts, node.input[0], node.output[0], rank=values["rank"], portable=portable)
        nodes += graph.nodes
        made.graph.initializer.extend(graph.constants.values())
    if len(used) < 1:
        raise ExportError("The exported graph does not use the model's head.")
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    others = [each for each in made.opset_import if each.domain in ("", MICROSOFT)]
    del made.opset_import[:]
    made.opset_import.extend(others)
    if any(heads[index].rounds_features(portable=portable) for index in used) and len(others) == 1:
        made.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))


def _tidy(made: ModelProto) -> None:
    """Remove what describes this machine and the Python source, and name the batch dimension."""
    made.producer_name, made.ir_version = "fixify", min(made.ir_version, IR_VERSION)
    del made.metadata_props[:]
    graph = made.graph
    graph.name = "fixify"
    del graph.value_info[:]
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*graph.input, *graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if not first.HasField("dim_value"):
            first.dim_param = BATCH
