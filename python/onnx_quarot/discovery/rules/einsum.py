"""Sums of products, written with a letter for each axis."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.rules.registry import describe, rule
from onnx_quarot.discovery.typing import Def, Kind, Port, Slot, Typing, Use

REST = "\u2026"  # an ellipsis: however many axes there are besides


def terms(node: ir.Node) -> tuple[list[str], str]:
    """The letters of every operand's axes and of the result's."""
    equation = node.attributes.get_string("equation", "").replace(" ", "").replace("...", REST)
    left, arrow, right = equation.partition("->")
    if not arrow:
        rest = REST if REST in left else ""
        right = rest + "".join(sorted(c for c in set(left) - {",", REST} if left.count(c) == 1))
    return left.split(","), right


def _spelled(term: str, rank: int) -> str:
    """An ellipsis as digits, the last axis before the letters behind it always the same."""
    rest = rank - len(term) + 1
    return term.replace(REST, "0123456789"[10 - rest :]) if 0 <= rest <= 10 else term


def einsum_slot(node: ir.Node, index: int) -> Slot | None:
    """The constant that the last axis of operand ``index`` is summed against, if that is all that happens to it."""
    (operands, result), other = terms(node), 1 - index
    if len(operands) != 2 or len(node.inputs) != 2:
        return None
    letter = operands[index][-1:]
    weight = constant(node.inputs[other])
    shared = set(operands[index]) & set(operands[other])
    if weight is None or len(weight.shape) != len(operands[other]) or len(weight.shape) < 2 or REST in shared:
        return None
    if constant(node.inputs[index]) is not None or shared != {letter} or letter in result:
        return None
    if any(len(set(term)) != len(term) for term in operands):
        return None
    return Slot(node, index, other, operands[other].index(letter))


@rule("Einsum")
def _einsum(t: Typing, n: ir.Node) -> None:
    """A letter of one operand that the result keeps is an axis that goes on; one that two operands have and the result
    does not is summed, one against the other.
    """
    operands, result = terms(n)
    y = Def(n.outputs[0])
    inputs = [Use(n, i) for i in range(len(n.inputs))]
    ports: list[Port] = [*inputs, y]
    spelled = [_spelled(term, t.rank(port)) for term, port in zip([*operands, result], ports, strict=False)]
    if len(operands) != len(inputs) or any(len(s) != t.rank(p) for s, p in zip(spelled, ports, strict=True)):
        t.block_node(n, describe(n, "its equation does not fit its operands"))
        return
    places: dict[str, list[tuple[Port, int]]] = defaultdict(list)
    for term, port in zip(spelled, ports, strict=True):
        for axis, letter in enumerate(term):
            places[letter].append((port, axis))
    weights = any(constant(p.value) is not None for p in inputs)
    for letter, (first, *rest) in places.items():
        if len(rest) == 1 and first[0] != rest[0][0]:
            (a, axis_a), (b, axis_b) = first, rest[0]
            t.tie(a, axis_a, b, axis_b, Kind.LINEAR if letter in spelled[-1] else Kind.CONTRACT)
            segment = None if weights else t.segment(a, axis_a)
            if segment is not None:
                t.mark(segment, "R2" if letter in spelled[-1] else "R3")
            continue
        for port, axis in (first, *rest):
            t.block(port, axis, describe(n, f"its axis {letter!r} is not summed against one other"))
    for index in range(len(inputs)):
        if (slot := einsum_slot(n, index)) is not None:
            t.read(slot, t.rank(inputs[index]) - 1)
