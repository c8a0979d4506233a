"""Complete ONNX models: the head alone, or graphs joined to one model with metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fixify.exporting.onnx_head import MICROSOFT, Graph, add_head
from fixify.exporting.parts import HeadParts

IR_VERSION = 10
"""Version of the file format, which ONNX Runtime reads from 1.18 on."""
BATCH = "batch"
"""Name of the first dimension of inputs and outputs."""
_WORTH_A_CAST = 64  # numbers


def head_model(heads: Mapping[str, HeadParts], *, opset: int, portable: bool) -> ModelProto:
    """Build a model of heads alone.

    Args:
        heads: The heads by path.
        opset: Version of the standard operators.
        portable: Whether only standard operators are used.

    Returns:
        A model that maps "features" to "logits", float32 [batch, N] to [batch, C], or [batch, N, height, width] to
        [batch, C, height, width] for feature maps. With several heads the names are "features.PATH" and "logits.PATH".
    """
    joined = Graph("")
    inputs, outputs = [], []
    for index, (path, parts) in enumerate(heads.items()):
        suffix = "" if len(heads) == 1 else f".{path}"
        graph = Graph(f"head{index}/")
        sizes = ["height", "width"] if parts.channel_dim == 1 else []
        add_head(graph, parts, f"features{suffix}", f"logits{suffix}", rank=2 + len(sizes), portable=portable)
        joined.nodes += graph.nodes
        joined.constants |= graph.constants
        inputs.append(_floats(f"features{suffix}", [BATCH, parts.num_features, *sizes]))
        outputs.append(_floats(f"logits{suffix}", [BATCH, parts.num_classes, *sizes]))
    made = helper.make_graph(joined.nodes, "fixify", inputs, outputs, list(joined.constants.values()))
    opsets = [helper.make_opsetid("", opset)]
    if any(parts.rounds_features(portable=portable) for parts in heads.values()):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    return helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fixify")


def _floats(name: str, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def add_preprocessing(made: ModelProto, mean: Sequence[float], std: Sequence[float]) -> None:
    """Let a model take pixels, uint8 [batch, height, width, channels], instead of normalised images.

    Args:
        made: A model whose input "images" is float32 [batch, channels, height, width]; changed in place.
        mean: Mean of each channel, of values between 0 and 1.
        std: Standard deviation of each channel.
    """
    (old,) = made.graph.input
    sizes = [each.dim_value or each.dim_param for each in old.type.tensor_type.shape.dim]
    batch, channels, height, width = sizes
    graph = Graph("preprocessing/")
    value = graph.node("Cast", "pixels", to=TensorProto.FLOAT)
    value = graph.node("Mul", value, graph.constant("factor", 1 / (255 * np.asarray(std)), np.float32))
    value = graph.node("Sub", value, graph.constant("shift", np.asarray(mean) / np.asarray(std), np.float32))
    graph.node("Transpose", value, perm=[0, 3, 1, 2], output=old.name)
    new = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [batch, height, width, channels])
    old.CopyFrom(new)
    _insert(made, 0, graph)


def add_outputs(made: ModelProto, *, softmax: bool, top_k: int | None) -> None:
    """Let a model return probabilities instead of logits, or its largest values and their classes.

    Args:
        made: A model whose output "logits" (or "probabilities") is float32 [batch, C]; changed in place.
        softmax: Whether values are probabilities.
        top_k: How many values are returned, largest first; None for all, in class order.
    """
    graph = Graph("output/")
    value = made.graph.output[0].name
    batch = made.graph.output[0].type.tensor_type.shape.dim[0]
    rows = batch.dim_value or batch.dim_param
    count = made.graph.output[0].type.tensor_type.shape.dim[1].dim_value if top_k is None else top_k
    name = "probabilities" if softmax else value
    if softmax:
        value = graph.node("Softmax", value, axis=-1, output="probabilities" if top_k is None else None)
    outputs = [_floats(f"top_{name}" if top_k is not None else name, [rows, count])]
    if top_k is not None:
        outputs.append(helper.make_tensor_value_info("top_classes", TensorProto.INT64, [rows, count]))
        k = graph.constant("k", [top_k], np.int64)
        graph.nodes.append(helper.make_node("TopK", [value, k], [each.name for each in outputs], name="output/TopK"))
    del made.graph.output[:]
    made.graph.output.extend(outputs)
    _insert(made, len(made.graph.node), graph)


def store_lossless(made: ModelProto, dtype: torch.dtype) -> None:
    """Store float32 constants in half precision where that is exact, with a `Cast` that runs when the file is loaded.

    Args:
        made: The model, changed in place.
        dtype: float16 or bfloat16.
    """
    kind = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}[dtype]
    casts = []
    for constant in made.graph.initializer:
        if constant.data_type != TensorProto.FLOAT or math.prod(constant.dims) < _WORTH_A_CAST:
            continue
        values = torch.from_numpy(numpy_helper.to_array(constant).copy())
        half = values.to(dtype)
        if not torch.equal(half.float(), values):
            continue
        name = constant.name
        raw = half.contiguous().view(torch.int16).numpy().tobytes()
        constant.CopyFrom(TensorProto(dims=constant.dims, data_type=kind, raw_data=raw, name=f"{name}/stored"))
        casts.append(helper.make_node("Cast", [constant.name], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = [*casts, *made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend(nodes)


def add_metadata(made: ModelProto, values: Mapping[str, str]) -> None:
    """Write metadata into a model, in place of what is there."""
    helper.set_model_props(made, dict(values))


def _insert(made: ModelProto, at: int, graph: Graph) -> None:
    nodes = list(made.graph.node)
    nodes[at:at] = graph.nodes
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(graph.constants.values())
