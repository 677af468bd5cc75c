"""Running a model that is too large to run whole: a piece of the graph at a time, in its own order.

Only the weights of one piece, and the activations that later pieces still need, are in memory. bfloat16, which ONNX
Runtime cannot compute in on a CPU, is widened to float32 on the way, and so is float16 in models that are not large:
what two of them differ by may be no more than the rounding of their activations. Norms inside attention, which the
runtime has for other devices only, are computed in front of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnx_quarot import custom_op, runtime_faults
from onnx_quarot.discovery.rope import unfuse_norms
from onnx_quarot.errors import ModelError, first_line
from onnx_quarot.load import external_files, load, unmap
from onnx_quarot.products import reproducible
from onnx_quarot.wide_products import HALVES, large_matrix, wide_product

Array = np.ndarray[Any, Any]
_WIDE_BYTES = 1 << 30  # float16 weights that are copied to float32; beyond, they stay mapped
SEGMENT_BYTES = 256 << 20
"""Weights of one piece, unless a single one is larger."""


@reproducible
def run_in_segments(
    path: Path, feeds: Mapping[str, Array], outputs: Sequence[str], *, segment_bytes: int = SEGMENT_BYTES
) -> list[Array]:
    """The values of ``outputs`` for ``feeds``, as one session over the whole model at ``path`` would give them.

    Values of half precision are computed, fed and returned as float32 where :func:`runs_wide`. Raises ModelError,
    naming the piece by its first node, if ONNX Runtime refuses it, or an output that no node makes.
    """
    model = load(path)
    runtime_faults.refuse(model, str(path))
    unfuse_norms(model)
    wide = runs_wide(model)
    values = {name: _widened(array) if wide else array for name, array in feeds.items()}
    segments = list(_segments(model, segment_bytes // 2 if wide else segment_bytes))
    last_use = {v: i for i, nodes in enumerate(segments) for node in nodes for v in _reads(node)}
    last_use |= dict.fromkeys(outputs, len(segments))
    for number, nodes in enumerate(segments):
        made = [str(v.name) for node in nodes for v in node.outputs if last_use.get(str(v.name), -1) > number]
        if made and (matrix := large_matrix(nodes[0])) is not None:
            values[made[0]] = wide_product(values[str(nodes[0].inputs[0].name)], matrix)  # type: ignore[union-attr]
        elif made:
            inputs = {name: values[name] for node in nodes for name in _reads(node) if name in values}
            for name, array in zip(made, _run(model, path, nodes, inputs, made, wide), strict=True):
                values[name] = array
        for name in [name for name in values if last_use.get(name, -1) <= number]:
            del values[name]
    for name in outputs:
        constant = model.graph.initializers.get(name)
        if name not in values and constant is not None and constant.const_value is not None:
            array = constant.const_value.numpy()
            values[name] = _widened(array) if wide else array
        if name not in values:
            raise ModelError(f"{path}: no node makes {name!r}, which is an output")
    return [values[name] for name in outputs]


def runs_wide(model: ir.Model) -> bool:
    """Whether half precision is widened: bfloat16 always, float16 if its weights take no more than 1 GiB."""
    graph = model.graph
    tensors = (value.const_value for value in graph.initializers.values())
    narrow = sum(t.nbytes for t in tensors if t is not None and t.dtype in HALVES)
    values = [*graph.initializers.values(), *graph.inputs, *(v for node in graph for v in node.outputs)]
    kinds = {value.dtype for value in values}
    return ir.DataType.BFLOAT16 in kinds or (ir.DataType.FLOAT16 in kinds and narrow <= _WIDE_BYTES)


def _segments(model: ir.Model, limit: int) -> Iterator[list[ir.Node]]:
    nodes: list[ir.Node] = []
    held: set[str] = set()
    size = 0
    for node in model.graph:
        if large_matrix(node) is not None:
            if nodes:
                yield nodes
            yield [node]
            nodes, held, size = [], set(), 0
            continue
        new = {n for n in _reads(node) if n in model.graph.initializers} - held
        more = sum(t.nbytes for n in new if (t := model.graph.initializers[n].const_value) is not None)
        if nodes and size + more > limit:
            yield nodes
            nodes, held, size = [], set(), 0
        nodes.append(node)
        held |= new
        size += more
    if nodes:
        yield nodes


def _reads(node: ir.Node) -> list[str]:
    """Names of everything the node reads, its subgraphs included."""
    names = [str(v.name) for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        graphs = (
            [attribute.as_graph()]
            if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.as_graphs())
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
        for graph in graphs:
            names += [name for inner in graph for name in _reads(inner)]
            names += [str(v.name) for v in graph.outputs]
    return list(dict.fromkeys(names))


def _run(
    model: ir.Model, path: Path, nodes: list[ir.Node], inputs: dict[str, Array], outputs: list[str], wide: bool
) -> list[Array]:
    graph = onnx.GraphProto(name="segment")
    folder = os.path.commonpath([path.parent.resolve(), *(f.parent for f in external_files(model))])
    for node in nodes:
        graph.node.append(ir.serde.serialize_node(node))
    for name in dict.fromkeys(name for node in nodes for name in _reads(node)):
        value = model.graph.initializers.get(name)
        if value is not None and name not in inputs:
            graph.initializer.append(_tensor(value, folder, wide))
    for name, array in inputs.items():
        if isinstance(array, list):
            kind = ir.DataType.from_numpy(array[0].dtype) if array else ir.DataType.FLOAT
            graph.input.append(onnx.helper.make_tensor_sequence_value_info(name, kind, None))
            continue
        kind = ir.DataType.from_numpy(array.dtype)
        # Lengths stay open: ONNX Runtime 1.28 to 1.31 carries known ones through Shape and Cast with the wrong type.
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    if wide:
        _widen_casts(graph)
    proto = onnx.ModelProto(graph=graph, ir_version=model.ir_version)
    for domain, version in model.opset_imports.items():
        proto.opset_import.append(onnx.OperatorSetIdProto(domain=domain, version=version))
    for function in model.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, with the same words
    options.enable_cpu_mem_arena = False
    # The graph as written: folding would copy weights, packing would double them.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    custom_op.register(options)
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        result: list[Array] = session.run(outputs, inputs)
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise ModelError(f"model: the part from node {nodes[0].name!r} on cannot be run: {first_line(error)}") from None
    return result


def _tensor(value: ir.Value, folder: str, wide: bool) -> onnx.TensorProto:
    tensor = value.const_value
    assert tensor is not None
    if not wide or tensor.dtype not in HALVES:
        proto = ir.serde.serialize_tensor(tensor)
        proto.name = str(value.name)  # that of a lifted Constant is its attribute's, or empty
        for entry in proto.external_data:
            if entry.key == "location":
                entry.value = os.path.relpath(entry.value, folder)
        return proto
    array = tensor.numpy().astype(np.float32)
    unmap(tensor)
    return onnx.numpy_helper.from_array(array, value.name)


def _widened(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype in [half.numpy() for half in HALVES] else array


def _widen_casts(graph: onnx.GraphProto) -> None:
    """Whatever would make half precision makes float32; the library's own operators take either."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in HALVES:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in HALVES:
                # Of ConstantOfShape. Before 1.19 onnx itself reads the bits of a bfloat16 as a number.
                wide = ir.serde.deserialize_tensor(attribute.t).numpy().astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(wide))
            if attribute.type == onnx.AttributeProto.GRAPH:
                _widen_casts(attribute.g)
