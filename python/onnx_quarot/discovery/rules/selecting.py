"""Selections along an axis, and reshapes of packed features whose parts are then selected one by one."""

from __future__ import annotations

import onnx_ir as ir

from onnx_quarot.discovery.basis import Segment
from onnx_quarot.discovery.typing import Def, Typing, Use, has_input

Ranges = list[tuple[int, int]]


def selection(t: Typing, n: ir.Node) -> tuple[int, Ranges] | None:
    """The axis along which a node selects by numbers that are known, and the run each output takes; else None."""
    x = Use(n, 0)
    if n.domain != "" or not t.known(x) or not all(t.known(Def(v)) for v in n.outputs):
        return None
    if n.op_type == "Split":
        axis, offset, runs = n.attributes.get_int("axis", 0) % t.rank(x), 0, []
        for v in n.outputs:
            runs.append((offset, offset + t.size(Def(v), axis)))
            offset = runs[-1][1]
        return axis, runs
    if n.op_type == "Slice":
        bounds = {a: None if given is None else slice(*given).indices(t.size(x, a))
                  for a, given in slice_bounds(t, n, t.rank(x)).items()}  # fmt: skip
        cut = [(a, run) for a, run in bounds.items() if run != (0, t.size(x, a), 1)]
        if len(cut) != 1 or cut[0][1] is None or cut[0][1][2] != 1 or cut[0][1][0] >= cut[0][1][1]:
            return None
        return cut[0][0], [cut[0][1][:2]]
    if n.op_type not in ("Gather", "GatherND"):
        return None
    given = integers(t, n, 1)
    if given is None or len(given) != 1 or n.attributes.get_int("batch_dims", 0) != 0:
        return None
    axis = n.attributes.get_int("axis", 0) % t.rank(x)
    first = given[0] % t.size(x, axis)
    return axis, [(first, first + 1)]


def packed_axis(t: Typing, value: ir.Value) -> int | None:
    """The axis, not the last, along which everything that reads ``value`` selects (perhaps behind a Transpose)."""
    if value.is_graph_output() or not t.shapes.known(value):
        return None
    found = set()
    for use in value.uses():
        node = use.node
        if node.domain == "" and node.op_type in ("Shape", "Size"):
            continue
        if use.idx != 0 or node.graph is not t.graph:
            return None
        if node.domain == "" and node.op_type == "Transpose":
            perm = _permutation(t, node)
            inner = packed_axis(t, node.outputs[0]) if perm[-1] == len(perm) - 1 else None
            found.add(None if inner is None else perm[inner])
        else:
            selected = selection(t, node)
            found.add(None if selected is None else selected[0])
    axis = found.pop() if len(found) == 1 else None
    if axis is None or axis == len(t.shapes.shape[value]) - 1 or not t.shapes.static[value][axis]:
        return None
    return axis


def unpack(t: Typing, value: ir.Value, axis: int, pieces: Segment) -> None:
    """Every index along ``axis`` of ``value`` has a piece of its own as the basis of the last axis."""
    t.packed.add(value)
    t.segments[value, len(t.shapes.shape[value]) - 1] = pieces
    for use in value.uses():
        if use.node.op_type == "Transpose":
            unpack(t, use.node.outputs[0], _permutation(t, use.node).index(axis), pieces)


def keep(t: Typing, n: ir.Node, x: Use, a: int, y: Def, b: int) -> None:
    """Axis ``a`` is axis ``b`` of what was selected along another one."""
    if x.value not in t.packed or a != t.rank(x) - 1:
        t.tie(x, a, y, b)
    elif (selected := selection(t, n)) is not None:
        size = t.size(x, a)
        for i in range(*selected[1][n.outputs.index(y.value)]):
            t.tie_piece(x, a, i * size, (i + 1) * size, y, b)


def _permutation(t: Typing, n: ir.Node) -> list[int]:
    rank = t.rank(Use(n, 0))
    return list(n.attributes.get_ints("perm", list(range(rank))[::-1]))


def slice_bounds(t: Typing, n: ir.Node, rank: int) -> dict[int, tuple[int, int, int] | None]:
    """Sliced axis -> (start, end, step), None where they depend on data or on sizes known only at run time."""
    if n.attributes.get("starts") is not None:
        first, last = n.attributes.get_ints("starts", []), n.attributes.get_ints("ends", [])
        axes = n.attributes.get_ints("axes", list(range(len(first))))
        return {a % rank: (s, e, 1) for a, s, e in zip(axes, first, last, strict=True)}
    start, end, along, step = (integers(t, n, index) for index in range(1, 5))
    if along is None and has_input(n, 3):
        return dict.fromkeys(range(rank))
    count = t.size(Use(n, 1), 0)
    axes = [a % rank for a in (list(range(count)) if along is None else along)]
    if start is None or end is None or (step is None and has_input(n, 4)):
        return dict.fromkeys(axes)
    return dict(zip(axes, zip(start, end, step or [1] * count, strict=True), strict=True))


def integers(t: Typing, n: ir.Node, index: int) -> list[int] | None:
    if not has_input(n, index):
        return None
    known = t.shapes.constants.get(n.inputs[index])  # type: ignore[arg-type]
    return None if known is None else [int(v) for v in known.ravel()]
