"""Operators that move features but do not mix them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import onnx_ir as ir

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.rules.registry import describe, rule
from onnx_quarot.discovery.typing import Def, StatePair, Typing, Use, defs, has_input, ports, uses


@rule("Shape", "Size")
def _shape(t: Typing, n: ir.Node) -> None:
    """Looks at sizes only."""


@rule("ConstantOfShape", "Range")
def _filled(t: Typing, n: ir.Node) -> None:
    """Zeros are zeros in any basis; everything else keeps its own."""
    filled = n.attributes.get("value")
    if n.op_type == "Range" or (filled is not None and filled.as_tensor().numpy().any()):
        t.block_node(n, describe(n, "makes its values from sizes"))


@rule("Identity", "Cast", "Dropout", "Neg")
def _elementwise_linear(t: Typing, n: ir.Node) -> None:
    for axis in range(t.rank(Def(n.outputs[0]))):
        t.tie(Use(n, 0), axis, Def(n.outputs[0]), axis)


@rule("Transpose")
def _transpose(t: Typing, n: ir.Node) -> None:
    out = Def(n.outputs[0])
    for o, i in enumerate(n.attributes.get_ints("perm", list(range(t.rank(out)))[::-1])):
        t.tie(Use(n, 0), i, out, o)


@rule("Reshape", "Flatten", "Unsqueeze", "Squeeze")
def _reshape(t: Typing, n: ir.Node) -> None:
    """Dimensions are grouped where their products agree; in a group the innermost axes carry the basis."""
    x, y = Use(n, 0), Def(n.outputs[0])
    sizes = t.shapes.shape[x.value], t.shapes.shape[y.value]
    if min((*sizes[0], *sizes[1]), default=1) < 1 or prod(sizes[0]) != prod(sizes[1]):  # of nothing, all groups agree
        t.block_node(n, describe(n, "its shape is not understood"))
        return
    for xs, ys in _reshape_groups(*sizes):
        if not xs or not ys:
            continue
        p, q = xs[-1], ys[-1]
        a, b = t.size(x, p), t.size(y, q)
        if len(xs) == len(ys) == 1:
            t.tie(x, p, y, q)
            continue
        if a % b == 0 or b % a == 0:
            t.tie_tiled(x, p, y, q)
        else:
            t.block(x, p, describe(n, f"{a} and {b} features do not nest"))
            t.block(y, q, describe(n, f"{a} and {b} features do not nest"))
        for axis in xs[:-1]:
            t.block(x, axis, describe(n, "an outer axis is merged or split"))
        for axis in ys[:-1]:
            t.block(y, axis, describe(n, "an outer axis is merged or split"))


def _reshape_groups(x: tuple[int, ...], y: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    i = j = 0
    while i < len(x) and j < len(y):
        first_i, first_j, a, b = i, j, x[i], y[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * x[i], i + 1
            else:
                b, j = b * y[j], j + 1
        while i < len(x) and x[i] == 1:
            i += 1
        while j < len(y) and y[j] == 1:
            j += 1
        yield [k for k in range(first_i, i) if x[k] != 1], [k for k in range(first_j, j) if y[k] != 1]


@rule("Expand")
def _expand(t: Typing, n: ir.Node) -> None:
    x, y = Use(n, 0), Def(n.outputs[0])
    lead = t.rank(y) - t.rank(x)
    for axis in range(t.rank(y)):
        if axis >= lead and t.size(x, axis - lead) == t.size(y, axis):
            t.tie(x, axis - lead, y, axis)
        else:
            t.block(y, axis, describe(n, "broadcasts over this axis"))


@rule("Tile")
def _tile(t: Typing, n: ir.Node) -> None:
    """Every axis is repeated as a whole, most of them once."""
    x, y = Use(n, 0), Def(n.outputs[0])
    for axis in range(t.rank(x)):
        if t.size(x, axis) == t.size(y, axis):
            t.tie(x, axis, y, axis)
        elif t.segment(x, axis) is not None:
            t.tie_tiled(x, axis, y, axis)
        else:
            t.block(y, axis, describe(n, "repeats a single feature"))


@rule("Pad")
def _pad(t: Typing, n: ir.Node) -> None:
    """Zeros (or copies) beside the axes it pads; the others keep their basis."""
    x, y = Use(n, 0), Def(n.outputs[0])
    pads = _integers(t, n, 1)
    axes = _integers(t, n, 3) if has_input(n, 3) else list(range(t.rank(x)))
    filled = constant(n.inputs[2]) if has_input(n, 2) else None
    zeros = not has_input(n, 2) or (filled is not None and float(filled.numpy().flat[0]) == 0.0)
    if pads is None or axes is None or (n.attributes.get_string("mode", "constant") == "constant" and not zeros):
        t.block_node(n, describe(n, "what it adds is not known to be zero"))
        return
    padded = {a % t.rank(x) for i, a in enumerate(axes) if pads[i] or pads[i + len(axes)]}
    for a in range(t.rank(x)):
        if a in padded:
            t.block(x, a, describe(n, "pads this axis"))
            t.block(y, a, describe(n, "pads this axis"))
        else:
            t.tie(x, a, y, a)


@rule("Gather")
def _gather(t: Typing, n: ir.Node) -> None:
    """Rows of a table, or a selection along another axis: the other axes keep their basis."""
    x, y = Use(n, 0), Def(n.outputs[0])
    axis = n.attributes.get_int("axis", 0) % t.rank(x)
    inserted = t.rank(Use(n, 1))
    t.block(x, axis, describe(n, "selects along this axis"))
    for a in range(t.rank(x)):
        if a != axis:
            t.tie(x, a, y, a if a < axis else a + inserted - 1)
    for o in range(axis, axis + inserted):
        t.block(y, o, describe(n, "selects along this axis"))


@rule("GatherND")
def _gather_nd(t: Typing, n: ir.Node) -> None:
    """Selects along the leading axes; those behind them keep their basis."""
    x, indices, y = Use(n, 0), Use(n, 1), Def(n.outputs[0])
    lead = n.attributes.get_int("batch_dims", 0) + t.size(indices, t.rank(indices) - 1)
    for a in range(lead):
        t.block(x, a, describe(n, "selects along this axis"))
    kept = t.rank(x) - lead
    for a in range(kept):
        t.tie(x, lead + a, y, t.rank(y) - kept + a)
    for o in range(t.rank(y) - kept):
        t.block(y, o, describe(n, "selects along this axis"))


@rule("Concat")
def _concat(t: Typing, n: ir.Node) -> None:
    y = Def(n.outputs[0])
    axis = n.attributes.get_int("axis") % t.rank(y)
    for a in range(t.rank(y)):
        if a != axis:
            for p in uses(n):
                t.tie(p, a, y, a)
    past, last = n.inputs[0], t.rank(y) - 1
    # A cache that grows: only this model reads what it wrote, so both ends may change basis.
    if past is not None and past.is_graph_input() and y.value.is_graph_output() and t.rank(y) == 4 and axis != last:
        t.states.append(StatePair(past, y.value, last))
    if t.segment(y, axis) is None or any(t.segment(p, axis) is None for p in uses(n)):
        for port in ports(n):
            t.block(port, axis, describe(n, "joins pieces that have no basis"))
        return
    offset = 0
    for p in uses(n):
        t.tie_piece(y, axis, offset, offset + t.size(p, axis), p, axis)
        offset += t.size(p, axis)


@rule("Split")
def _split(t: Typing, n: ir.Node) -> None:
    x = Use(n, 0)
    axis = n.attributes.get_int("axis", 0) % t.rank(x)
    offset = 0
    for y in defs(n):
        for a in range(t.rank(x)):
            if a != axis:
                t.tie(x, a, y, a)
        if t.segment(x, axis) is not None:
            high = offset + t.size(y, axis)
            if t.segment(y, axis) is not None:
                t.tie_piece(x, axis, offset, high, y, axis)
            else:
                t.block(x, axis, describe(n, "cuts off a single feature"), t.segment(x, axis).piece(offset, high))  # type: ignore[union-attr]
        offset += t.size(y, axis)


@rule("Slice")
def _slice(t: Typing, n: ir.Node) -> None:
    """A run of features is a class of its own; a stride, or a cut only known at run time, blocks."""
    x, y = Use(n, 0), Def(n.outputs[0])
    rank = t.rank(x)
    bounds = _slice_bounds(t, n, rank)
    for a in range(rank):
        if a not in bounds:
            t.tie(x, a, y, a)
            continue
        size = t.size(x, a)
        low, high, step = 0, 0, 0
        if (given := bounds[a]) is not None:
            low, high, step = slice(*given).indices(size)
        if step == 1 and high - low == size:
            t.tie(x, a, y, a)
        elif step == 1 and t.segment(x, a) is not None and t.segment(y, a) is not None:
            t.tie_piece(x, a, low, high, y, a)
        else:
            t.block(x, a, describe(n, "takes features one by one, or somewhere"))
            t.block(y, a, describe(n, "takes features one by one, or somewhere"))


def _slice_bounds(t: Typing, n: ir.Node, rank: int) -> dict[int, tuple[int, int, int] | None]:
    """Sliced axis -> (start, end, step), None where they depend on data or on sizes known only at run time."""
    if n.attributes.get("starts") is not None:
        first, last = n.attributes.get_ints("starts", []), n.attributes.get_ints("ends", [])
        axes = n.attributes.get_ints("axes", list(range(len(first))))
        return {a % rank: (s, e, 1) for a, s, e in zip(axes, first, last, strict=True)}
    start, end, along, step = (_integers(t, n, index) for index in range(1, 5))
    if along is None and has_input(n, 3):
        return dict.fromkeys(range(rank))
    count = t.size(Use(n, 1), 0)
    axes = [a % rank for a in (list(range(count)) if along is None else along)]
    if start is None or end is None or (step is None and has_input(n, 4)):
        return dict.fromkeys(axes)
    return dict(zip(axes, zip(start, end, step or [1] * count, strict=True), strict=True))


def _integers(t: Typing, n: ir.Node, index: int) -> list[int] | None:
    if not has_input(n, index):
        return None
    known = t.shapes.constants.get(n.inputs[index])  # type: ignore[arg-type]
    return None if known is None else [int(v) for v in known.ravel()]
