"""Normalisations as one operator; decomposed ones fall out of :mod:`elementwise`."""

from __future__ import annotations

import onnx_ir as ir

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.rules.readers import absorb, has_bias, is_uniform, takes_bias
from onnx_quarot.discovery.rules.registry import MICROSOFT, describe, rule
from onnx_quarot.discovery.typing import Def, Kind, Port, Scale, Typing, Use, has_input, has_output


def _norm(t: Typing, n: ir.Node, inputs: list[Use], scale: int, bias: int | None, *, centres: bool) -> None:
    """A norm commutes with an orthonormal matrix once its scale and bias are trivial or moved into its readers.

    ``centres``: it subtracts the mean, which must then be zero already (see :mod:`centre`).
    """
    y = Def(n.outputs[0])
    last = t.rank(y) - 1
    touched: list[Port] = [*inputs, y]
    for port in touched:
        t.block_port(port, describe(n, "not the normalised axis"), except_axes=[last])
    bias = bias if bias is not None and has_input(n, bias) else None
    for index in (scale, bias):
        if index is not None and has_input(n, index):
            t.block_port(Use(n, index), describe(n, "a parameter of a norm"))
    segment = t.segment(y, last)
    if segment is not None:
        t.mark(segment, "R1")
    why = _refusal(t, n, last, scale, bias)
    if why is not None:
        for port in touched:
            t.block(port, last, describe(n, why))
    else:
        t.tie(inputs[0], last, y, last, Kind.CENTRE if centres else Kind.NORM)
        found = absorb(t, y.value, biased=has_bias(n, bias))
        if found is not None and not _trivial(n, scale, bias):
            given = Use(n, bias) if bias is not None and has_bias(n, bias) else None
            t.scales.append(Scale(Use(n, scale), y, found.readers, given, None))
        if centres:
            t.converted.append(n)
    if centres:
        t.centres.append(inputs[0])


def _trivial(n: ir.Node, scale: int, bias: int | None) -> bool:
    return is_uniform(n.inputs[scale]) and not has_bias(n, bias)


def _refusal(t: Typing, n: ir.Node, last: int, scale: int, bias: int | None) -> str | None:
    """Why the norm keeps its basis, or None."""
    view = constant(n.inputs[scale])
    if n.attributes.get_int("axis", -1) % (last + 1) != last:
        return "it normalises several axes together"
    if view is None or view.size != t.shapes.shape[n.outputs[0]][last]:
        return "its scale is not a constant vector"
    added = None if bias is None else constant(n.inputs[bias])
    if bias is not None and (added is None or added.size != view.size):
        return "its bias is not a constant vector"
    if any(has_output(n, i) for i in (1, 2)):
        return "its statistics are used"
    if _trivial(n, scale, bias):
        return None
    found = absorb(t, n.outputs[0], biased=has_bias(n, bias))
    if found is None or found.bias is not None:
        return "its scale is not uniform and not every reader absorbs it"
    if has_bias(n, bias) and not all(takes_bias(r) for r in found.readers):
        return "its bias is not zero and not every reader absorbs it"
    return None


@rule("SimplifiedLayerNormalization", "RMSNormalization")
@rule("SimplifiedLayerNormalization", domain=MICROSOFT)
def _rms_normalization(t: Typing, n: ir.Node) -> None:
    _norm(t, n, [Use(n, 0)], 1, None, centres=False)


@rule("LayerNormalization")
def _layer_normalization(t: Typing, n: ir.Node) -> None:
    _norm(t, n, [Use(n, 0)], 1, 2, centres=True)


@rule("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_normalization(t: Typing, n: ir.Node) -> None:
    _skip(t, n, scale=2, bias=None, added=3, centres=False)


@rule("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_normalization(t: Typing, n: ir.Node) -> None:
    _skip(t, n, scale=2, bias=3, added=4, centres=True)


def _skip(t: Typing, n: ir.Node, scale: int, bias: int | None, added: int, *, centres: bool) -> None:
    """Output 0 is the norm of input + skip (+ a bias), output 3 that sum."""
    ins = [Use(n, 0), Use(n, 1)]
    last = t.rank(ins[0]) - 1
    if t.rank(ins[1]) != t.rank(ins[0]):
        t.block_node(n, describe(n, "its skip is broadcast"))
        return
    _norm(t, n, ins, scale, bias, centres=centres)
    t.tie(ins[0], last, ins[1], last)
    if has_input(n, added):
        t.tie(Use(n, added), 0, ins[0], last)
    if has_output(n, 3):
        t.tie(ins[0], last, Def(n.outputs[3]), last)
        t.block_port(Def(n.outputs[3]), describe(n, "not the normalised axis"), except_axes=[last])
