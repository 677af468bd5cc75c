"""An Einsum that is a linear layer becomes a MatMul with a matrix, which can be quantized.

JAX and models written with einops say projections so: "btd,dhe->bthe" makes heads, "bthe,hed->btd" joins them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.constants import Constant, constant, read_once
from onnx_quarot.discovery.rules.einsum import REST, terms
from onnx_quarot.discovery.shapes import FLOATS
from onnx_quarot.editing import GraphNames, take_over


def write_products(model: ir.Model) -> None:
    """Axes are moved and joined around the product where need be; what is done to constants is computed next."""
    names: GraphNames | None = None
    for node in list(model.graph):
        if node.op_type != "Einsum" or node.domain != "" or len(node.inputs) != 2:
            continue
        views = [constant(value) for value in node.inputs]
        for index in (0, 1):
            view = views[1 - index]
            if views[index] is None and view is not None and (layer := _layer(node, index, view)) is not None:
                names = names or GraphNames(model.graph)
                _write(names, node, index, view, *layer)
                break


def _layer(node: ir.Node, index: int, weight: Constant) -> tuple[str, str, str] | None:
    """The letters of rows, of what is summed, and of what is made; None if there is more to it, or nothing."""
    operands, result = terms(node)
    given, held = operands[index], operands[1 - index]
    if len(held) != len(weight.shape) or REST in held or any(len(set(s)) != len(s) for s in (given, held, result)):
        return None
    summed = "".join(c for c in given if c in held)
    rows, made = "".join(c for c in given if c not in held), "".join(c for c in result if c in held)
    if not (rows and summed and made) or set(summed) & set(made) or set(rows) | set(made) != set(result):
        return None
    if set(held) != set(summed) | set(made):
        return None
    plain = given == rows + summed and result == rows + made
    if REST in rows and not (plain and len(summed) == len(made) == 1):
        return None
    computed = read_once(node.inputs[1 - index]) and weight.dtype != ir.DataType.BFLOAT16
    if weight.dtype not in FLOATS or (len(held) > 2 and not computed):
        return None  # the matrix would be joined anew at every run
    return rows, summed, made


def _write(names: GraphNames, node: ir.Node, index: int, weight: Constant, rows: str, summed: str, made: str) -> None:
    operands, result = terms(node)
    given, held = operands[index], operands[1 - index]
    sizes = dict(zip(held, weight.shape, strict=True))
    x, w, y = node.inputs[index], node.inputs[1 - index], node.outputs[0]
    assert x is not None
    assert w is not None

    def add(op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: Sequence[int]) -> ir.Value:
        step = ir.node(op_type, inputs, attributes, name=names.unique(f"{node.name or y.name}/{name}"))
        step.outputs[0].name, step.outputs[0].type = names.unique(f"{y.name}.{name}"), y.type
        names.graph.insert_before(node, step)
        return step.outputs[0]

    def moved(value: ir.Value, old: str, new: str, name: str) -> ir.Value:
        return value if old == new else add("Transpose", [value], name, perm=[old.index(c) for c in new])

    def shaped(value: ir.Value, shape: list[int], name: str) -> ir.Value:
        target = names.initializer(ir.tensor(np.array(shape, np.int64)), f"{y.name}.{name}_shape")
        return add("Reshape", [value, target], name)

    depth, width = (int(np.prod([sizes[c] for c in letters])) for letters in (summed, made))
    same = [0] * len(rows)  # as long as they are
    x, w = moved(x, given, rows + summed, "rows"), moved(w, held, summed + made, "matrix")
    if len(summed) > 1:
        x = shaped(x, [*same, depth], "joined")
    if len(held) > 2:
        w = shaped(w, [depth, width], "flat_matrix")
    product = ir.node("MatMul", [x, w], name=node.name)
    names.graph.insert_before(node, product)
    out = product.outputs[0]
    out.type = y.type
    if len(made) > 1 or rows + made != result:
        out.name = names.unique(f"{y.name}.product")
    if len(made) > 1:
        out = shaped(out, [*same, *(sizes[c] for c in made)], "parts")
    out = moved(out, rows + made, result, "result")
    take_over(y, out)
    names.graph.remove(node, safe=True)
