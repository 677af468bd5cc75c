"""The legality table: what each operator says about the bases of its axes.

A rule states ties (these two axes share a basis) and blocks (this axis keeps its own, because ...); nothing else. It is
written once an operator, and everything that can be rotated falls out of the table. An operator that is not in it
blocks every axis it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from onnx_quarot.discovery.basis import Segment
from onnx_quarot.discovery.constants import constant, uniform
from onnx_quarot.discovery.typing import (
    Def,
    Expansion,
    Kind,
    Port,
    Scale,
    StatePair,
    Typing,
    Use,
    defs,
    has_input,
    has_output,
    ports,
    uses,
)

Rule = Callable[[Typing, ir.Node], None]
RULES: dict[tuple[str, str], Rule] = {}


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update({(domain, name): function for name in names})
        return function

    return register


def apply_rules(t: Typing) -> None:
    """Walk the graph once and let every operator state its facts."""
    for node in t.graph:
        if all(constant(v) is not None for v in node.outputs):
            continue  # a view of a constant: its readers see through it
        if not any(v is not None and t.shapes.is_float(v) for v in [*node.inputs, *node.outputs]):
            continue
        if any(not t.known(p) for p in ports(node) if t.shapes.is_float(p.value) or isinstance(p, Def)):
            t.block_node(node, f"{node.op_type} {node.name!r}: a shape is unknown")
        elif (found := RULES.get((node.domain, node.op_type))) is not None:
            found(t, node)
        else:
            t.block_node(node, f"{node.op_type} {node.name!r} is not in the table")
    _block_inner_uses(t)


def _block_inner_uses(t: Typing) -> None:
    """Whatever a subgraph (If, Loop) captures keeps its basis."""
    for value, axis in list(t.segments):
        for use in value.uses():
            if use.node.graph is not t.graph:
                t.block(Use(use.node, use.idx), axis, f"captured by a subgraph of {use.node.name!r}")


def describe(node: ir.Node, why: str) -> str:
    return f"{node.op_type} {node.name!r}: {why}"


# ---------------------------------------------------------------------------------------------------------------------
# Operators that move features but do not mix them.


@rule("Shape", "Size")
def _shape(t: Typing, n: ir.Node) -> None:
    """Looks at sizes only."""


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
    for xs, ys in _reshape_groups(t.shapes.shape[x.value], t.shapes.shape[y.value]):
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


@rule("Concat")
def _concat(t: Typing, n: ir.Node) -> None:
    y = Def(n.outputs[0])
    axis = n.attributes.get_int("axis") % t.rank(y)
    for a in range(t.rank(y)):
        if a != axis:
            for p in uses(n):
                t.tie(p, a, y, a)
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
            t.tie_piece(x, axis, offset, offset + t.size(y, axis), y, axis)
        offset += t.size(y, axis)


# ---------------------------------------------------------------------------------------------------------------------
# Sums and products.


def _broadcast_axes(t: Typing, n: ir.Node) -> Iterator[tuple[int, list[tuple[Use, int | None]]]]:
    """For every output axis the operands' axes; None where an operand is broadcast over it."""
    y = Def(n.outputs[0])
    for o in range(t.rank(y)):
        operands: list[tuple[Use, int | None]] = []
        for p in uses(n):
            axis = o - (t.rank(y) - t.rank(p))
            operands.append((p, axis if axis >= 0 and t.size(p, axis) == t.size(y, o) else None))
        yield o, operands


@rule("Add", "Sub", "Sum")
def _add(t: Typing, n: ir.Node) -> None:
    y = Def(n.outputs[0])
    for o, operands in _broadcast_axes(t, n):
        if t.segment(y, o) is None:
            continue
        for p, axis in operands:
            if axis is not None:
                t.tie(p, axis, y, o)
            elif t.constant(p) is not None:
                t.expansions.append(Expansion(p, y, o))
            else:
                t.block(y, o, describe(n, "an operand is broadcast over this axis"))


@rule("Mul", "Div")
def _mul(t: Typing, n: ir.Node) -> None:
    """A factor that does not depend on the feature preserves; one a feature folds into the readers; a product
    blocks.
    """
    y = Def(n.outputs[0])
    for o, operands in _broadcast_axes(t, n):
        if t.segment(y, o) is None:
            continue
        full = [(p, axis) for p, axis in operands if axis is not None]
        factors = [(p, axis) for p, axis in full if t.constant(p) is not None and (n.op_type == "Mul" or p.index == 1)]
        if len(full) == 1:
            if n.op_type == "Div" and full[0][0].index == 1:
                t.block(full[0][0], full[0][1], describe(n, "divides by this tensor"))
                t.block(y, o, describe(n, "divides by a tensor of features"))
            else:
                t.tie(full[0][0], full[0][1], y, o)
            continue
        if len(full) == 2 and len(factors) == 1:
            (factor, factor_axis), (data, data_axis) = factors[0], next(f for f in full if f != factors[0])
            view = t.constant(factor)
            assert view is not None
            if uniform(view):
                t.tie(data, data_axis, y, o)
                t.block(factor, factor_axis, describe(n, "a uniform factor"))
                continue
            readers = absorbing_readers(t, n.outputs[0])
            if readers and n.op_type == "Mul" and o == t.rank(y) - 1 and view.size == t.size(y, o):
                t.tie(data, data_axis, y, o, Kind.SCALE)
                t.block(factor, factor_axis, describe(n, "a factor that is folded"))
                t.scales.append(Scale(n, factor.index, y, readers))
                continue
            why = "a factor a feature that not every reader absorbs"
        else:
            why = "a product of two tensors"
        for p, axis in full:
            t.block(p, axis, describe(n, why))
        t.block(y, o, describe(n, why))


@rule("Pow")
def _pow(t: Typing, n: ir.Node) -> None:
    """x^2 whose only use is a mean or sum over the feature axis is a length: the same in every orthonormal basis."""
    x, y = Use(n, 0), n.outputs[0]
    last = t.rank(x) - 1
    exponent = constant(n.inputs[1])
    square = exponent is not None and exponent.size == 1 and float(exponent.numpy().flat[0]) == 2.0
    consumers = [u.node for u in y.uses()]
    if square and consumers and not y.is_graph_output() and all(_reduces_only(t, c, last) for c in consumers):
        t.block_port(x, describe(n, "not the feature axis"), except_axes=[last])
        t.squares.add(y)
    else:
        t.block_node(n, describe(n, "not linear"))


def _reduces_only(t: Typing, n: ir.Node, axis: int) -> bool:
    if n.op_type not in ("ReduceMean", "ReduceSum") or n.domain != "":
        return False
    given = n.attributes.get_ints("axes", None)
    if given is None and has_input(n, 1):
        known = t.shapes.constants.get(n.inputs[1])  # type: ignore[arg-type]
        given = None if known is None else [int(a) for a in known.ravel()]
    return given is not None and [a % (axis + 1) for a in given] == [axis]


@rule("ReduceMean", "ReduceSum")
def _reduce(t: Typing, n: ir.Node) -> None:
    if n.inputs[0] not in t.squares:
        t.block_node(n, describe(n, "mixes features"))


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers.


def is_linear(n: ir.Node) -> bool:
    """A MatMul or Gemm with a constant matrix."""
    if n.domain != "" or n.op_type not in ("MatMul", "Gemm"):
        return False
    weight = constant(n.inputs[1])
    return weight is not None and len(weight.shape) == 2 and not n.attributes.get_int("transA", 0)


def absorbing_readers(t: Typing, value: ir.Value) -> tuple[ir.Node, ...]:
    """All readers of ``value`` if every one is a linear layer (through operators that keep the last axis), else
    none.
    """
    found: list[ir.Node] = []
    if value.is_graph_output() or not value.uses():
        return ()
    for use in value.uses():
        node = use.node
        if node.op_type == "Shape":
            continue
        if node.graph is t.graph and is_linear(node) and use.idx == 0:
            found.append(node)
        elif use.idx == 0 and node.graph is t.graph and _keeps_last_axis(t, node):
            further = absorbing_readers(t, node.outputs[0])
            if not further:
                return ()
            found += further
        else:
            return ()
    return tuple(dict.fromkeys(found))


def _keeps_last_axis(t: Typing, node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or not (t.shapes.known(x) and t.shapes.known(y)):
        return False
    if node.op_type == "Gather":
        rank = len(t.shapes.shape[x])
        return node.attributes.get_int("axis", 0) % rank != rank - 1
    return node.op_type in ("Identity", "Cast", "Reshape") and t.shapes.shape[x][-1:] == t.shapes.shape[y][-1:]


@rule("MatMul")
def _matmul(t: Typing, n: ir.Node) -> None:
    a, b, y = Use(n, 0), Use(n, 1), Def(n.outputs[0])
    if t.rank(a) < 2 or t.rank(b) < 2:
        t.block_node(n, describe(n, "multiplies a vector"))
        return
    t.tie(a, -1, b, -2, Kind.CONTRACT)
    t.tie(b, -1, y, -1)
    t.tie(a, -2, y, -2)
    for port in (a, b, y):
        t.block_port(port, describe(n, "a batch axis"), except_axes=[-1, -2])
    if is_linear(n):
        t.read(a, -1)


@rule("Gemm")
def _gemm(t: Typing, n: ir.Node) -> None:
    a, b, y = Use(n, 0), Use(n, 1), Def(n.outputs[0])
    trans_a, trans_b = n.attributes.get_int("transA", 0), n.attributes.get_int("transB", 0)
    t.tie(a, 0 if trans_a else 1, b, 1 if trans_b else 0, Kind.CONTRACT)
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
    if is_linear(n):
        t.read(a, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation.


def _rms_norm(t: Typing, n: ir.Node, inputs: list[Use], scale_index: int) -> None:
    """An RMS norm commutes with an orthonormal matrix once its scale is uniform or moved into its readers."""
    y = Def(n.outputs[0])
    last = t.rank(y) - 1
    touched: list[Port] = [*inputs, y]
    for port in touched:
        t.block_port(port, describe(n, "not the normalised axis"), except_axes=[last])
    t.block_port(Use(n, scale_index), describe(n, "the scale of a norm"))
    scale = constant(n.inputs[scale_index])
    readers = absorbing_readers(t, n.outputs[0])
    whole_axis = n.attributes.get_int("axis", -1) % (last + 1) == last
    foldable = scale is not None and whole_axis and scale.size == t.size(y, last) and (readers or uniform(scale))
    if not foldable:
        why = describe(n, "its scale is not uniform and not every reader absorbs it")
        t.block(y, last, why)
        for port in inputs:
            t.block(port, last, why)
        return
    t.tie(inputs[0], last, y, last, Kind.NORM)
    if readers:
        t.scales.append(Scale(n, scale_index, y, readers))
    segment = t.segment(y, last)
    if segment is not None:
        t.mark(segment, "R1")


@rule("SimplifiedLayerNormalization", "RMSNormalization")
@rule("SimplifiedLayerNormalization", domain="com.microsoft")
def _rms_normalization(t: Typing, n: ir.Node) -> None:
    _rms_norm(t, n, [Use(n, 0)], 1)


@rule("SkipSimplifiedLayerNormalization", domain="com.microsoft")
def _skip_rms_normalization(t: Typing, n: ir.Node) -> None:
    """Output 0 is the norm of input + skip (+ bias), output 3 that sum."""
    ins = [Use(n, 0), Use(n, 1)]
    last = t.rank(ins[0]) - 1
    _rms_norm(t, n, ins, 2)
    t.tie(ins[0], last, ins[1], last)
    if has_input(n, 3):
        t.tie(Use(n, 3), 0, ins[0], last)
    if has_output(n, 3):
        t.tie(ins[0], last, Def(n.outputs[3]), last)
        t.block_port(Def(n.outputs[3]), describe(n, "not the normalised axis"), except_axes=[last])


# ---------------------------------------------------------------------------------------------------------------------
# Attention.


@rule("GroupQueryAttention", domain="com.microsoft")
def _group_query_attention(t: Typing, n: ir.Node) -> None:
    """Values keep their basis from V (or the packed tail of Q) to the output, one rotation for every head; queries and
    keys keep theirs, since RoPE or the scores stand in between. The value cache may change basis with its writer.
    """
    heads, kv_heads = n.attributes.get_int("num_heads"), n.attributes.get_int("kv_num_heads")
    query, out = Use(n, 0), Def(n.outputs[0])
    for index in range(5, len(n.inputs)):
        if has_input(n, index):
            t.block_port(Use(n, index), describe(n, "a parameter of attention"))
    size = t.size(out, 2) // heads
    head = Segment(size)
    packed = not has_input(n, 1)
    value = query if packed else Use(n, 2)
    touched: list[Port] = [query, out] if packed else [query, out, Use(n, 1), value]
    for port in touched:
        t.block_port(port, describe(n, "not the feature axis"), except_axes=[2])
    keys_reason = describe(n, "queries and keys are compared after RoPE")
    whole, result = t.segment(value, 2), t.segment(out, 2)
    if whole is None or result is None:
        t.block_node(n, describe(n, "its width is not static"))
        return
    if packed:
        start = (heads + kv_heads) * size
        whole.piece(start, start + kv_heads * size).unify(Segment.tiled(head, kv_heads))
        t.block(query, 2, keys_reason, whole.piece(0, start))
    else:
        whole.unify(Segment.tiled(head, kv_heads))
        t.block(query, 2, keys_reason)
        t.block(Use(n, 1), 2, keys_reason)
    result.unify(Segment.tiled(head, heads))
    t.tie_leaves(value, 2, out, 2)
    t.mark(head, "R2")
    if has_input(n, 3):
        t.block_port(Use(n, 3), describe(n, "the key cache"))
    if has_output(n, 1):
        t.block_port(Def(n.outputs[1]), describe(n, "the key cache"))
    if has_input(n, 4):
        past = Use(n, 4)
        t.block_port(past, describe(n, "not the feature axis"), except_axes=[3])
        if (segment := t.segment(past, 3)) is not None:
            segment.unify(head)
            t.tie_leaves(past, 3, out, 2)
    if has_output(n, 2):
        present = Def(n.outputs[2])
        t.block_port(present, describe(n, "not the feature axis"), except_axes=[3])
        if (segment := t.segment(present, 3)) is not None:
            segment.unify(head)
            t.tie_leaves(present, 3, out, 2)
        if has_input(n, 4) and n.inputs[4].is_graph_input() and present.value.is_graph_output():  # type: ignore[union-attr]
            t.states.append(StatePair(n.inputs[4], present.value, 3))  # type: ignore[arg-type]
