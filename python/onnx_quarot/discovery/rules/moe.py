"""Mixtures of experts as one operator."""

from __future__ import annotations

import onnx_ir as ir

from onnx_quarot.discovery.rules.readers import slots
from onnx_quarot.discovery.rules.registry import MICROSOFT, describe, rule
from onnx_quarot.discovery.typing import Def, Kind, Typing, Use, has_input

_FC1, _FC2, _FC2_BIAS, _FC3 = 2, 4, 5, 6


@rule("MoE", domain=MICROSOFT)
def _moe(t: Typing, n: ir.Node) -> None:
    """The first (and third) matrices [expert, inner, hidden] read the input, the second [expert, hidden, inner] writes
    the output. What lies between them is inside the operator.
    """
    x, y = Use(n, 0), Def(n.outputs[0])
    last = t.rank(x) - 1
    hidden = t.size(x, last)
    t.block_port(Use(n, 1), describe(n, "the router's scores"))
    for port in (x, y):
        t.block_port(port, describe(n, "not the feature axis"), except_axes=[last])
    readers = slots(n, 0)
    reads = [Use(n, i) for i in (_FC1, _FC3) if has_input(n, i)]
    writes = Use(n, _FC2)
    shaped = all(t.rank(p) == 3 for p in [*reads, writes])
    if (
        not shaped
        or len(readers) != len(reads)
        or t.constant(writes) is None
        or any(t.size(p, 2) != hidden for p in reads)
        or t.size(writes, 1) != hidden
    ):
        t.block_node(n, describe(n, "its experts are laid out in a way that is not known"))
        return
    for port in reads:
        t.tie(x, last, port, 2, Kind.CONTRACT)
        t.block_port(port, describe(n, "inside the operator"), except_axes=[2])
    t.tie(writes, 1, y, last)
    t.block_port(writes, describe(n, "inside the operator"), except_axes=[1])
    if has_input(n, _FC2_BIAS):
        t.tie(Use(n, _FC2_BIAS), 1, y, last)
    for index in (3, 7):
        if has_input(n, index):
            t.block_port(Use(n, index), describe(n, "inside the operator"))
    t.read(readers[0], last)
