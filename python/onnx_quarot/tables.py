"""Quantization of lookup tables: a Gather of rows of a constant matrix reads integers and scales them.

The table of token embeddings is often the largest float tensor left once the linear layers are quantized.
Rows are looked up first and scaled after, so that no more than the rows in use is ever converted:

    Gather(table, ids)  ->  Cast(Gather(integers, ids)) * Gather(scales, ids)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from .editing import GraphNames, take_over
from .errors import ConfigError
from .load import unmap
from .qparams import Array, QuantizedWeight, lazy
from .scheme import TensorSpec
from .sites import apply_view, constant_dtype, constant_tensor, drop_unused, looked_up, view_shape

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
    names = GraphNames(model.graph)
    return [
        report
        for node in tuple(model.graph)
        if node.inputs and node.inputs[0] not in skip
        if (report := _quantize(names, node, spec, min_elements)) is not None
    ]


def _quantize(names: GraphNames, node: ir.Node, spec: TensorSpec, min_elements: int) -> TableReport | None:
    found = looked_up(node)
    if found is None:
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

    _replace(names, node, QuantizedWeight(root.name or "", shape, spec, 0, read, close))
    return TableReport(
        node_name=node.name or node.outputs[0].name or "",
        table=root.name or "",
        rows=shape[0],
        width=shape[1],
        float_bytes=4 * shape[0] * shape[1],
        quantized_bytes=shape[0] * shape[1] * spec.bits // 8,
    )


def _replace(names: GraphNames, node: ir.Node, weight: QuantizedWeight) -> None:
    """The node looks integers up from now on; what it made before stands behind it."""
    (table, ids), rows = node.inputs, node.outputs[0]
    assert table is not None
    integers = names.initializer(weight.tensor(""), f"{weight.name}_rows_quantized")
    # One column, so that gathered scales broadcast over gathered rows.
    column = lazy(lambda: weight.scale()[:, None], ir.DataType.FLOAT, [weight.shape[0], 1], "")
    scales = names.initializer(column, f"{weight.name}_rows_scale")
    base, real, result = node.name or rows.name or "Gather", ir.DataType.FLOAT, rows.name
    floats = names.value(f"{result}_float", real, rows.shape)
    factors = names.value(f"{result}_scale", real)
    added = [
        ir.node("Cast", [rows], {"to": int(real)}, outputs=[floats], name=f"{base}_Cast"),
        ir.node("Gather", [scales, ids], {"axis": 0}, outputs=[factors], name=f"{base}_Scale"),
        ir.node("Mul", [floats, factors], name=f"{base}_Mul"),
    ]
    take_over(rows, added[-1].outputs[0])
    added[0].replace_input_with(0, rows)  # which was taken for a reader
    node.replace_input_with(0, integers)
    rows.name, rows.type = names.unique(f"{result}_quantized"), ir.TensorType(weight.dtype)
    names.graph.insert_after(node, added)
    drop_unused(names.graph, table)
