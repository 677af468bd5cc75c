"""Layers and tables inside ONNX Runtime's fused operators become nodes of their own, which can be quantized.

    Attention(x, w, b, mask)   ->  MultiHeadAttention(Split(MatMul(x, w) + b), mask)
    FusedMatMul(x, w)          ->  MatMul(x, Transpose(w)) * alpha
    FusedGemm(x, w, b)         ->  Relu(Gemm(x, w, b)), or whatever its activation is
    EmbedLayerNormalization    ->  LayerNormalization(Gather(words, ids) + positions + Gather(segments, which))

Its transformer optimizer writes the first and the last, its session the others, where an optimized model is saved.
Results are the same, to the last bit of attention, and so is the time they take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.constants import Constant, constant
from onnx_quarot.discovery.rules.registry import MICROSOFT
from onnx_quarot.discovery.shapes import Shapes, by_name
from onnx_quarot.editing import GraphNames, take_over

_ACTIVATION = "activation_"  # in front of the names of the activation's own attributes
_AXES_ARE_INPUTS = 13  # since this opset, and so are the sizes of pieces
_TO_BOTH = ("mask_filter_value", "num_heads", "scale", "unidirectional")


def part_fused_layers(model: ir.Model) -> None:
    """Where the matrix is a constant, and what is left of the operator can be said without it."""
    edit: _Edit | None = None
    for node in list(model.graph):
        if node.domain == MICROSOFT and node.op_type == "EmbedLayerNormalization":
            edit = edit or _Edit(model)
            edit.embedding(node)
            continue
        weight = constant(node.inputs[1]) if node.domain == MICROSOFT and len(node.inputs) > 1 else None
        if weight is None or len(weight.shape) != 2 or constant(node.inputs[0]) is not None:
            continue
        edit = edit or _Edit(model)
        if node.op_type == "Attention":
            edit.attention(node, weight)
        elif node.op_type == "FusedMatMul":
            edit.product(node)
        elif node.op_type == "FusedGemm":
            edit.gemm(node)


class _Edit:
    """The edits on one graph."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._names = model, GraphNames(model.graph)
        self._opset = model.graph.opset_imports.get("", 1)
        self._shapes: Shapes | None = None

    def attention(self, node: ir.Node, weight: Constant) -> None:
        x, w, bias, mask, past, scores, *others = (*node.inputs, *[None] * 7)[:7]
        present = node.outputs[1] if len(node.outputs) > 1 and node.outputs[1].name else None
        buffered = node.attributes.get_int("past_present_share_buffer", 0)
        if any(v is not None for v in others) or buffered or node.attributes.get_int("do_rotary", 0):
            return
        if x is None or w is None or not self._says_the_same(mask, x):
            return
        widths = list(node.attributes.get_ints("qkv_hidden_sizes", [weight.shape[1] // 3] * 3))
        if sum(widths) != weight.shape[1]:
            return
        y = node.outputs[0]
        rows = self._add(node, "MatMul", [x, w], "product", name=node.name)
        if bias is not None:
            rows = self._add(node, "Add", [rows, bias], "projections")
        pieces = self._split(node, rows, widths)
        inputs = [*pieces, None, mask, scores]
        if past is not None:
            for number, which in enumerate(("keys", "values")):
                index = self._names.initializer(ir.tensor(np.array(number, np.int64)), f"{past.name}.{which}_index")
                inputs.append(self._add(node, "Gather", [past, index], f"past_{which}", {"axis": 0}, source=past))
        while inputs[-1] is None:
            inputs.pop()
        kept = {name: node.attributes[name] for name in _TO_BOTH if name in node.attributes}
        made = ir.node(
            "MultiHeadAttention", inputs, kept, domain=MICROSOFT, num_outputs=1 if present is None else 3,
            name=self._names.unique(f"{node.name or y.name}/attention"),
        )  # fmt: skip
        self._model.graph.insert_before(node, made)
        for value, name in zip(made.outputs[1:], ("keys", "values"), strict=False):
            value.name, value.type = self._names.unique(f"{y.name}.present_{name}"), y.type
        if present is not None:
            caches = [self._unsqueeze(node, value) for value in made.outputs[1:]]
            take_over(present, self._add(node, "Concat", caches, "present", {"axis": 0}))
        take_over(y, made.outputs[0])
        self._model.graph.remove(node, safe=True)

    def _says_the_same(self, mask: ir.Value | None, x: ir.Value) -> bool:
        """Whether the other operator takes this mask: one of lengths may say two of each row to Attention alone."""
        if mask is None:
            return True
        self._shapes = self._shapes or Shapes(self._model, (by_name,))
        shape, rows = self._shapes.shape.get(mask), self._shapes.shape.get(x)
        if shape is None or rows is None:
            return False
        return len(shape) in (2, 3) or (len(shape) == 1 and shape[0] in (rows[0], 3 * rows[0] + 2))

    def product(self, node: ir.Node) -> None:
        if any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
            return
        x, w = node.inputs
        if node.attributes.get_int("transB", 0):
            w = self._add(node, "Transpose", [w], "matrix", {"perm": [1, 0]}, source=w)
        result = self._add(node, "MatMul", [x, w], "product", name=node.name)
        alpha, dtype = node.attributes.get_float("alpha", 1.0), node.outputs[0].dtype or _dtype(node.inputs[1])
        if alpha != 1.0:
            factor = self._names.initializer(ir.tensor(np.array(alpha, dtype.numpy())), f"{node.outputs[0].name}.alpha")
            result = self._add(node, "Mul", [result, factor], "scaled")
        take_over(node.outputs[0], result)
        self._model.graph.remove(node, safe=True)

    def gemm(self, node: ir.Node) -> None:
        own = {k: a for k, a in node.attributes.items() if not k.startswith(_ACTIVATION[:-1])}
        after = {k[len(_ACTIVATION) :]: a.value for k, a in node.attributes.items() if k.startswith(_ACTIVATION)}
        result = self._add(node, "Gemm", node.inputs, "product", own, name=node.name)
        result = self._add(node, node.attributes.get_string("activation", "Relu"), [result], "activation", after)
        take_over(node.outputs[0], result)
        self._model.graph.remove(node, safe=True)

    def embedding(self, node: ir.Node) -> None:
        ids, which, words, positions, segments, scale, bias, _, places = (*node.inputs, *[None] * 9)[:9]
        y, counted, total = (*node.outputs, *[None] * 3)[:3]
        if counted is not None and (counted.uses() or counted.is_graph_output()):
            return  # the lengths of a mask
        if y is None or ids is None or words is None or any(constant(v) is None for v in (words, positions, scale)):
            return
        rows = self._add(node, "Gather", [words, ids], "words")
        if places is not None:
            first = self._add(node, "Gather", [positions, places], "positions")
        else:
            first = self._first_rows(node, positions, ids)
        rows = self._add(node, "Add", [rows, first], "placed")
        if segments is not None:
            rows = self._add(node, "Add", [rows, self._add(node, "Gather", [segments, which], "segments")], "sum")
        attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
        parameters = [scale] if bias is None else [scale, bias]
        result = self._add(node, "LayerNormalization", [rows, *parameters], "norm", attributes, name=node.name)
        if total is not None and total.name:
            take_over(total, rows)
        take_over(y, result)
        self._model.graph.remove(node, safe=True)

    def _first_rows(self, node: ir.Node, table: ir.Value | None, ids: ir.Value) -> ir.Value:
        """As many rows of a table as there are tokens."""
        index = ir.TensorType(ir.DataType.INT64)
        one, zero = (
            self._names.initializer(ir.tensor(np.array([n], np.int64)), f"{node.outputs[0].name}.{n}") for n in (1, 0)
        )
        shape = self._add(node, "Shape", [ids], "shape")
        length = self._add(node, "Gather", [shape, one], "length", {"axis": 0})
        shape.type = length.type = index
        return self._add(node, "Slice", [table, zero, length, zero], "positions")

    def _split(self, node: ir.Node, value: ir.Value, sizes: list[int]) -> list[ir.Value]:
        attributes: dict[str, Any] = {"axis": 2}
        inputs = [value]
        if self._opset < _AXES_ARE_INPUTS:
            attributes["split"] = sizes
        else:
            inputs.append(self._names.initializer(ir.tensor(np.array(sizes, np.int64)), f"{value.name}.sizes"))
        name = self._names.unique(f"{node.name or node.outputs[0].name}/Split")
        split = ir.node("Split", inputs, attributes, num_outputs=3, name=name)
        for piece, which in zip(split.outputs, ("queries", "keys", "values"), strict=True):
            piece.name, piece.type = self._names.unique(f"{node.outputs[0].name}.{which}"), value.type
        self._model.graph.insert_before(node, split)
        return list(split.outputs)

    def _unsqueeze(self, node: ir.Node, value: ir.Value) -> ir.Value:
        if self._opset < _AXES_ARE_INPUTS:
            return self._add(node, "Unsqueeze", [value], "cache", {"axes": [0]})
        axes = self._names.initializer(ir.tensor(np.array([0], np.int64)), f"{value.name}.axes")
        return self._add(node, "Unsqueeze", [value, axes], "cache")

    def _add(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        result: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        source: ir.Value | None = None,
    ) -> ir.Value:
        """A node in front of ``node``; what it makes is of the type of ``source``, or of the result of ``node``."""
        y = node.outputs[0]
        step = ir.node(
            op_type, inputs, attributes or {}, name=name or self._names.unique(f"{node.name or y.name}/{op_type}")
        )
        step.outputs[0].name = self._names.unique(f"{y.name}.{result}")
        step.outputs[0].type = (source or y).type
        self._model.graph.insert_before(node, step)
        return step.outputs[0]


def _dtype(value: ir.Value | None) -> ir.DataType:
    view = constant(value)
    assert view is not None
    return view.dtype
