"""Putting a quantized product in the place of a linear layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .editing import GraphNames, take_over
from .normalize import times_length
from .sites import LinearSite, constant_array, drop_unused


def stand_in(names: GraphNames, site: LinearSite, product: ir.Node, length: ir.Value | None = None) -> None:
    """Put `product` in the place of the site's node, with a Gemm's bias behind it; what nothing else reads goes.

    length: of the rows, by which the product is multiplied first.
    """
    graph, node, made = names.graph, site.node, product.outputs[0]
    operands = [value for value in node.inputs[1:] if value is not None]
    added = [product, *behind_product(names, site, made, length)]
    if len(added) > 1:
        made.name = names.unique(f"{node.outputs[0].name}_product")
        made.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, added)
    take_over(node.outputs[0], added[-1].outputs[0])
    graph.remove(node, safe=True)
    for operand in dict.fromkeys(operands):
        drop_unused(graph, operand)


def behind_product(
    names: GraphNames, site: LinearSite, product: ir.Value, length: ir.Value | None = None
) -> list[ir.Node]:
    """What is left to be done to a product without a bias, of rows that were divided by `length` if that is given."""
    back = [] if length is None else [times_length(names, product, length, site.node_name)]
    return [*back, *add_bias(names, site, back[-1].outputs[0] if back else product)]


def add_bias(names: GraphNames, site: LinearSite, product: ir.Value) -> list[ir.Node]:
    """The nodes that add a Gemm's C times its beta to `product`; none for a MatMul."""
    node = site.node
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return []
    beta = np.float32(site.beta)
    array = constant_array(bias)
    nodes: list[ir.Node] = []
    if array is not None:
        bias = names.initializer(ir.Tensor((array * beta).astype(np.float32)), f"{bias.name}_scaled")
    elif beta != 1.0:
        factor = names.initializer(ir.Tensor(np.array(beta)), f"{bias.name}_beta")
        scaled = ir.node("Mul", [bias, factor], name=names.unique(f"{bias.name}_Mul"))
        scaled.outputs[0].name = names.unique(f"{bias.name}_scaled")
        nodes.append(scaled)
        bias = scaled.outputs[0]
    nodes.append(ir.node("Add", [product, bias], name=names.unique(f"{site.node_name}_Add")))
    return nodes
