"""Products with matrices: linear layers, convolutions, scores and weighted values of attention."""

from __future__ import annotations

import onnx_ir as ir

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.rules.readers import linear_slot
from onnx_quarot.discovery.rules.registry import MICROSOFT, describe, rule
from onnx_quarot.discovery.typing import Def, Expansion, Kind, Slot, Typing, Use, has_input

_MOVES = ("Gather", "GatherND", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Identity", "Cast")


@rule("MatMul")
@rule("FusedMatMul", domain=MICROSOFT)
def _matmul(t: Typing, n: ir.Node) -> None:
    a, b, y = Use(n, 0), Use(n, 1), Def(n.outputs[0])
    if t.rank(a) < 2 or t.rank(b) < 2:
        t.block_node(n, describe(n, "multiplies a vector"))
        return
    if n.attributes.get_int("transBatchA", 0) or n.attributes.get_int("transBatchB", 0):
        t.block_node(n, describe(n, "transposes batch axes"))
        return
    rows, inner_a = (-1, -2) if n.attributes.get_int("transA", 0) else (-2, -1)
    inner_b, columns = (-1, -2) if n.attributes.get_int("transB", 0) else (-2, -1)
    slot = linear_slot(n)
    t.contract(a, inner_a, b, inner_b, slot)
    t.tie(b, columns, y, -1)
    t.tie(a, rows, y, -2)
    for port in (a, b, y):
        t.block_port(port, describe(n, "a batch axis"), except_axes=[-1, -2])
    if not _is_weight(a.value) and not _is_weight(b.value):
        if (segment := t.segment(b, columns)) is not None:
            t.mark(segment, "R2")  # weighted values; for scores this is the axis of the keys' positions
        if (segment := t.segment(a, inner_a)) is not None:
            t.mark(segment, "R3")
    if slot is not None:
        t.read(slot, inner_a)


def _is_weight(value: ir.Value | None) -> bool:
    """A constant, or what is selected from one (the matrices of the experts a token goes to)."""
    if constant(value) is not None:
        return True
    node = None if value is None else value.producer()
    return node is not None and node.domain == "" and node.op_type in _MOVES and _is_weight(node.inputs[0])


@rule("Gemm")
def _gemm(t: Typing, n: ir.Node) -> None:
    a, b, y = Use(n, 0), Use(n, 1), Def(n.outputs[0])
    trans_a, trans_b = n.attributes.get_int("transA", 0), n.attributes.get_int("transB", 0)
    slot = linear_slot(n)
    t.contract(a, 0 if trans_a else 1, b, 1 if trans_b else 0, slot)
    t.tie(b, 0 if trans_b else 1, y, 1)
    t.tie(a, 1 if trans_a else 0, y, 0)
    if has_input(n, 2):
        c = Use(n, 2)
        rank = t.rank(c)
        if rank and t.size(c, rank - 1) == t.size(y, 1):
            t.tie(c, rank - 1, y, 1)
        elif t.constant(c) is not None:
            t.expansions.append(Expansion(c, y, 1))
        else:
            t.block(y, 1, describe(n, "its C is broadcast over this axis"))
        t.block(y, 0, describe(n, "rows of a Gemm with C"))
        if rank == 2:
            t.block(c, 0, describe(n, "rows of a Gemm with C"))
    if slot is not None:
        t.read(slot, 1)


@rule("FusedGemm", domain=MICROSOFT)
def _fused_gemm(t: Typing, n: ir.Node) -> None:
    """A Gemm with an activation behind it."""
    _gemm(t, n)
    t.block_port(Def(n.outputs[0]), describe(n, "its activation is not linear"))


@rule("Conv")
def _conv(t: Typing, n: ir.Node) -> None:
    """A convolution is linear along its channels, whatever its kernel, unless channels come in groups."""
    if n.attributes.get_int("group", 1) != 1:
        t.block_node(n, describe(n, "its channels come in groups"))
        return
    x, w, y = Use(n, 0), Use(n, 1), Def(n.outputs[0])
    t.tie(x, 1, w, 1, Kind.CONTRACT)
    t.tie(w, 0, y, 1)
    if has_input(n, 2):
        t.tie(Use(n, 2), 0, y, 1)
    for port in (x, y):
        t.block_port(port, describe(n, "positions"), except_axes=[1])
    t.block_port(w, describe(n, "positions"), except_axes=[0, 1])
    if t.constant(w) is not None and t.constant(x) is None:
        t.read(Slot(n, 0, 1, 1), 1)


@rule("FusedConv", domain=MICROSOFT)
def _fused_conv(t: Typing, n: ir.Node) -> None:
    """A convolution with a sum or an activation behind it."""
    if len(n.inputs) > 3:
        t.block_node(n, describe(n, "a sum and an activation inside"))
        return
    _conv(t, n)
    t.block_port(Def(n.outputs[0]), describe(n, "its activation is not linear"))


@rule("AveragePool", "GlobalAveragePool")
def _average(t: Typing, n: ir.Node) -> None:
    x, y = Use(n, 0), Def(n.outputs[0])
    t.tie(x, 1, y, 1)
    for port in (x, y):
        t.block_port(port, describe(n, "positions"), except_axes=[1])
