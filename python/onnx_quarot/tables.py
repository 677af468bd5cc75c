"""Quantization of lookup tables: a Gather of rows of a constant matrix reads integers and scales them.

The table of token embeddings is often the largest float tensor left once the linear layers are quantized.
Rows are looked up first and scaled after, so that no more than the rows in use is ever converted:

    Gather(table, ids)  ->  Cast(Gather(integers, ids)) * Gather(scales, ids)

So are the matrices of experts in exports that pick each token's own, by Gather or GatherND, and multiply by them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from .editing import GraphNames, take_over
from .errors import ConfigError
from .load import unmap
from .qparams import Array, QuantizedWeight, reshaped
from .scheme import TensorSpec
from .sites import apply_view, constant_dtype, constant_root, constant_tensor, drop_unused, looked_up, view_shape

TABLE_SPEC = TensorSpec(bits=8, signed=True, symmetric=True, per_channel=True)


@dataclass(frozen=True)
class TableReport:
    """What became of one table. Bytes are of its values, without scales; rows are those of all its matrices."""

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

    A table is a float32 constant of rank 2 or more and at least `min_elements` values, read directly or through
    Transpose, Cast or Identity (a tied embedding), by a Gather over axis 0, or a GatherND of whole rows, with indices
    that are not constant. Where a MatMul multiplies these rows, its results are scaled. Other readers of the constant
    keep it. `skip`: constants that stay. Integers are evaluated when the model is saved.
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
    found = looked_up(node) or _picked(node)
    if found is None:
        return None
    root, view = found
    shape = view_shape(root, view)
    if len(shape) < 2 or prod(shape) < min_elements or constant_dtype(root, view) != ir.DataType.FLOAT:
        return None
    rows, width = prod(shape[:-1]), shape[-1]
    tensor = constant_tensor(root)
    assert tensor is not None

    def read() -> Array:
        return apply_view(tensor.numpy(), view).reshape(rows, width)

    def close() -> None:
        unmap(tensor)

    _replace(names, node, QuantizedWeight(root.name or "", (rows, width), spec, 0, read, close), shape)
    return TableReport(
        node_name=node.name or node.outputs[0].name or "",
        table=root.name or "",
        rows=rows,
        width=width,
        float_bytes=4 * rows * width,
        quantized_bytes=rows * width * spec.bits // 8,
    )


def _picked(node: ir.Node) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """As `looked_up`, of a GatherND whose indices leave at least the last axis whole."""
    if node.op_type != "GatherND" or node.domain != "" or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    ids, found = node.inputs[1], constant_root(node.inputs[0])
    if ids is None or ids.shape is None or found is None or constant_root(ids) is not None:
        return None
    depth = ids.shape[-1] if len(ids.shape) > 0 else None
    return found if isinstance(depth, int) and depth < len(view_shape(*found)) else None


def _replace(names: GraphNames, node: ir.Node, weight: QuantizedWeight, shape: Sequence[int]) -> None:
    """The node looks integers up from now on; what it made before stands behind it. shape: the table's."""
    (table, ids), rows = node.inputs, node.outputs[0]
    assert table is not None
    integers = names.initializer(reshaped(weight.tensor(""), shape), f"{weight.name}_rows_quantized")
    # One column, so that gathered scales broadcast over gathered rows.
    column = reshaped(weight.scale_tensor(""), [*shape[:-1], 1])
    scales = names.initializer(column, f"{weight.name}_rows_scale")
    base, real, result = node.name or rows.name or node.op_type, ir.DataType.FLOAT, rows.name
    floats = names.value(f"{result}_float", real, rows.shape)
    factors = names.value(f"{result}_scale", real)
    product = _product_of_rows(rows)
    cast = ir.node("Cast", [rows], {"to": int(real)}, outputs=[floats], name=f"{base}_Cast")
    lookup = ir.node(node.op_type, [scales, ids], outputs=[factors], name=f"{base}_Scale")
    # Products of rows are fewer than the rows' values.
    scaled = floats if product is None else product.outputs[0]
    multiply = ir.node("Mul", [scaled, factors], name=f"{base}_Mul")
    if product is None:
        take_over(rows, multiply.outputs[0])
    else:
        product.replace_input_with(0, floats)
        take_over(scaled, multiply.outputs[0])
        scaled.name, scaled.type = names.unique(f"{product.name or result}_unscaled"), ir.TensorType(real)
        multiply.replace_input_with(0, scaled)  # which was taken for a reader, as below
    cast.replace_input_with(0, rows)
    node.replace_input_with(0, integers)
    rows.name, rows.type = names.unique(f"{result}_quantized"), ir.TensorType(weight.dtype)
    names.graph.insert_after(node, [cast, lookup])
    names.graph.insert_after(lookup if product is None else product, [multiply])
    drop_unused(names.graph, table)


def _product_of_rows(rows: ir.Value) -> ir.Node | None:
    """The MatMul that alone reads looked up rows, each of which it multiplies by something; None if there is none."""
    uses = tuple(rows.uses())
    if len(uses) != 1 or rows.is_graph_output():
        return None
    ((node, index),) = uses
    other = node.inputs[1] if len(node.inputs) > 1 else None
    # Behind a vector there would be no axis of rows' values left.
    matrices = other is not None and other.shape is not None and len(other.shape) >= 2
    return node if (node.domain, node.op_type, index) == ("", "MatMul", 0) and matrices else None
