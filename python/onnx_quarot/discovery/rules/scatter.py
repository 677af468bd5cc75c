"""Rows that are written into others: what the experts of a mixture made of their tokens, for one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.rules.registry import describe, rule
from onnx_quarot.discovery.typing import Def, Typing, Use


@rule("ScatterND")
def _scatter_nd(t: Typing, n: ir.Node) -> None:
    """Writes slices: the axes behind those it selects along keep their basis, which the slices share."""
    x, indices, updates, y = Use(n, 0), Use(n, 1), Use(n, 2), Def(n.outputs[0])
    if not _sums(n):
        t.block_node(n, describe(n, "combines features by another operation than a sum"))
        return
    lead = t.size(indices, t.rank(indices) - 1)
    for axis in range(t.rank(x)):
        if axis < lead:
            t.block(x, axis, describe(n, "selects along this axis"))
            t.block(y, axis, describe(n, "selects along this axis"))
        else:
            t.tie(x, axis, y, axis)
            t.tie(updates, t.rank(updates) - t.rank(x) + axis, y, axis)
    for axis in range(t.rank(updates) - t.rank(x) + lead):
        t.block(updates, axis, describe(n, "selects along this axis"))


@rule("ScatterElements")
def _scatter_elements(t: Typing, n: ir.Node) -> None:
    """Writes elements one by one; whole rows where the indices of a row are one and the same."""
    x, updates, y = Use(n, 0), Use(n, 2), Def(n.outputs[0])
    if not _sums(n):
        t.block_node(n, describe(n, "combines features by another operation than a sum"))
        return
    along = n.attributes.get_int("axis", 0) % t.rank(x)
    for axis in range(t.rank(x)):
        if axis != along and _repeated(t, n.inputs[1], axis) and t.size(updates, axis) == t.size(x, axis):
            t.tie(x, axis, y, axis)
            t.tie(updates, axis, y, axis)
            continue
        for port in (x, updates, y):
            t.block(port, axis, describe(n, "writes features one by one"))


def _sums(n: ir.Node) -> bool:
    return n.attributes.get_string("reduction", "none") in ("none", "add")


def _repeated(t: Typing, indices: ir.Value | None, axis: int) -> bool:
    """Whether indices are the same all along an axis."""
    if indices is None:
        return False
    known = t.shapes.constants.get(indices)
    if known is not None:
        return bool(np.all(known == np.take(known, [0], axis)))
    node = indices.producer()
    if node is None or node.op_type != "Expand" or node.domain != "" or node.inputs[0] is None:
        return False
    before, after = t.shapes.shape.get(node.inputs[0]), t.shapes.shape[indices]
    if before is None or not t.shapes.known(node.inputs[0]):
        return False
    place = axis - len(after) + len(before)
    return place < 0 or (before[place] == 1 and t.shapes.static[node.inputs[0]][place])
