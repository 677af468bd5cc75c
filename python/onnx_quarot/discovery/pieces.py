"""Weights that the graph cuts into pieces become the pieces.

torch keeps the matrices of nn.MultiheadAttention in one, and cuts that where queries come from elsewhere than keys;
experts in a loop take their matrices out of one by their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnx_quarot.discovery.branches import Proof
from onnx_quarot.discovery.constants import tensor_shape
from onnx_quarot.discovery.shapes import FLOATS, Array, Shapes, by_name
from onnx_quarot.load import unmap
from onnx_quarot.sites import constant_array, constant_tensor, drop_unused, readers

_CUTS = ("Gather", "Split", "Slice")


def cut_weights(model: ir.Model) -> None:
    """Where nothing else reads a weight, and its pieces take no more room than it did; they are cut when read."""
    graph, bounds = model.graph, _Bounds(model)
    for whole in list(graph.initializers.values()):
        tensor, nodes = constant_tensor(whole), list(readers(whole))
        if tensor is None or tensor.dtype not in FLOATS - {ir.DataType.BFLOAT16} or whole.is_graph_output():
            continue
        if not nodes or not all(node.graph is graph and _cuts(node, whole, bounds) for node in nodes):
            continue
        programs = [_program(model, node, tensor, bounds) for node in nodes]
        shapes = [_shapes(program) for program in programs]
        if sum(math.prod(shape) for found in shapes for shape in found) > math.prod(tensor_shape(tensor)):
            continue
        for node, program, found in zip(nodes, programs, shapes, strict=True):
            for index, (old, shape) in enumerate(zip(node.outputs, found, strict=True)):
                name, old.name = old.name, None
                lazy = ir.LazyTensor(_piece(program, tensor, index), tensor.dtype, ir.Shape(shape), name=name)
                new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=lazy.shape, const_value=lazy)
                graph.register_initializer(new)
                old.replace_all_uses_with(new)
            held = [value for value in node.inputs[1:] if value is not None]
            graph.remove(node, safe=True)
            for value in dict.fromkeys(held):
                drop_unused(graph, value)
        drop_unused(graph, whole)


class _Bounds:
    """Where a weight is cut: constants, or what the graph works out of widths that are fixed."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._proof: Proof | None = None

    def number(self, value: ir.Value) -> Array | None:
        if (array := constant_array(value)) is not None:
            return array
        self._proof = self._proof or Proof(Shapes(self._model, (by_name,)))
        return self._proof.number(value)


def _cuts(node: ir.Node, whole: ir.Value, bounds: _Bounds) -> bool:
    if node.domain != "" or node.op_type not in _CUTS or node.inputs[0] is not whole:
        return False
    if any(value.is_graph_output() for value in node.outputs):
        return False
    return all(value is None or bounds.number(value) is not None for value in node.inputs[1:])


def _program(model: ir.Model, node: ir.Node, tensor: ir.TensorProtocol, bounds: _Bounds) -> onnx.ModelProto:
    """The node alone: of a tensor "whole" it makes one after the other its pieces."""
    make = onnx.helper
    how = [f"how{i}" if value is not None else "" for i, value in enumerate(node.inputs[1:])]
    proto = make.make_node(node.op_type, ["whole", *how], [f"piece{i}" for i in range(len(node.outputs))])
    proto.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
    held = [
        onnx.numpy_helper.from_array(array, name)
        for name, value in zip(how, node.inputs[1:], strict=True)
        if value is not None and (array := bounds.number(value)) is not None
    ]
    fed = make.make_tensor_value_info("whole", int(tensor.dtype), tensor_shape(tensor))
    graph = make.make_graph([proto], "node", [fed], [onnx.ValueInfoProto(name=name) for name in proto.output], held)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", model.graph.opset_imports.get("", 21))])


def _shapes(program: onnx.ModelProto) -> list[list[int]]:
    inferred = onnx.shape_inference.infer_shapes(program, strict_mode=True, data_prop=True)
    return [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in inferred.graph.output]


def _piece(program: onnx.ModelProto, tensor: ir.TensorProtocol, index: int) -> Callable[[], ir.TensorProtocol]:
    def evaluate() -> ir.TensorProtocol:
        pieces = list(ReferenceEvaluator(program).run(None, {"whole": tensor.numpy()}))
        piece = ir.tensor(np.array(pieces[index]))  # no view of the file
        del pieces
        unmap(tensor)
        return piece

    return evaluate
