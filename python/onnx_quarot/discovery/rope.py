"""Taking the position encoding out of GroupQueryAttention, so that queries and keys can change basis behind it (R3).

Inside the operator nothing can stand between RoPE and the scores or the cache. As operators of their own, the encoding
comes first, then perhaps a rotation, and the attention that is left compares and caches what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.rules.registry import MICROSOFT
from onnx_quarot.discovery.shapes import Shapes
from onnx_quarot.editing import GraphNames

# Inputs of GroupQueryAttention.
_QUERY, _KEY, _VALUE, _PAST_KEY, _LENGTHS, _COS, _SIN, _POSITIONS, _Q_NORM, _K_NORM = 0, 1, 2, 3, 5, 7, 8, 9, 14, 15
_SHAPE_SLICE_OPSET = 15  # Shape of some axes


def unfuse_rope(model: ir.Model) -> None:
    """Un-fuse RoPE, in place, in every GroupQueryAttention that caches its keys and does nothing else to them inside.

    Packed queries, keys and values are split. Positions are what the operator counts: from 0 in a first prompt, behind
    the cache later.
    """
    nodes = [node for node in model.graph if _can_unfuse(model, node)]
    if not nodes:
        return
    shapes = Shapes(model)
    surgeon = _Surgeon(model, shapes)
    for node in nodes:
        surgeon.unfuse(node)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _can_unfuse(model: ir.Model, node: ir.Node) -> bool:
    if (node.domain, node.op_type) != (MICROSOFT, "GroupQueryAttention"):
        return False
    if not node.attributes.get_int("do_rotary", 0) or model.graph.opset_imports.get("", 0) < _SHAPE_SLICE_OPSET:
        return False
    # Given positions mean different things in a first prompt and later, and not the same in every runtime.
    if any(_input(node, i) is not None for i in (_POSITIONS, _Q_NORM, _K_NORM)):
        return False
    if constant(_input(node, _COS)) is None:
        return False
    if any(node.attributes.get_string(f"{kind}_quant_type", "NONE") != "NONE" for kind in "kv"):
        return False
    past, present = _input(node, _PAST_KEY), node.outputs[1] if len(node.outputs) > 1 else None
    cached = past is not None and past.is_graph_input() and present is not None and present.is_graph_output()
    return cached and all(_input(node, i) is not None for i in (_QUERY, _LENGTHS, _SIN))


class _Surgeon:
    """Positions are computed once for all attentions that certainly share them."""

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self.graph, self.shapes = model.graph, shapes
        self.names = GraphNames(model.graph)
        self._positions: dict[object, ir.Value] = {}
        self._constants: dict[tuple[int, ...], ir.Value] = {}

    def unfuse(self, node: ir.Node) -> None:
        query = node.inputs[_QUERY]
        assert query is not None
        if not self.shapes.known(query) or not self.shapes.static[query][-1]:
            return
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
        positions = self._positions_of(node, query)
        for index, count, what in ((_QUERY, heads, "query"), (_KEY, kv_heads, "key")):
            parts[index] = self._turned(node, parts[index], positions, count, size, dtype, f"{what}/rotary")
        for index, value in enumerate(parts):
            node.replace_input_with(index, value)
        for index in (_COS, _SIN):
            if index < len(node.inputs):
                node.replace_input_with(index, None)
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
        node.attributes.pop("rotary_interleaved", None)

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
        view = constant(cos)
        assert view is not None
        attributes = {"interleaved": node.attributes.get_int("rotary_interleaved", 0), "num_heads": count}
        if 2 * view.shape[-1] != size:  # only the first features of a head carry their position
            attributes["rotary_embedding_dim"] = 2 * view.shape[-1]
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
        attributes: Mapping[str, int],
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
