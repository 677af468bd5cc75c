"""The few changes of nodes (not of weights) that a plan asks for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_quarot.editing import GraphNames, insert_behind

_RMS_NORM_OPSET = 23
AXES_INPUT_OPSET = 18  # of reductions


def add_behind(names: GraphNames, node: ir.Node, bias: ir.Value) -> None:
    """Add ``bias`` to output 0 of ``node``; all readers see the sum, which takes over the output's name."""
    old = node.outputs[0]
    add = ir.node("Add", [old, bias], name=names.unique(f"{old.name}/bias"))  # nodes may be without names
    new = add.outputs[0]
    new.type, new.shape = old.type or ir.TensorType(bias.dtype), old.shape  # type: ignore[arg-type]
    name, old.name = old.name, names.unique(f"{old.name}.product")
    new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    add.replace_input_with(0, old)
    names.graph.insert_after(node, add)


def to_rms_norm(model: ir.Model, node: ir.Node) -> None:
    """Put the RMS norm of the same epsilon and scale in the place of a LayerNorm whose input has zero mean.

    ``RMSNormalization`` where the model's opset has it (23), else the operator ONNX Runtime has under ONNX's domain
    since long before, which onnxruntime-genai's models use as well.
    """
    skip = node.op_type == "SkipLayerNormalization"
    epsilon = {"epsilon": node.attributes.get_float("epsilon", 1e-12 if skip else 1e-5)}
    if skip:
        added = node.inputs[4] if len(node.inputs) > 4 else None
        inputs = [*node.inputs[:3], *([added] if added is not None else [])]
        new = ir.node(
            "SkipSimplifiedLayerNormalization", inputs, epsilon, domain=node.domain, num_outputs=len(node.outputs)
        )
    else:
        opset = model.graph.opset_imports.get("", 0)
        op_type = "RMSNormalization" if opset >= _RMS_NORM_OPSET else "SimplifiedLayerNormalization"
        new = ir.node(op_type, node.inputs[:2], {**epsilon, "axis": -1, "stash_type": 1})
    new.name = node.name
    model.graph.insert_before(node, new)
    x, scale = node.inputs[0], node.inputs[2 if skip else 1]
    assert x is not None
    assert scale is not None
    for old, made in zip(node.outputs, new.outputs, strict=False):
        # Said where nobody did: what goes by ONNX's shape inference would know nothing behind operators it lacks.
        kind = old.type or x.type or (None if scale.dtype is None else ir.TensorType(scale.dtype))
        name, made.type, made.shape = old.name, kind, old.shape
        old.name, made.name = None, name
        old.replace_all_uses_with(made, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def bypass(model: ir.Model, node: ir.Node, index: int) -> None:
    """Readers of the node read its input ``index`` instead; the node goes."""
    source = node.inputs[index]
    if source is None:
        raise AssertionError(f"input {index} of {node.name!r} is absent")
    node.outputs[0].replace_all_uses_with(source)
    model.graph.remove(node, safe=True)


def feature_mean(graph: ir.Graph, value: ir.Value) -> ir.Node:
    """The mean of ``value`` over its last axis, which stays, with length 1; not in the graph yet, and without names."""
    attributes: dict[str, int | list[int]] = {"keepdims": 1}
    inputs: list[ir.Value] = [value]
    if graph.opset_imports.get("", 0) >= AXES_INPUT_OPSET:
        name = "onnx_quarot.last_axis"
        if name not in graph.initializers:
            axes = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
            axes.const_value = ir.tensor(np.array([-1], np.int64), name=name)
            graph.register_initializer(axes)
        inputs.append(graph.initializers[name])
    else:
        attributes["axes"] = [-1]
    mean = ir.node("ReduceMean", inputs, attributes)
    mean.outputs[0].type = value.type
    return mean


def subtract_mean(names: GraphNames, value: ir.Value) -> ir.Value:
    """``value`` minus its mean over the last axis, made right behind it. Nobody reads the result yet."""
    graph = names.graph
    mean = feature_mean(graph, value)
    mean.name = names.unique(f"{value.name}/mean")
    centred = ir.node("Sub", [value, mean.outputs[0]], name=names.unique(f"{value.name}/centre"))
    for node, suffix in ((mean, "mean"), (centred, "centred")):
        node.outputs[0].name = names.unique(f"{value.name}.{suffix}")
        node.outputs[0].type = value.type
    centred.outputs[0].shape = value.shape
    insert_behind(graph, value, [mean, centred])
    return centred.outputs[0]
