"""Taking norms and position encodings out of GroupQueryAttention, so that queries and keys can change basis behind
them (R3).

Inside the operator nothing can stand between RoPE and the scores or the cache. As operators of their own, the norms of
queries and keys come first, then the encoding, then perhaps a rotation, and the attention that is left compares and
caches what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.rules.registry import MICROSOFT
from onnx_quarot.discovery.shapes import Shapes
from onnx_quarot.editing import GraphNames

# Inputs of GroupQueryAttention.
_QUERY, _KEY, _VALUE, _PAST_KEY, _LENGTHS, _COS, _SIN, _POSITIONS = 0, 1, 2, 3, 5, 7, 8, 9
_Q_NORM, _K_NORM, _QUERY_LENGTHS = 14, 15, 16
_SHAPE_SLICE_OPSET = 15  # Shape of some axes
_NORM_EPSILON = 1e-6  # the operator's default


def unfuse_rope(model: ir.Model) -> None:
    """Un-fuse RoPE, and the norms in front of it, in place, in every GroupQueryAttention that caches its keys and does
    nothing else to them inside.

    Packed queries, keys and values are split. Positions are what the operator counts: from 0 in a first prompt, behind
    the cache later.
    """
    _unfuse(model, rotary=True)


def unfuse_norms(model: ir.Model) -> None:
    """Un-fuse norms of queries and keys only: some of ONNX Runtime's providers, its CPU's too, do not compute them."""
    _unfuse(model, rotary=False)


def has_fused_norms(model: ir.Model) -> bool:
    return any(map(_normed, _attentions(model)))


def fused_keys(model: ir.Model) -> str | None:
    """Why some attention of a model whose keys were to be taken out still encodes them inside; None if none does."""
    shapes: Shapes | None = None
    for node in _attentions(model):
        if _changes_keys(node):
            shapes = shapes or Shapes(model)
            return f"{node.name!r} keeps its keys' encoding inside: {_obstacle(model, shapes, node, rotary=True)}"
    return None


def _unfuse(model: ir.Model, *, rotary: bool) -> None:
    nodes = [n for n in _attentions(model) if _normed(n) or (rotary and _changes_keys(n))]
    if not nodes:
        return
    shapes = Shapes(model)
    surgeon = _Surgeon(model, shapes)
    for node in nodes:
        if _obstacle(model, shapes, node, rotary=rotary) is None:
            surgeon.unfuse(node, rotary=rotary)


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention")]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _normed(node: ir.Node) -> bool:
    return _input(node, _Q_NORM) is not None or _input(node, _K_NORM) is not None


def _changes_keys(node: ir.Node) -> bool:
    return node.attributes.get_int("do_rotary", 0) == 1 or _normed(node)


def _obstacle(model: ir.Model, shapes: Shapes, node: ir.Node, *, rotary: bool) -> str | None:
    """What forbids to take the norms out, and with ``rotary`` the encoding; None if nothing does."""
    query = _input(node, _QUERY)
    if query is None or not shapes.known(query) or not shapes.static[query][-1]:
        return "its width is not fixed"
    if _normed(node) and any(_input(node, i) is None for i in (_Q_NORM, _K_NORM)):
        return "it normalises either queries or keys"
    if not rotary:
        return None
    if any(node.attributes.get_string(f"{kind}_quant_type", "NONE") != "NONE" for kind in "kv"):
        return "its cache is quantized already"
    past, present = _input(node, _PAST_KEY), node.outputs[1] if len(node.outputs) > 1 else None
    if past is None or not past.is_graph_input() or present is None or not present.is_graph_output():
        return "its cache is not an input and output of the model"
    if not node.attributes.get_int("do_rotary", 0):
        return None
    if model.graph.opset_imports.get("", 0) < _SHAPE_SLICE_OPSET:
        return f"its positions can be counted from opset {_SHAPE_SLICE_OPSET} on"
    if _input(node, _POSITIONS) is not None:
        return "given positions mean different things in a first prompt and later, and not the same in every runtime"
    if _input(node, _QUERY_LENGTHS) is not None:
        return "sequences of a batch begin at positions of their own"
    cos = _input(node, _COS)
    if cos is None or not shapes.known(cos) or not shapes.static[cos][-1]:
        return "how many features carry their position is not fixed"
    return None if all(_input(node, i) is not None for i in (_LENGTHS, _SIN)) else "an input is missing"


class _Surgeon:
    """Positions are computed once for all attentions that certainly share them."""

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self.graph, self.shapes = model.graph, shapes
        self.names = GraphNames(model.graph)
        self._positions: dict[object, ir.Value] = {}
        self._constants: dict[tuple[int, ...], ir.Value] = {}

    def unfuse(self, node: ir.Node, *, rotary: bool) -> None:
        query = node.inputs[_QUERY]
        assert query is not None
        heads, kv_heads = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
        packed = _input(node, _KEY) is None
        width = self.shapes.shape[query][-1]
        size = width // (heads + 2 * kv_heads) if packed else width // heads
        parts: list[ir.Value | None] = [query, _input(node, _KEY), _input(node, _VALUE)]
        dtype = self.shapes.dtype[query]
        if packed:
            widths = tuple(size * count for count in (heads, kv_heads, kv_heads))
            parts = list(
                self._add(node, "Split", [query, self._constant(widths)], {"axis": -1}, "split", dtype, count=3)
            )
        sides = ((_QUERY, heads, _Q_NORM, "query"), (_KEY, kv_heads, _K_NORM, "key"))
        if _normed(node):
            for index, count, scale, what in sides:
                parts[index] = self._normalised(node, parts[index], _input(node, scale), count, size, dtype, what)
                node.replace_input_with(scale, None)
            for prefix in ("qk", "q", "k"):
                node.attributes.pop(f"{prefix}_norm_epsilon", None)
        if rotary and node.attributes.get_int("do_rotary", 0) == 1:
            positions = self._positions_of(node, query)
            for index, count, _, what in sides:
                parts[index] = self._turned(node, parts[index], positions, count, size, dtype, f"{what}/rotary")
            for index in (_COS, _SIN):
                node.replace_input_with(index, None)
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
            node.attributes.pop("rotary_interleaved", None)
        for index, value in enumerate(parts):
            node.replace_input_with(index, value)
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)

    def _normalised(
        self,
        node: ir.Node,
        x: ir.Value | None,
        scale: ir.Value | None,
        count: int,
        size: int,
        dtype: ir.DataType,
        what: str,
    ) -> ir.Value:
        """Every head for itself, all heads by one scale."""
        heads = self._add(node, "Reshape", [x, self._constant((0, -1, size))], {}, f"{what}/heads", dtype)[0]
        epsilon = node.attributes.get_float("qk_norm_epsilon", _NORM_EPSILON)
        epsilon = node.attributes.get_float(f"{what[0]}_norm_epsilon", epsilon)
        attributes = {"axis": -1, "epsilon": epsilon}
        norm = self._add(node, "SimplifiedLayerNormalization", [heads, scale], attributes, f"{what}/norm", dtype)[0]
        return self._add(node, "Reshape", [norm, self._constant((0, -1, count * size))], {}, f"{what}/rows", dtype)[0]

    def _turned(
        self,
        node: ir.Node,
        x: ir.Value | None,
        positions: ir.Value,
        count: int,
        size: int,
        dtype: ir.DataType,
        suffix: str,
    ) -> ir.Value:
        cos = node.inputs[_COS]
        assert cos is not None
        attributes = {"interleaved": node.attributes.get_int("rotary_interleaved", 0), "num_heads": count}
        turned = 2 * self.shapes.shape[cos][-1]
        if turned != size:  # only the first features of a head carry their position
            attributes["rotary_embedding_dim"] = turned
        inputs = [x, positions, cos, node.inputs[_SIN]]
        return self._add(node, "RotaryEmbedding", inputs, attributes, suffix, dtype, domain=MICROSOFT)[0]

    def _positions_of(self, node: ir.Node, query: ir.Value) -> ir.Value:
        """int64 [batch, length]: max(seqlens_k + 1 - length, 0) + 0, 1, ..."""
        lengths = node.inputs[_LENGTHS]
        key = (lengths, self.shapes.shape[query][:2])
        if key not in self._positions:
            self._positions[key] = self._count(node, query, lengths)
        return self._positions[key]

    def _count(self, node: ir.Node, query: ir.Value, lengths: ir.Value | None) -> ir.Value:
        int64 = ir.DataType.INT64
        zero, one, column = self._constant((0,)), self._constant((1,)), self._constant((-1, 1))

        def add(what: str, op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
            return self._add(node, op_type, list(inputs), attributes, f"positions/{what}", int64)[0]

        length = add("length", "Shape", query, start=1, end=2)
        last = add("last", "Reshape", add("lengths", "Cast", lengths, to=int(int64)), column)
        cached = add("cached", "Max", add("past", "Sub", add("total", "Add", last, one), length), zero)
        count = add("count", "Squeeze", length, zero)
        ahead = add("ahead", "Range", self._constant(()), count, self._constant((), 1))
        return add("positions", "Add", cached, ahead)

    def _constant(self, values: tuple[int, ...], scalar: int = 0) -> ir.Value:
        key = values or (None, scalar)
        if key not in self._constants:
            array = np.array(values if values else scalar, np.int64)
            self._constants[key] = self.names.initializer(ir.Tensor(array), "onnx_quarot.positions")  # type: ignore[index]
        return self._constants[key]  # type: ignore[index]

    def _add(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, int | float],
        suffix: str,
        dtype: ir.DataType,
        *,
        domain: str = "",
        count: int = 1,
    ) -> list[ir.Value]:
        """A new node in front of ``node``; its outputs."""
        name = f"{node.name or node.outputs[0].name}/{suffix}"
        outputs = [self.names.value(f"{name}/output_{i}", dtype) for i in range(count)]
        new = ir.node(op_type, inputs, dict(attributes), domain=domain, outputs=outputs, name=name)
        self.graph.insert_before(node, new)
        return outputs
