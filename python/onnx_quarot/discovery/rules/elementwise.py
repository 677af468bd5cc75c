"""Sums, products, and the pieces that exporters decompose norms into."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnx_quarot.discovery.constants import Constant, constant, uniform
from onnx_quarot.discovery.rules.readers import absorb, writer
from onnx_quarot.discovery.rules.registry import MICROSOFT, along, describe, rule
from onnx_quarot.discovery.typing import Def, Expansion, Kind, Scale, Typing, Use, Written, has_input, uses

_REDUCTIONS = ("ReduceMean", "ReduceSum")


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
    if _is_centring(t, n):
        _centring(t, n)
        return
    y = Def(n.outputs[0])
    for o, operands in _broadcast_axes(t, n):
        if t.segment(y, o) is None:
            continue
        for p, axis in operands:
            folded = n in t.folded_biases and o == t.rank(y) - 1
            if folded and t.constant(p) is not None:
                t.block_port(p, describe(n, "a bias that is folded"))
            elif axis is not None:
                t.tie(p, axis, y, o, Kind.SCALE if folded else Kind.LINEAR)
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
    if n.op_type == "Mul" and n.inputs[0] is n.inputs[1] and _only_summed(t, n):
        _square(t, n)
        return
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
        why = "a product of two tensors"
        if len(full) == 2 and len(factors) == 1:
            (factor, factor_axis), (data, data_axis) = factors[0], next(f for f in full if f != factors[0])
            view = t.constant(factor)
            assert view is not None
            if uniform(view):
                t.tie(data, data_axis, y, o)
                t.block(factor, factor_axis, describe(n, "a uniform factor"))
                continue
            if o == t.rank(y) - 1 and (
                _fold(t, n, factor, data, data_axis, view) or _fold_back(t, n, factor, data, data_axis, view)
            ):
                continue
            why = "a factor a feature that not every reader absorbs"
        for p, axis in full:
            t.block(p, axis, describe(n, why))
        t.block(y, o, describe(n, why))


def _fold(t: Typing, n: ir.Node, factor: Use, data: Use, axis: int, view: Constant) -> bool:
    """A factor a feature (a norm's scale, decomposed), perhaps followed by a bias, that the readers take over."""
    y = Def(n.outputs[0])
    if n.op_type != "Mul" or not along(view, t.rank(y), t.rank(y) - 1):
        return False
    found = absorb(t, y.value)
    if found is None:
        return False
    t.tie(data, axis, y, t.rank(y) - 1, Kind.SCALE)
    t.block_port(factor, describe(n, "a factor that is folded"))
    if found.bias is not None:
        t.folded_biases.add(found.bias.node)
    t.scales.append(Scale(factor, Def(found.out), found.readers, found.bias, data))
    return True


def _fold_back(t: Typing, n: ir.Node, factor: Use, data: Use, axis: int, view: Constant) -> bool:
    """A factor a feature (LayerScale, arXiv:2103.17239) that the linear layer in front of it takes over."""
    y = Def(n.outputs[0])
    if n.op_type != "Mul" or not along(view, t.rank(y), t.rank(y) - 1) or view.size != t.size(data, axis):
        return False
    found = writer(t, data.value)
    if found is None:
        return False
    t.tie(data, axis, y, t.rank(y) - 1)
    t.block_port(factor, describe(n, "a factor that is folded"))
    t.written.append(Written(factor, y, data, found.node, found.constants))
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Lengths and means, as decomposed norms compute them.


@rule("Pow")
def _pow(t: Typing, n: ir.Node) -> None:
    """x^2 whose only use is a mean or sum over the feature axis is a length: the same in every orthonormal basis."""
    exponent = constant(n.inputs[1])
    square = exponent is not None and exponent.size == 1 and float(exponent.numpy().flat[0]) == 2.0
    if square and _only_summed(t, n):
        _square(t, n)
    else:
        t.block_node(n, describe(n, "not linear"))


def _only_summed(t: Typing, n: ir.Node) -> bool:
    y = n.outputs[0]
    consumers = [u.node for u in y.uses()]
    return bool(consumers) and not y.is_graph_output() and all(_reduced_axes(t, c) == [t.rank(Def(y)) - 1] and
               c.op_type in _REDUCTIONS for c in consumers)  # fmt: skip


def _square(t: Typing, n: ir.Node) -> None:
    x = Use(n, 0)
    last = t.rank(x) - 1
    for port in uses(n):
        if t.known(port) and t.rank(port) == t.rank(x):
            t.block_port(port, describe(n, "not the feature axis"), except_axes=[last])
    if n.op_type == "Mul":
        t.tie(x, last, Use(n, 1), last, Kind.NORM)
    t.squares.add(n.outputs[0])
    if (segment := t.segment(x, last)) is not None:
        t.mark(segment, "R1")


def _reduced_axes(t: Typing, n: ir.Node) -> list[int] | None:
    """The axes a reduction runs over, None if they are not known."""
    x = n.inputs[0]
    if n.domain != "" or x is None or not t.shapes.known(x):
        return None
    rank = len(t.shapes.shape[x])
    given = n.attributes.get_ints("axes", None)
    if given is None and has_input(n, 1):
        known = t.shapes.constants.get(n.inputs[1])  # type: ignore[arg-type]
        given = None if known is None else [int(a) for a in known.ravel()]
        if given is None:
            return None
    if not given:
        return [] if n.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in given)


@rule("ReduceL2", "ReduceSumSquare")
def _length(t: Typing, n: ir.Node) -> None:
    last = t.rank(Use(n, 0)) - 1
    if _reduced_axes(t, n) == [last]:
        t.block_port(Use(n, 0), describe(n, "not the feature axis"), except_axes=[last])
        t.block_port(Def(n.outputs[0]), describe(n, "not linear"))
    else:
        t.block_node(n, describe(n, "not linear"))


@rule("ReduceMean", "ReduceSum")
def _reduce(t: Typing, n: ir.Node) -> None:
    """Linear along the axes it leaves; along the others it mixes features (except for lengths and centring)."""
    x, y = Use(n, 0), Def(n.outputs[0])
    if x.value in t.squares or any(u.idx == 1 and _is_centring(t, u.node) for u in y.value.uses()):
        return
    axes = _reduced_axes(t, n)
    if axes is None:
        t.block_node(n, describe(n, "mixes features"))
        return
    keep = n.attributes.get_int("keepdims", 1)
    position = 0
    for axis in range(t.rank(x)):
        if axis in axes:
            t.block(x, axis, describe(n, "mixes features"))
            position += 1 if keep else 0
        else:
            t.tie(x, axis, y, position)
            position += 1


def _is_centring(t: Typing, n: ir.Node) -> bool:
    """x - mean(x) over the last axis, where the mean has no other use: the first half of a LayerNorm."""
    if n.op_type != "Sub" or n.domain != "" or n.inputs[0] is None or n.inputs[1] is None:
        return False
    x, mean = n.inputs
    made = mean.producer()  # type: ignore[union-attr]
    if made is None or made.op_type != "ReduceMean" or made.inputs[0] is not x or x is None or not t.shapes.known(x):
        return False
    alike = all(u.idx == 1 and u.node.op_type == "Sub" and u.node.inputs[0] is x for u in mean.uses())  # type: ignore[union-attr]
    last = len(t.shapes.shape[x]) - 1
    return alike and made.attributes.get_int("keepdims", 1) == 1 and _reduced_axes(t, made) == [last]


def _centring(t: Typing, n: ir.Node) -> None:
    x, y = Use(n, 0), Def(n.outputs[0])
    last = t.rank(x) - 1
    for axis in range(last):
        t.block(x, axis, describe(n, "not the feature axis"))
        t.block(y, axis, describe(n, "not the feature axis"))
    made = n.inputs[1].producer()  # type: ignore[union-attr]
    assert made is not None
    t.tie(x, last, Use(made, 0), last, Kind.CENTRE)
    t.tie(x, last, y, last, Kind.CENTRE)
    t.centres.append(x)


@rule("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Gelu", "Swish", "Mish", "Softplus")
@rule("Softsign", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Abs")
@rule("Clip", "Min", "Max", "Sin", "Cos", "Floor", "Ceil", "Round", "Sign", "Where", "MaxPool", "GlobalMaxPool")
@rule("Gelu", "FastGelu", "BiasGelu", "QuickGelu", domain=MICROSOFT)
def _not_linear(t: Typing, n: ir.Node) -> None:
    t.block_node(n, describe(n, "not linear"))
