"""Attention as one operator.

Values keep their basis from V to the output, one rotation for every head. Queries and keys may change basis together
where nothing but the scores stands between them; with RoPE or a norm inside they keep theirs. A cache may change basis
with its writer.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnx_quarot.discovery.basis import Segment
from onnx_quarot.discovery.rules.readers import linear_slot
from onnx_quarot.discovery.rules.registry import MICROSOFT, describe, rule
from onnx_quarot.discovery.typing import Def, Kind, Port, StatePair, Typing, Use, has_input, has_output


@dataclass(frozen=True)
class _Heads:
    """``count`` heads side by side in the features from ``low`` on along an axis."""

    port: Port
    axis: int
    low: int
    count: int


class _Attention:
    """States what one attention operator says; ``head`` and ``key`` are the segments of a value and a key head."""

    def __init__(self, t: Typing, n: ir.Node, size: int, key_size: int) -> None:
        self.t, self.n = t, n
        self.head, self.key = Segment(size), Segment(key_size)
        t.mark(self.head, "R2")
        t.mark(self.key, "R3")
        self._first: dict[int, _Heads] = {}

    def values(self, *places: _Heads) -> None:
        for place in places:
            self._tie(self.head, place)

    def keys(self, *places: _Heads, why: str | None) -> None:
        """``why`` names what stands between queries and keys, None if nothing does."""
        for place in places:
            self._tie(self.key, place, why)

    def _tie(self, head: Segment, place: _Heads, why: str | None = None) -> None:
        t = self.t
        segment = t.segment(place.port, place.axis)
        if segment is None:
            return
        piece = segment.piece(place.low, place.low + place.count * head.length)
        piece.unify(Segment.tiled(head, place.count))
        if why is not None:
            t.block(place.port, place.axis, describe(self.n, why), piece)
        first = self._first.setdefault(id(head), place)
        t.tie_leaves(place.port, place.axis, first.port, first.axis)
        others = [a for a in range(t.rank(place.port)) if a != place.axis % t.rank(place.port)]
        for axis in others:
            t.block(place.port, axis, describe(self.n, "not the feature axis"))

    def caches(self, past: int, present: int, heads: Segment, why: str | None) -> None:
        t, n = self.t, self.n
        places: list[Port] = []
        if has_input(n, past):
            places.append(Use(n, past))
        if has_output(n, present):
            places.append(Def(n.outputs[present]))
        for port in places:
            if t.rank(port) == 4 and t.segment(port, 3) is not None and t.size(port, 3) == heads.length:
                self._tie(heads, _Heads(port, 3, 0, 1), why)
            else:
                t.block_port(port, describe(n, "a cache of another layout"))
        if len(places) == 2:
            before, after = places[0].value, places[1].value
            t.renewed.add(before)
            if why is None and before.is_graph_input() and after.is_graph_output():
                t.states.append(StatePair(before, after, 3))

    def parameters(self, *indices: int) -> None:
        for index in indices:
            if has_input(self.n, index):
                self.t.block_port(Use(self.n, index), describe(self.n, "a parameter of attention"))


@rule("GroupQueryAttention", domain=MICROSOFT)
def _group_query_attention(t: Typing, n: ir.Node) -> None:
    heads, kv_heads = n.attributes.get_int("num_heads"), n.attributes.get_int("kv_num_heads")
    query, out = Use(n, 0), Def(n.outputs[0])
    if _quantized_cache(n):
        t.block_node(n, describe(n, "its cache is quantized"))
        return
    if t.segment(query, 2) is None or t.segment(out, 2) is None:
        t.block_node(n, describe(n, "its width is not static"))
        return
    size = t.size(out, 2) // heads
    a = _Attention(t, n, size, size)
    why = None
    if n.attributes.get_int("do_rotary", 0):
        why = "queries and keys are compared after RoPE"
    elif has_input(n, 14) or has_input(n, 15):
        why = "queries and keys are normalised inside"
    if has_input(n, 1):
        a.values(_Heads(Use(n, 2), 2, 0, kv_heads))
        a.keys(_Heads(query, 2, 0, heads), _Heads(Use(n, 1), 2, 0, kv_heads), why=why)
    else:
        a.values(_Heads(query, 2, (heads + kv_heads) * size, kv_heads))
        a.keys(_Heads(query, 2, 0, heads + kv_heads), why=why)
    a.values(_Heads(out, 2, 0, heads))
    a.caches(3, 1, a.key, why)
    a.caches(4, 2, a.head, None)
    a.parameters(*range(5, len(n.inputs)))
    for index in range(3, len(n.outputs)):
        if has_output(n, index):
            t.block_port(Def(n.outputs[index]), describe(n, "scores"))


def _quantized_cache(n: ir.Node) -> bool:
    return any(n.attributes.get_string(f"{kind}_quant_type", "NONE") != "NONE" for kind in "kv")


@rule("MultiHeadAttention", domain=MICROSOFT)
def _multi_head_attention(t: Typing, n: ir.Node) -> None:
    heads, out = n.attributes.get_int("num_heads"), Def(n.outputs[0])
    query = Use(n, 0)
    if t.rank(query) != 3 or not has_input(n, 1) or not has_input(n, 2):
        t.block_node(n, describe(n, "its queries, keys and values are packed"))
        return
    a = _Attention(t, n, t.size(out, 2) // heads, t.size(query, 2) // heads)
    key, value = Use(n, 1), Use(n, 2)
    a.values(_Heads(value, 2, 0, heads) if t.rank(value) == 3 else _Heads(value, 3, 0, 1), _Heads(out, 2, 0, heads))
    a.keys(
        _Heads(query, 2, 0, heads),
        _Heads(key, 2, 0, heads) if t.rank(key) == 3 else _Heads(key, 3, 0, 1),
        why=None,
    )
    if has_input(n, 3):
        width = t.size(query, 2)
        a.keys(_Heads(Use(n, 3), 0, 0, 2 * heads), why=None)
        a.values(_Heads(Use(n, 3), 0, 2 * width, heads))
    a.caches(6, 1, a.key, None)
    a.caches(7, 2, a.head, None)
    a.parameters(4, 5, *range(8, len(n.inputs)))
    for index in range(3, len(n.outputs)):
        if has_output(n, index):
            t.block_port(Def(n.outputs[index]), describe(n, "scores"))


@rule("Attention", domain=MICROSOFT)
def _attention_with_weights(t: Typing, n: ir.Node) -> None:
    """Input [batch, length, in] times weights [in, q|k|v] plus a bias, then attention."""
    heads, x, weights, out = n.attributes.get_int("num_heads"), Use(n, 0), Use(n, 1), Def(n.outputs[0])
    if has_input(n, 4) or has_output(n, 1):
        t.block_node(n, describe(n, "queries and keys share a cache with values"))
        return
    widths = n.attributes.get_ints("qkv_hidden_sizes", [t.size(weights, 1) // 3] * 3)
    a = _Attention(t, n, widths[2] // heads, widths[0] // heads)
    why = "queries and keys are compared after RoPE" if n.attributes.get_int("do_rotary", 0) else None
    axes = {weights: 1}
    if has_input(n, 2):
        axes[Use(n, 2)] = 0
    for port, axis in axes.items():
        segment = t.segment(port, axis)
        if segment is None:
            continue
        low = widths[0] + widths[1]
        segment.piece(low, low + widths[2]).unify(Segment.tiled(a.head, heads))
        segment.piece(0, low).unify(Segment.tiled(a.key, 2 * heads))
        t.tie_leaves(port, axis, out, 2)
        t.tie_leaves(port, axis, weights, 1)
        if why is not None:
            t.block(port, axis, describe(n, why), a.key)
    a.values(_Heads(out, 2, 0, heads))
    t.tie_leaves(weights, 1, out, 2)
    t.tie(x, 2, weights, 0, Kind.CONTRACT)
    t.block_port(x, describe(n, "not the feature axis"), except_axes=[2])
    a.parameters(*range(3, len(n.inputs)))
    if (slot := linear_slot(n)) is not None:
        t.read(slot, 2)


@rule("Attention")
def _attention(t: Typing, n: ir.Node) -> None:
    """ONNX's own (opset 23): no RoPE inside; 3-D with head counts as attributes, or [batch, heads, length, size]."""
    out, places = Def(n.outputs[0]), [Use(n, i) for i in range(3)]
    if t.rank(places[0]) == 4:
        a = _Attention(t, n, t.size(places[2], 3), t.size(places[0], 3))
        spans = [_Heads(p, 3, 0, 1) for p in places]
        result = _Heads(out, 3, 0, 1)
    else:
        heads = n.attributes.get_int("q_num_heads", 0)
        kv_heads = n.attributes.get_int("kv_num_heads", 0)
        if not heads or not kv_heads:
            t.block_node(n, describe(n, "its head counts are not given"))
            return
        a = _Attention(t, n, t.size(places[2], 2) // kv_heads, t.size(places[0], 2) // heads)
        spans = [_Heads(p, 2, 0, c) for p, c in zip(places, (heads, kv_heads, kv_heads), strict=True)]
        result = _Heads(out, 2, 0, heads)
    a.values(spans[2], result)
    a.keys(spans[0], spans[1], why=None)
    a.caches(4, 1, a.key, None)
    a.caches(5, 2, a.head, None)
    a.parameters(3, *range(6, len(n.inputs)))
    if has_output(n, 3):
        t.block_port(Def(n.outputs[3]), describe(n, "scores"))


@rule("RotaryEmbedding")
@rule("RotaryEmbedding", domain=MICROSOFT)
def _rotary_embedding(t: Typing, n: ir.Node) -> None:
    t.block_node(n, describe(n, "turns pairs of features by position"))


@rule("Softmax", "LogSoftmax")
def _softmax(t: Typing, n: ir.Node) -> None:
    t.block_node(n, describe(n, "not linear"))
