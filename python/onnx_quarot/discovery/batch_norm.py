"""Batch normalization of rows: at inference a factor and an offset a feature, which the layers beside it take in.

Exporters fold those behind convolutions; behind linear layers, often with reshapes between, they are left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.constants import constant, read_once, root_tensor
from onnx_quarot.discovery.rules.readers import absorb, takes_bias, writer
from onnx_quarot.discovery.shapes import FLOATS, Shapes
from onnx_quarot.discovery.typing import Typing, has_output
from onnx_quarot.editing import GraphNames, take_over
from onnx_quarot.sites import drop_unused

Array = np.ndarray[Any, Any]
_TYPES = FLOATS - {ir.DataType.BFLOAT16}  # that constants are computed in


def fold_batch_norms(model: ir.Model, *, behind: bool = False) -> None:
    """Multiply the layer in front by the factor, an expression of constants that is computed next; the offset is added
    where the norm was. ``behind``: the norms that only layers read become a product and a sum, which fold into those
    where they are rotated.
    """
    graph = model.graph
    norms = [n for n in graph if n.op_type == "BatchNormalization" and n.domain == ""]
    if not norms:
        return
    t, names = Typing(graph, Shapes(model)), GraphNames(graph)
    for node in norms:
        parameters = _parameters(t, node)
        x, y = node.inputs[0], node.outputs[0]
        if parameters is None or x is None:
            continue
        found = None if behind else writer(t, x)
        if found is not None and all(_may_change(use.value) for use, _ in found.constants):
            for use, axis in found.constants:
                column = parameters[0].reshape(-1, *[1] * (len(t.shapes.shape[use.value]) - 1 - axis))
                product = ir.node("Mul", [use.value, names.initializer(ir.tensor(column), f"{y.name}.factor")])
                product.outputs[0].name = names.unique(f"{y.name}.folded")
                graph.insert_before(use.node, product)
                use.node.replace_input_with(use.index, product.outputs[0])
        elif behind and _absorbed(t, y):
            product = ir.node("Mul", [x, names.initializer(ir.tensor(parameters[0]), f"{y.name}.factor")])
            x = product.outputs[0]
            x.name, x.type = names.unique(f"{y.name}.scaled"), y.type
            graph.insert_before(node, product)
        else:
            continue
        total = ir.node("Add", [x, names.initializer(ir.tensor(parameters[1]), f"{y.name}.offset")], name=node.name)
        graph.insert_before(node, total)
        take_over(y, total.outputs[0])
        held = dict.fromkeys(v for v in node.inputs[1:] if v is not None)
        graph.remove(node, safe=True)
        for value in held:
            drop_unused(graph, value)


def _parameters(t: Typing, node: ir.Node) -> tuple[Array, Array] | None:
    """Factor and offset; None for a norm of something else than rows, or whose parameters are not constants."""
    x, views = node.inputs[0], [constant(v) for v in node.inputs[1:5]]
    if x is None or not t.shapes.known(x) or len(t.shapes.shape[x]) != 2 or len(views) < 4:
        return None
    if node.attributes.get_int("training_mode", 0) or any(has_output(node, i) for i in range(1, len(node.outputs))):
        return None
    if any(v is None or v.small() is None or v.dtype not in _TYPES for v in views):
        return None
    scale, bias, mean, variance = (v.numpy().astype(np.float64) for v in views if v is not None)
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    dtype = t.shapes.dtype[x].numpy()
    return factor.astype(dtype), (bias - mean * factor).astype(dtype)


def _may_change(value: ir.Value) -> bool:
    """Whether a product with the constant is computed beforehand, and is no second copy of it."""
    view = constant(value)
    return view is not None and read_once(value) and root_tensor(view.root).dtype == view.dtype and view.dtype in _TYPES


def _absorbed(t: Typing, value: ir.Value) -> bool:
    found = absorb(t, value, biased=True)
    return found is not None and found.bias is None and all(map(takes_bias, found.readers))
