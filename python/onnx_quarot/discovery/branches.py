"""Branches that are always taken: an If whose condition every input of the model agrees on becomes that branch.

Exporters write one where a model's own code asks for a shape. What they ask is often decided once the graph is whole: a
fixed size is what it is, and queries and keys of one sequence are equally many.
"""

from __future__ import annotations

import onnx_ir as ir

from onnx_quarot.discovery.shapes import Array, Shapes, by_name
from onnx_quarot.editing import GraphNames, take_over

# What only moves numbers about: every element of the result is one of the operands'.
_SELECTS = frozenset(
    ("Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
)
_SUMS = frozenset(("Add", "Sub", "Mul", "Div"))
_DECIDES = frozenset(
    ("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Neg", "Not", "Or", "Xor")
)


def resolve_branches(model: ir.Model) -> None:
    """Put the branch that is always taken in place of its If, and again for what was inside."""
    while any(node.op_type == "If" and node.domain == "" for node in model.graph):
        proof = Proof(Shapes(model, (by_name,)))
        decided = [(node, taken) for node in model.graph if (taken := proof.branch(node)) is not None]
        if not decided:
            return
        for node, taken in decided:
            _inline(model.graph, node, taken)


class Proof:
    """What holds for every length the model can be given. The walks behind ``shapes`` saw two lengths each: an equality
    of dimensions that is met by both is one of expressions, an inequality may be a coincidence.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def branch(self, node: ir.Node) -> ir.Graph | None:
        condition = node.inputs[0] if node.op_type == "If" and node.domain == "" else None
        value = None if condition is None else self.number(condition)
        if value is None or value.size != 1:
            return None
        return node.attributes["then_branch" if bool(value.flat[0]) else "else_branch"].as_graph()

    def number(self, value: ir.Value) -> Array | None:
        """What the value is for every length; None where that is not certain."""
        return self._shapes.constants[value] if self.certain(value) else None

    def certain(self, value: ir.Value) -> bool:
        """The same for every length."""
        if value not in self._shapes.constants:
            return False
        node = value.producer()
        if node is None:
            return value.is_initializer() and not value.is_graph_input()
        if self._selected(value):
            return True
        if node.domain != "" or node.op_type not in _SUMS | _DECIDES | _SELECTS:
            return False
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type == "Equal" and self._shapes.constants[value].all() and all(map(self._dimensions, inputs)):
            return True
        return all(map(self.certain, inputs))

    def _selected(self, value: ir.Value) -> bool:
        """Made of dimensions and constants as they are: what is equal in both walks is no symbol."""
        return self._made_of(value, _SELECTS)

    def _dimensions(self, value: ir.Value) -> bool:
        """An expression in dimensions and constants."""
        return value in self._shapes.values and self._made_of(value, _SELECTS | _SUMS)

    def _made_of(self, value: ir.Value, operators: frozenset[str]) -> bool:
        node = value.producer()
        if node is None:
            return value.is_initializer() and not value.is_graph_input()
        if node.domain != "" or value not in self._shapes.values:
            return False
        if node.op_type in ("Shape", "Size"):
            return True
        return node.op_type in operators and all(self._made_of(v, operators) for v in node.inputs if v is not None)


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    names = GraphNames(graph)
    results, nodes = list(branch.outputs), list(branch)
    for value in list(branch.initializers.values()):
        del branch.initializers[str(value.name)]
        value.name = names.unique(str(value.name))
        graph.register_initializer(value)
    for value in (output for inner in nodes for output in inner.outputs if output.name):
        value.name = names.unique(str(value.name))
    branch.outputs.clear()
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, results, strict=True):
        same = ir.node("Identity", [new], name=f"{node.name}/{old.name}")
        graph.insert_before(node, same)
        take_over(old, same.outputs[0])
    graph.remove(node, safe=True)
