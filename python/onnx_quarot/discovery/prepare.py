"""Small equivalent changes of a graph that make it sayable: constants computed, fused sums with a norm taken apart.

Done in place before discovery and again before rewriting, with the same outcome; a prepared graph stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnx_quarot.discovery.batch_norm import fold_batch_norms
from onnx_quarot.discovery.branches import resolve_branches
from onnx_quarot.discovery.constants import Constant, constant, read_once, root_tensor, tensor_shape, uniform
from onnx_quarot.discovery.einsum_layers import write_products
from onnx_quarot.discovery.expanded_norms import gather_norms
from onnx_quarot.discovery.fused_layers import part_fused_layers
from onnx_quarot.discovery.pieces import cut_weights
from onnx_quarot.discovery.rope import unfuse_rope
from onnx_quarot.discovery.rules.readers import absorb, has_bias, slots
from onnx_quarot.discovery.rules.registry import MICROSOFT
from onnx_quarot.discovery.shapes import FLOATS, Shapes
from onnx_quarot.discovery.typing import Typing, has_input
from onnx_quarot.load import unmap
from onnx_quarot.sites import drop_unused

_BROADCASTING = frozenset(("Add", "Sub", "Mul", "Div", "Pow"))
_FOLDABLE = _BROADCASTING | {"Neg", "Sqrt", "Reciprocal", "Exp", "Squeeze", "Unsqueeze", "Reshape", "Concat"}
_MAX_ELEMENTS = 1 << 16
_SKIP_NORMS = {"SkipSimplifiedLayerNormalization": (None, 3), "SkipLayerNormalization": (3, 4)}


def prepare(model: ir.Model, *, keys: bool = False) -> None:
    """Take the branches that are always taken, compute constant expressions (scales of the form 1 + w), and take
    a skip norm apart where only its sum can change basis. ``keys``: take position encodings out of attention, so that
    queries and keys can be rotated (R3).
    """
    simplify(model)
    gather_norms(model)
    fold_batch_norms(model, behind=True)
    if keys:
        unfuse_rope(model)
    shapes: Shapes | None = None
    for node in list(model.graph):
        if node.domain != MICROSOFT or node.op_type not in _SKIP_NORMS or _plainly_absorbed(node):
            continue
        shapes = shapes or Shapes(model)
        if not _absorbed(node, Typing(model.graph, shapes)):
            unfuse_skip_norm(model, node)


def simplify(model: ir.Model) -> bool:
    """Only the branches and the constants, cut and computed: also what is not rotated is quantized in this form.

    Returns whether the graph changed.
    """
    before = list(model.graph)
    resolve_branches(model)
    part_fused_layers(model)
    cut_weights(model)
    write_products(model)
    fold_batch_norms(model)
    for node in list(model.graph):
        _fold(model, node)
    return list(model.graph) != before


def _fold(model: ir.Model, node: ir.Node) -> None:
    if node.domain != "" or node.op_type not in _FOLDABLE or len(node.outputs) != 1:
        return
    views = [v for v in map(constant, node.inputs) if v is not None]
    result = node.outputs[0]
    if len(views) < len(node.inputs) or result.is_graph_output() or views[0].dtype not in FLOATS:
        return
    if any(v.dtype == ir.DataType.BFLOAT16 for v in views):
        return
    tensor = _computed(model, node, views)
    if tensor is None:
        return
    name = result.name
    result.name = None
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor_shape(tensor)))
    value.const_value = tensor
    tensor.name = name
    model.graph.register_initializer(value)
    result.replace_all_uses_with(value)
    sources = list(dict.fromkeys(v for v in node.inputs if v is not None))
    model.graph.remove(node, safe=True)
    for source in sources:
        drop_unused(model.graph, source)


def _computed(model: ir.Model, node: ir.Node, views: Sequence[Constant]) -> ir.TensorProtocol | None:
    """What a node makes of constants; None if it should be left to the runtime.

    Weights are computed when they are read, and only where they take no more room than what they replace: a column and
    a row make a matrix, and a matrix that is read elsewhere too would become two.
    """
    numbers = {i: v for i, v in enumerate(views) if v.dtype in FLOATS}
    roots = {v.root for i, v in numbers.items() if read_once(node.inputs[i])}
    small = (sum if node.op_type == "Concat" else max)(v.size for v in views) <= _MAX_ELEMENTS
    spread = np.broadcast_shapes(*(v.shape for v in views)) if node.op_type in _BROADCASTING else ()
    if small and math.prod(spread) > _MAX_ELEMENTS:
        return None
    make = onnx.helper
    proto = make.make_node(node.op_type, [f"i{i}" for i in range(len(views))], ["o"])
    proto.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
    fed = [make.make_tensor_value_info(f"i{i}", int(v.dtype), v.shape) for i, v in numbers.items()]
    held = [onnx.numpy_helper.from_array(_values(v), f"i{i}") for i, v in enumerate(views) if i not in numbers]
    graph = make.make_graph([proto], "node", fed, [onnx.ValueInfoProto(name="o")], held)
    opsets = [make.make_opsetid("", model.graph.opset_imports.get("", 21))]
    program = make.make_model(graph, opset_imports=opsets)

    def evaluate() -> ir.TensorProtocol:
        (array,) = ReferenceEvaluator(program).run(None, {f"i{i}": _values(v) for i, v in numbers.items()})
        array = np.asarray(array)
        if not array.flags.owndata:  # a Reshape is a view of the file
            array = array.copy()
        for root in roots:
            unmap(root_tensor(root))
        return ir.tensor(array)

    if small:
        tensor = evaluate()
        return tensor if math.prod(tensor_shape(tensor)) <= _MAX_ELEMENTS else None
    kind = onnx.shape_inference.infer_shapes(program, data_prop=True).graph.output[0].type.tensor_type
    dtype, shape = ir.DataType(kind.elem_type), [d.dim_value for d in kind.shape.dim]
    room = sum(root_tensor(root).nbytes for root in roots)
    if not kind.HasField("shape") or 0 in shape or math.prod(shape) * dtype.itemsize > room:
        return None
    return ir.LazyTensor(evaluate, dtype, ir.Shape(shape))


def _values(view: Constant) -> np.ndarray[Any, Any]:
    return view.numpy().astype(view.dtype.numpy(), copy=False)


def _plainly_absorbed(node: ir.Node) -> bool:
    """Every reader of the norm is visibly a linear layer, or its scale is uniform: no need to look at shapes."""
    y = node.outputs[0]
    scale, bias = constant(node.inputs[2]), _SKIP_NORMS[node.op_type][0]
    plain = bias is None or len(node.inputs) <= bias or node.inputs[bias] is None
    if scale is not None and uniform(scale) and plain:
        return True
    return not y.is_graph_output() and bool(y.uses()) and all(slots(u.node, u.idx) for u in y.uses())


def _absorbed(node: ir.Node, t: Typing) -> bool:
    y = node.outputs[0]
    if not t.shapes.known(y) or not node.outputs[0].uses():
        return True  # nothing is known about it: leave it as it is
    found = absorb(t, y, biased=has_bias(node, _SKIP_NORMS[node.op_type][0]))
    return found is not None and found.bias is None


def unfuse_skip_norm(model: ir.Model, node: ir.Node) -> None:
    """input + skip (+ added), then the norm: so that the sum can change basis while the norm keeps its own.

    A sum that nobody read before is called after the norm's result, with "/sum_0" behind.
    """
    graph = model.graph
    bias, added = _SKIP_NORMS[node.op_type]
    total, last = node.inputs[0], node
    made: list[ir.Node] = []
    for number, operand in enumerate([node.inputs[1], node.inputs[added] if len(node.inputs) > added else None]):
        if operand is None:
            continue
        add = ir.node("Add", [total, operand], name=f"{node.name}/Add_{number}")
        total = add.outputs[0]
        total.name = f"{node.outputs[0].name}/sum_{number}"
        total.type = node.outputs[0].type or (ir.TensorType(operand.dtype) if operand.dtype else None)
        made.append(add)
    parameters = [node.inputs[2]]
    if bias is not None and has_input(node, bias):
        parameters.append(node.inputs[bias])
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}  # not that of other norms
    op_type = "LayerNormalization" if bias is not None else "SimplifiedLayerNormalization"
    outputs = node.outputs[:3] if bias is not None else node.outputs[:1]
    norm = ir.node(op_type, [total, *parameters], attributes, num_outputs=len(outputs), name=node.name)
    made.append(norm)
    graph.insert_before(last, made)
    pairs = list(zip(outputs, norm.outputs, strict=True))
    if len(node.outputs) > 3:
        pairs.append((node.outputs[3], total))  # type: ignore[arg-type]
    for old, new in pairs:
        name, new.type, new.shape = old.name, old.type or new.type, old.shape
        old.name = None
        new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
