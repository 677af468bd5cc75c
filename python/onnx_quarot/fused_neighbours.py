"""What stands before and behind a QLinear and becomes part of it: the normalization of its rows, and the sum with the
residual stream.

A row's integers do not change with its length, so a root mean square norm without weights is a factor of the row's
scale; and a sum costs nothing while the products are in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from .custom_op import DOMAIN
from .editing import take_over
from .qlinear import OP_TYPE, QLinearSpec, add_qlinear
from .sites import constant_array, drop_unused, readers

_MS = "com.microsoft"


def absorb_neighbours(model: ir.Model, made: Mapping[ir.Node, QLinearSpec]) -> None:
    """Take norms and sums into the QLinear nodes `made`, of float32, in place.

    That is `SkipSimplifiedLayerNormalization(residual, QLinear(...))` and `SimplifiedLayerNormalization` with weights
    of one (a rotation leaves them so) whose normalized output only such nodes read. Shapes of sums have to be known to
    be the same. Anything else stays as it is.
    """
    nodes = _Nodes(model, made)
    for node in tuple(model.graph):
        if (node.domain, node.op_type) == (_MS, "SkipSimplifiedLayerNormalization"):
            nodes.absorb_skip_norm(node)
        elif (node.domain, node.op_type) == ("", "SimplifiedLayerNormalization"):
            nodes.absorb_norm(node)
    used = {node.op_identifier() for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    for identifier in [key for key in model.functions if key[0] == DOMAIN and key not in used]:  # transforms, too
        del model.functions[identifier]


class _Nodes:
    def __init__(self, model: ir.Model, made: Mapping[ir.Node, QLinearSpec]) -> None:
        self._model, self._specs = model, dict(made)
        self._summed: set[ir.Node] = set()
        # Nodes are replaced where they stand, so that this stays an order.
        self._places = {node: place for place, node in enumerate(model.graph)}

    def absorb_skip_norm(self, node: ir.Node) -> None:
        epsilon, total = self._norm_of(node, weight=2), node.outputs[3] if len(node.outputs) > 3 else None
        if epsilon is None or any(value is not None for value in node.inputs[3:]):
            return
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:3]):
            return
        for first, second in ((0, 1), (1, 0)):
            residual, product = node.inputs[first], node.inputs[second]
            if residual is None or product is None or not self._takes_sum(product, residual, node):
                continue
            linear = product.producer()
            assert linear is not None
            weight = node.inputs[2]
            assert weight is not None
            spec = replace(self._specs[linear], has_bias=True)
            whole = self._rebuild(linear, spec, 3, residual)
            made = whole.producer()
            assert made is not None
            self._summed.add(made)
            if total is not None:
                take_over(total, whole)
            else:  # as where discovery takes the norm apart: the product it replaces is another value
                whole.name = f"{node.outputs[0].name}/sum_0"
            self._normalize(node, whole, epsilon)
            self._model.graph.remove(node, safe=True)
            drop_unused(self._model.graph, weight)
            return

    def absorb_norm(self, node: ir.Node) -> None:
        epsilon, x, weight = self._norm_of(node, weight=1), node.inputs[0], node.inputs[1]
        if epsilon is None or x is None or weight is None:
            return
        if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            return
        self._normalize(node, x, epsilon)
        self._model.graph.remove(node, safe=True)
        drop_unused(self._model.graph, weight)

    def _norm_of(self, node: ir.Node, weight: int) -> float | None:
        """The epsilon of a norm over the last axis that is read by our nodes alone and has weights of one."""
        factors = None if node.inputs[weight] is None else constant_array(node.inputs[weight])
        if factors is None or not np.all(factors == 1) or node.attributes.get_int("axis", -1) != -1:
            return None
        y = node.outputs[0]
        for reader, index in y.uses():
            if reader not in self._specs or index != 0 or self._specs[reader].epsilon is not None:
                return None
        return None if y.is_graph_output() or not y.uses() else node.attributes.get_float("epsilon", None)

    def _takes_sum(self, product: ir.Value, residual: ir.Value, reader: ir.Node) -> bool:
        linear, other = product.producer(), residual.producer()
        if linear not in self._specs or linear is None or list(readers(product)) != [reader]:
            return False
        spec = self._specs[linear]
        if product is residual or product.is_graph_output() or spec.gated or spec.splits or linear in self._summed:
            return False
        if other is not None and self._places[other] > self._places[linear]:
            return False
        known = None if product.shape is None else [_name(dimension) for dimension in product.shape]
        return known is not None and None not in known and product.shape == residual.shape

    def _normalize(self, norm: ir.Node, x: ir.Value, epsilon: float) -> None:
        for reader in tuple(readers(norm.outputs[0])):
            self._rebuild(reader, replace(self._specs[reader], epsilon=epsilon), 0, x)

    def _rebuild(self, node: ir.Node, spec: QLinearSpec, index: int, value: ir.Value) -> ir.Value:
        """The first output of the node that takes this one's place, with another input at `index`."""
        inputs = [*node.inputs, *[None] * (index + 1 - len(node.inputs))]
        inputs[index] = value
        made = add_qlinear(self._model, spec, inputs, node.name or OP_TYPE)
        self._model.graph.insert_before(node, made)
        for old, new in zip(node.outputs, made.outputs, strict=True):
            take_over(old, new)
        replaced = node.inputs[index] if index < len(node.inputs) else None
        self._model.graph.remove(node, safe=True)
        if replaced is not None and replaced.is_initializer():
            drop_unused(self._model.graph, replaced)
        self._specs[made] = spec
        self._places[made] = self._places[node]
        if node in self._summed:
            self._summed.add(made)
        return made.outputs[0]


def _name(dimension: int | ir.SymbolicDim) -> int | str | None:
    return dimension if isinstance(dimension, int) else dimension.value
