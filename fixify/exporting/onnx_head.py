"""The ONNX graph of a fixed head, made of small constants so that the file keeps the saving.

Packed constants are unpacked by a `Gather` from a table of 256 rows, which ONNX Runtime computes once, when it loads
the file. Products with packed signs are `com.microsoft.MatMulNBits`, for which a table widens each sign to the two bits
that ONNX Runtime holds in memory; that operator rounds the features to 8 bits. The portable form has only standard
operators, is exact, and holds the signs as floats in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fixify.exporting.parts import First, HeadParts, Picked, Signs, Table, Transform, smallest
from fixify.heads.normalisation import NORM_EPSILON

MICROSOFT = "com.microsoft"
BLOCK = 128
"""Weights per block of `MatMulNBits`. With 128, 64 and 32 ONNX Runtime takes its fast kernels (16 and 256: 80 times
slower); one length per class is applied after the product, so the size of a block does not change the result."""
_INT8 = 4  # accuracy_level: products of 8-bit features; exact products take about 100 times as long
_BITS = 2  # bits per weight; ONNX Runtime refuses 1
_MINUS, _PLUS = 1, 3  # levels of 2 bits that stand for -1 and +1: the zero point is 2


class Graph:
    """Nodes and constants of an ONNX graph under construction. Names begin with a prefix, so graphs can be joined.

    Args:
        prefix: Beginning of all names.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def constant(self, name: str, values: Any, dtype: Any = None) -> str:
        """Add a constant once, and return its name."""
        full = f"{self.prefix}{name}"
        if full not in self.constants:
            array = np.ascontiguousarray(np.asarray(values, dtype=dtype))
            self.constants[full] = numpy_helper.from_array(array, full)
        return full

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, and return the name of that."""
        output = f"{self.prefix}{operator.lower()}_{len(self.nodes)}" if output is None else output
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes))
        return output

    def floats(self, name: str, values: np.ndarray) -> str:
        """Add integers that are converted to float32 when the file is loaded."""
        return self.node("Cast", self.constant(name, values), to=TensorProto.FLOAT)

    def shape(self, sizes: Sequence[int]) -> str:
        """Add a shape for `Reshape`."""
        return self.constant("shape_" + "x".join(map(str, sizes)).replace("-", "m"), sizes, np.int64)

    def unpacked(self, name: str, packed: np.ndarray, width: int) -> str:
        """Add packed signs that become float32 [..., width] of +-1 when the file is loaded."""
        table = np.int8(1) - np.int8(2) * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).view(np.int8)
        index = self.node("Cast", self.constant(name, packed), to=TensorProto.INT32)
        signs = self.node("Gather", self.constant("signs_of_byte", table), index, axis=0)
        signs = self.node("Cast", signs, to=TensorProto.FLOAT)
        length = packed.shape[-1] * 8
        signs = self.node("Reshape", signs, self.shape([*packed.shape[:-1], length]))
        return signs if length == width else self.sliced(signs, 0, width)

    def sliced(self, value: str, start: int, stop: int) -> str:
        """Add a cut of the last dimension."""
        first, last = self.constant(f"at_{start}", [start], np.int64), self.constant(f"at_{stop}", [stop], np.int64)
        return self.node("Slice", value, first, last, self.constant("last_axis", [-1], np.int64))

    def repeated(self, value: str, rank: int, signs: Signs) -> str:
        """Add a copy of the features for each plane of signs, padded to whole bytes and times the plane's weight."""
        padding = signs.plane_width - signs.width
        if padding:
            pads = self.constant("padding_of_planes", [0] * rank + [0] * (rank - 1) + [padding], np.int64)
            value = self.node("Pad", value, pads)
        weighted = [
            value if weight == 1 else self.node("Mul", value, self.constant(f"plane_{weight}", weight, np.float32))
            for weight in signs.planes
        ]
        return self.node("Concat", *weighted, axis=-1)

    def two_bits(self, name: str, packed: np.ndarray, width: int) -> str:
        """Add packed signs in the layout that `MatMulNBits` takes: uint8 [C, blocks, BLOCK / 4]."""
        blocks = -(-width // BLOCK)
        padding = blocks * BLOCK // 8 - packed.shape[1]
        index = self.node("Cast", self.constant(name, packed), to=TensorProto.INT32)
        if padding:
            index = self.node("Pad", index, self.constant("padding_of_codes", [0, 0, 0, padding], np.int64))
        wide = self.node("Gather", self.constant("levels_of_byte", _levels()), index, axis=0)
        return self.node("Reshape", wide, self.shape([len(packed), blocks, BLOCK // 4]))


def add_head(graph: Graph, parts: HeadParts, value: str, output: str, *, rank: int, portable: bool) -> None:
    """Add the nodes of a head.

    Args:
        graph: The graph.
        parts: The head.
        value: Name of its input, float32 [..., N], or feature maps [B, N, H, W].
        output: Name of its output.
        rank: Number of dimensions of the input.
        portable: Whether only standard operators are used.
    """
    maps = parts.channel_dim == 1 and rank > 2
    if maps:
        value = graph.node("Transpose", value, perm=[0, *range(2, rank), 1])
    if parts.mean is not None:
        value = graph.node("Sub", value, graph.constant("mean", parts.mean))
    if parts.std is not None:
        value = graph.node("Div", value, graph.constant("std", parts.std))
    if parts.normalize:
        norm = graph.node("ReduceL2", value, graph.constant("last_axis", [-1], np.int64), keepdims=1)
        norm = graph.node("Max", norm, graph.constant("smallest_norm", NORM_EPSILON, np.float32))
        value = graph.node("Div", value, norm)
    value = _product(graph, parts.product, value, rank, not parts.rounds_features(portable=portable))
    if parts.gains is None:
        value = graph.node("Mul", value, graph.constant("scale", parts.scale, np.float32))
    else:
        gains = graph.floats("gains", parts.gains)
        step = graph.constant("gain_step", parts.scale / 255, np.float32)
        value = graph.node("Mul", value, graph.node("Mul", gains, step))
    if parts.bias is not None:
        value = graph.node("Add", value, graph.constant("bias", parts.bias))
    if maps:
        graph.node("Transpose", value, perm=[0, rank - 1, *range(1, rank - 1)], output=output)
    else:
        graph.node("Identity", value, output=output)


def _product(graph: Graph, product: Picked | Signs | Table | First, value: str, rank: int, portable: bool) -> str:
    match product:
        case Picked():
            return _picked(graph, product, value, rank)
        case Signs():
            if product.rotation is not None and product.rotation_signs is not None:
                order = product.rotation.order
                signs = graph.unpacked("rotation_signs", product.rotation_signs, order)
                value = _transformed(graph, product.rotation, graph.node("Mul", value, signs), rank)
                if product.width < order:
                    value = graph.sliced(value, 0, product.width)
            if product.directions is not None and product.columns is not None and product.factors is not None:
                value = graph.node("MatMul", value, graph.floats("directions", product.directions.T))
                columns = graph.node("Cast", graph.constant("columns", smallest(product.columns)), to=TensorProto.INT64)
                value = graph.node("Gather", value, columns, axis=-1)
                value = graph.node("Mul", value, graph.constant("factors", product.factors))
            return _signed(graph, product, value, rank, portable)
        case Table(codes):
            return graph.node("MatMul", value, graph.constant("codes", codes.T))
        case First(count):
            return graph.sliced(value, 0, count)


def _picked(graph: Graph, picked: Picked, value: str, rank: int) -> str:
    order, transform = picked.transform.order, picked.transform
    blocks = 1
    if transform.padding:
        pads = graph.constant("padding", [0] * rank + [0] * (rank - 1) + [transform.padding], np.int64)
        value = graph.node("Pad", value, pads)
    if picked.block_signs is not None:
        blocks = len(picked.block_signs)
        signs = graph.unpacked("block_signs", picked.block_signs, order)
        if blocks > 1:
            value = graph.node("Unsqueeze", value, graph.constant("before_last_axis", [-2], np.int64))
            rank += 1
        else:
            signs = graph.node("Reshape", signs, graph.shape([order]))
        value = graph.node("Mul", value, signs)
    value = _transformed(graph, transform, value, rank)
    if blocks > 1:
        value = graph.node("Reshape", value, graph.shape([0] * (rank - 2) + [blocks * order]))
    first = int(picked.position[0])
    if np.array_equal(picked.position, np.arange(first, first + len(picked.position))):
        value = graph.sliced(value, first, first + len(picked.position))
    else:
        index = graph.node("Cast", graph.constant("position", smallest(picked.position)), to=TensorProto.INT64)
        value = graph.node("Gather", value, index, axis=-1)
    if picked.negative is None:
        return value
    if picked.negative.all():
        return graph.node("Neg", value)
    return graph.node("Mul", value, graph.unpacked("negative", np.packbits(picked.negative), len(picked.negative)))


def _transformed(graph: Graph, transform: Transform, value: str, rank: int) -> str:
    """Add the product with H_a (x) H_b: two small products on the features as a matrix [a, b]."""
    a, b = len(transform.left), len(transform.right)
    lead = [0] * (rank - 1)  # 0 keeps a dimension
    value = graph.node("Reshape", value, graph.shape([*lead, a, b]))
    value = graph.node("MatMul", value, graph.floats("right", transform.right.T))
    if a > 1:
        value = graph.node("MatMul", graph.floats("left", transform.left), value)
    return graph.node("Reshape", value, graph.shape([*lead, a * b]))


def _signed(graph: Graph, signs: Signs, value: str, rank: int, portable: bool) -> str:
    count, width = len(signs.packed), signs.read_width
    if len(signs.planes) > 1:
        value = graph.repeated(value, rank, signs)
    if portable:
        table = graph.unpacked("codes", signs.packed, width)
        return graph.node("MatMul", value, graph.node("Transpose", table, perm=[1, 0]))
    blocks = -(-width // BLOCK)
    levels = graph.two_bits("codes", signs.packed, width)
    ones = graph.node(
        "ConstantOfShape",
        graph.constant("num_blocks", [count * blocks], np.int64),
        value=helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
    )
    return graph.node(
        "MatMulNBits",
        value,
        levels,
        ones,
        domain=MICROSOFT,
        K=width,
        N=count,
        bits=_BITS,
        block_size=BLOCK,
        accuracy_level=_INT8,
    )


def _levels() -> np.ndarray:
    """Build the table from a byte of 8 signs, highest bit first, to 16 bits of levels, lowest bits first: [256, 2]."""
    minus = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    levels = np.where(minus, _MINUS, _PLUS).astype(np.uint8).reshape(256, 2, 4)
    return (levels << (2 * np.arange(4, dtype=np.uint8))).sum(axis=2, dtype=np.uint8)
