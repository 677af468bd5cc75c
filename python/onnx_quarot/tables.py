"""Quantization of lookup tables: a Gather of rows of a constant matrix reads integers and scales them.

The table of token embeddings is often the largest float tensor left once the linear layers are quantized.
Rows are looked up first and scaled after, so that no more than the rows in use is ever converted:

    Gather(table, ids)  ->  Cast(Gather(integers, ids)) * Gather(scales, ids)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .errors import ConfigError
from .load import unmap
from .qparams import Array, QuantizedWeight
from .scheme import TensorSpec
from .sites import apply_view, constant_dtype, constant_root, constant_tensor, drop_unused, view_shape

TABLE_SPEC = TensorSpec(bits=8, signed=True, symmetric=True, per_channel=True)


@dataclass(frozen=True)
class TableReport:
    """What became of one table. Bytes are of its values, without scales."""

    node_name: str
    table: str
    rows: int
    width: int
    float_bytes: int
    quantized_bytes: int


def quantize_tables(
    model: ir.Model,
    spec: TensorSpec = TABLE_SPEC,
    *,
    min_elements: int = 2**16,
    skip: Collection[ir.Value] = (),
) -> list[TableReport]:
    """Quantize, in place, every table that a Gather of the main graph looks rows up in; one scale a row.

    A table is a float32 constant of rank 2 and at least `min_elements` values, read directly or through
    Transpose, Cast or Identity (a tied embedding), by a Gather over axis 0 with indices that are not
    constant. Other readers of the constant keep it. `skip`: constants that stay. Integers are evaluated when the model
    is saved.
    ConfigError for a spec that is not signed, symmetric, 8 or 16 bits wide and per channel.
    """
    if not (spec.signed and spec.symmetric and spec.per_channel and spec.bits >= 8):
        raise ConfigError(f"spec: {spec} does not suit a table; use 8 or 16 bits, signed, symmetric, per channel")
    return [
        report
        for node in tuple(model.graph)
        if node.inputs and node.inputs[0] not in skip
        if (report := _quantize(model.graph, node, spec, min_elements)) is not None
    ]


def _quantize(graph: ir.Graph, node: ir.Node, spec: TensorSpec, min_elements: int) -> TableReport | None:
    if node.op_type != "Gather" or node.domain != "":
        return None
    axis = node.attributes.get("axis")
    found = constant_root(node.inputs[0])
    if found is None or constant_root(node.inputs[1]) is not None or (axis is not None and axis.as_int() != 0):
        return None
    root, view = found
    shape = view_shape(root, view)
    if len(shape) != 2 or shape[0] * shape[1] < min_elements or constant_dtype(root, view) != ir.DataType.FLOAT:
        return None
    tensor = constant_tensor(root)
    assert tensor is not None

    def read() -> Array:
        return apply_view(tensor.numpy(), view)

    def close() -> None:
        unmap(tensor)

    weight = QuantizedWeight(root.name or "", shape, spec, 0, read, close)
    _replace(graph, node, weight)
    return TableReport(
        node_name=node.name or node.outputs[0].name or "",
        table=root.name or "",
        rows=shape[0],
        width=shape[1],
        float_bytes=4 * shape[0] * shape[1],
        quantized_bytes=shape[0] * shape[1] * spec.bits // 8,
    )


def _replace(graph: ir.Graph, node: ir.Node, weight: QuantizedWeight) -> None:
    table, ids = node.inputs[0], node.inputs[1]
    assert table is not None
    result = node.outputs[0]
    taken = set(graph.initializers) | {v.name for v in graph.inputs} | {v.name for n in graph for v in n.outputs}

    def unique(name: str) -> str:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.add(candidate)
        return candidate

    integers = _initializer(graph, weight.tensor(unique(f"{weight.name}_rows_quantized")))
    # One column, so that gathered scales broadcast over gathered rows.
    scales = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(weight.scale()[:, None])),
        ir.DataType.FLOAT,
        ir.Shape([weight.shape[0], 1]),
        name=unique(f"{weight.name}_rows_scale"),
    )
    scale_table = _initializer(graph, scales)
    name = node.name or result.name or "Gather"
    node.replace_input_with(0, integers)
    rows, result_name = result, result.name
    readers, outputs = tuple(rows.uses()), [i for i, output in enumerate(graph.outputs) if output is rows]
    floats = ir.Value(name=unique(f"{result_name}_float"), type=ir.TensorType(ir.DataType.FLOAT), shape=rows.shape)
    row_scales = ir.Value(name=unique(f"{result_name}_scale"), type=ir.TensorType(ir.DataType.FLOAT))
    scaled = ir.Value(name=result_name, type=ir.TensorType(ir.DataType.FLOAT), shape=rows.shape)
    rows.name, rows.type = unique(f"{result_name}_quantized"), ir.TensorType(weight.dtype)
    to = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    added = [
        ir.Node("", "Cast", [rows], [to], outputs=[floats], name=f"{name}_Cast"),
        ir.Node(
            "",
            "Gather",
            [scale_table, ids],
            [ir.AttrInt64("axis", 0)],
            outputs=[row_scales],
            name=f"{name}_Scale",
        ),
        ir.Node("", "Mul", [floats, row_scales], outputs=[scaled], name=f"{name}_Mul"),
    ]
    graph.insert_after(node, added)
    for reader, index in readers:
        reader.replace_input_with(index, scaled)
    for index in outputs:
        graph.outputs[index] = scaled
    drop_unused(graph, table)


def _initializer(graph: ir.Graph, tensor: ir.LazyTensor) -> ir.Value:
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape)))
    value.const_value = tensor
    graph.register_initializer(value)
    return value
