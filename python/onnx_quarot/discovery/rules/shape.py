"""Operators that move features but do not mix them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import onnx_ir as ir

from onnx_quarot.discovery.basis import Segment
from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.rules.readers import drops
from onnx_quarot.discovery.rules.registry import describe, rule
from onnx_quarot.discovery.rules.selecting import integers, keep, packed_axis, slice_bounds, unpack
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
    if n.op_type == "Dropout" and drops(n):
        t.block_node(n, describe(n, "leaves features out by chance"))
        return
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
        if not xs or not ys or (len(xs) == 1 and _unpacks(t, n, xs[0], ys)):
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


def _unpacks(t: Typing, n: ir.Node, p: int, ys: list[int]) -> bool:
    """One axis becomes several, and what follows selects along one of them, so that its parts never meet: queries, keys
    and values have heads, but no basis, in common.
    """
    x, y = Use(n, 0), Def(n.outputs[0])
    axis, last = packed_axis(t, y.value), t.rank(y) - 1
    whole = t.segment(x, p)
    if axis not in ys or last not in ys or whole is None or t.segment(y, last) is None:
        return False
    sizes = [t.size(y, a) for a in ys]
    place = ys.index(axis)
    pieces = [Segment(sizes[-1]) for _ in range(sizes[place])]
    inner = [Segment.tiled(piece, prod(sizes[place + 1 : -1])) for piece in pieces]
    whole.unify(Segment.tiled(Segment(prod(sizes[place:]), inner), prod(sizes[:place])))
    unpack(t, y.value, axis, Segment(sizes[place] * sizes[-1], pieces))
    t.tie_leaves(x, p, y, last)
    for a in ys[:-1]:
        t.block(y, a, describe(n, "an outer axis is merged or split"))
    return True


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
    pads = integers(t, n, 1)
    axes = integers(t, n, 3) if has_input(n, 3) else list(range(t.rank(x)))
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


@rule("Resize")
def _resize(t: Typing, n: ir.Node) -> None:
    """Interpolates along the axes that change their size, for every feature alike."""
    x, y = Use(n, 0), Def(n.outputs[0])
    if n.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        t.block_node(n, describe(n, "cuts a region out"))
        return
    for a in range(t.rank(x)):
        if t.size(x, a) == t.size(y, a):
            t.tie(x, a, y, a)
        else:
            t.block(x, a, describe(n, "interpolates along this axis"))
            t.block(y, a, describe(n, "interpolates along this axis"))


@rule("Gather")
def _gather(t: Typing, n: ir.Node) -> None:
    """Rows of a table, or a selection along another axis: the other axes keep their basis."""
    x, y = Use(n, 0), Def(n.outputs[0])
    axis = n.attributes.get_int("axis", 0) % t.rank(x)
    inserted = t.rank(Use(n, 1))
    t.block(x, axis, describe(n, "selects along this axis"))
    for a in range(t.rank(x)):
        if a != axis:
            keep(t, n, x, a, y, a if a < axis else a + inserted - 1)
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
        keep(t, n, x, lead + a, y, t.rank(y) - kept + a)
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
    whole, offset = t.segment(x, axis), 0
    single: list[tuple[int, int]] = []  # runs of features that are cut off one by one, as columns of a table are
    for y in defs(n):
        for a in range(t.rank(x)):
            if a != axis:
                keep(t, n, x, a, y, a)
        low, offset = offset, offset + t.size(y, axis)
        if whole is None:
            continue
        if t.segment(y, axis) is not None:
            t.tie_piece(x, axis, low, offset, y, axis)
        elif single and single[-1][1] == low:
            single[-1] = single[-1][0], offset
        else:
            single.append((low, offset))
    if whole is not None:
        for low, high in single:
            t.block(x, axis, describe(n, "cuts off a single feature"), whole.piece(low, high))


@rule("Slice")
def _slice(t: Typing, n: ir.Node) -> None:
    """A run of features is a class of its own; a stride, or a cut only known at run time, blocks."""
    x, y = Use(n, 0), Def(n.outputs[0])
    rank = t.rank(x)
    bounds = slice_bounds(t, n, rank)
    for a in range(rank):
        if a not in bounds:
            keep(t, n, x, a, y, a)
            continue
        size = t.size(x, a)
        low, high, step = 0, 0, 0
        if (given := bounds[a]) is not None:
            low, high, step = slice(*given).indices(size)
        if step == 1 and high - low == size:
            keep(t, n, x, a, y, a)
        elif step == 1 and t.segment(x, a) is not None and t.segment(y, a) is not None:
            t.tie_piece(x, a, low, high, y, a)
        else:
            t.block(x, a, describe(n, "takes features one by one, or somewhere"))
            t.block(y, a, describe(n, "takes features one by one, or somewhere"))
