"""The legality table: what each operator says about the bases of its axes.

A rule states ties (these two axes share a basis) and blocks (this axis keeps its own, because ...); nothing else. It is
written once an operator, and everything that can be rotated falls out of the table. An operator that is not in it
blocks every axis it touches.
"""

from __future__ import annotations

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.rules import attention, einsum, elementwise, linear, moe, norms, scatter, shape
from onnx_quarot.discovery.rules.readers import is_linear, linear_slot
from onnx_quarot.discovery.rules.registry import RULES
from onnx_quarot.discovery.typing import Def, Port, Typing, Use, ports

__all__ = ["RULES", "apply_rules", "is_linear"]

_FILLED = (
    attention,
    einsum,
    elementwise,
    linear,
    moe,
    norms,
    scatter,
    shape,
)  # importing them enters their rules in the table


def apply_rules(t: Typing) -> None:
    """Walk the graph once and let every operator state its facts."""
    for node in t.graph:
        if all(constant(v) is not None for v in node.outputs):
            continue  # a view of a constant: its readers see through it
        if not any(v is not None and t.shapes.is_float(v) for v in [*node.inputs, *node.outputs]):
            continue
        if any(not t.known(p) for p in ports(node) if _may_be_float(t, p)):
            t.block_node(node, f"{node.op_type} {node.name!r}: a shape is unknown")
            if (slot := linear_slot(node)) is not None:
                t.unknown.append(slot)
        elif (found := RULES.get((node.domain, node.op_type))) is not None:
            found(t, node)
        else:
            t.block_node(node, f"{node.op_type} {node.name!r} is not in the table")
    _block_inner_uses(t)
    _keep_other_states(t)
    _keep_begun_caches(t)


def _may_be_float(t: Typing, port: Port) -> bool:
    return isinstance(port, Def) or t.shapes.is_float(port.value) or port.value not in t.shapes.dtype


def _block_inner_uses(t: Typing) -> None:
    """Whatever a subgraph (If, Loop) captures keeps its basis."""
    for value, axis in list(t.segments):
        for use in value.uses():
            if use.node.graph is not t.graph:
                t.block(Use(use.node, use.idx), axis, f"captured by a subgraph ({use.node.op_type} {use.node.name!r})")


def _keep_other_states(t: Typing) -> None:
    """An input that comes out again with something behind it is a cache only if attention reads it as keys or values:
    an image, or a spectrogram, that a model gives back beside its result is fed by whoever knows of no basis.
    """
    heads = {leaf for segment, kind in t.kinds if kind in ("R2", "R3") for leaf in segment.leaves()}
    segments = {state: t.segment(Def(state.past), state.axis) for state in t.states if t.known(Def(state.past))}
    t.states[:] = [s for s, segment in segments.items() if segment is not None and heads.issuperset(segment.leaves())]


def _keep_begun_caches(t: Typing) -> None:
    """Caches keep their basis in a model that also reads keys or values which it never writes: those of an encoder.

    Whatever model writes these may begin the others too, as the decoder of the first token does, and knows of no basis.
    """
    pasts = {state.past for state in t.states}
    heads = {leaf for segment, kind in t.kinds if kind in ("R2", "R3") for leaf in segment.leaves()}
    layouts = {(t.size(Def(past), 1), t.size(Def(past), 3)) for past in pasts}
    for value in t.graph.inputs:
        port = Def(value)
        if value in pasts | t.renewed or not t.known(port) or t.rank(port) != 4:
            continue
        segment = t.segment(port, 3)
        if segment is None or not heads & set(segment.leaves()):
            continue
        if (t.size(port, 1), t.size(port, 3)) in layouts:  # and no mask that is as wide as a head
            t.states.clear()
            t.begun = value
            return
