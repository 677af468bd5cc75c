"""Routers: the linear layers that say which experts a row is sent to.

They are the smallest layers of a mixture, and their rounding errors do not stay small: a row that is sent elsewhere is
another row. They are found from where experts are chosen, back to the layers that this goes by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from .experts import ROUTER
from .sites import LinearSite, constant_root, view_shape

# What there is between a router and the choice: other shapes of its scores, what is made of them, choices among groups.
_VIEWS = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_SCORES = ("Add", "Clip", "Div", "Exp", "Max", "Min", "Mul", "Neg", "Sigmoid", "Softmax", "Softplus", "Sub", "Tanh")
_CHOICES = ("Gather", "GatherElements", "ReduceMax", "ReduceSum", "ScatterElements", "TopK", "Where")
_TOGETHER = ("Concat",)  # a first choice, and a second among the others
_ONE_OF_THEM = ("Equal", "Gather", "OneHot")


def routers(model: ir.Model, sites: Collection[LinearSite]) -> set[str]:
    """The node names of those of `sites` that choose experts: of MoE, matrices that rows pick behind a TopK, or layers
    that take the rows for which they are in its choice.
    """
    nodes = {site.node: site.node_name for site in sites}
    found: set[str] = set()
    seen: set[ir.Value] = set()
    pending = list(_choices(model))
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if node in nodes:
            found.add(nodes[node])
        elif node.domain == "" and node.op_type in (*_VIEWS, *_SCORES, *_CHOICES):
            pending.extend(source for source in node.inputs if source is not None)
    return found


def _choices(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph:
        if (node.domain, node.op_type) == ("com.microsoft", "MoE"):
            chosen = node.inputs[ROUTER]
        elif node.domain == "" and node.op_type in ("Gather", "GatherND") and _picks_matrices(node):
            chosen = _top(node.inputs[1], (*_VIEWS, *_TOGETHER))
        elif (node.domain, node.op_type) == ("", "NonZero"):  # which rows are sent to one of the experts
            chosen = _top(node.inputs[0], (*_VIEWS, *_ONE_OF_THEM))
        else:
            continue
        if chosen is not None:
            yield chosen


def _picks_matrices(node: ir.Node) -> bool:
    found = constant_root(node.inputs[0])
    return found is not None and len(view_shape(*found)) > 2


def _top(indices: ir.Value | None, between: Collection[str]) -> ir.Value | None:
    """What the TopK, or a first ArgMax, chose from whose indices are made these by operators `between`; else None."""
    while indices is not None and (node := indices.producer()) is not None and node.domain == "":
        if node.op_type == "TopK":
            return node.inputs[0] if indices is node.outputs[1] else None
        if node.op_type == "ArgMax":
            return node.inputs[0]
        if node.op_type not in between:
            return None
        indices = node.inputs[0]
    return None
