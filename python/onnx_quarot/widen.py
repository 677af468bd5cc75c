"""Linear layers of float16, bfloat16 or float64 models in float32, before anything else is done to them.

    x -> MatMul -> y      becomes      x -> Cast -> MatMul -> Cast -> y

with the weight in float32. Operators that quantize differ in the types they take (DequantizeLinear knows float16 from
opset 19 on, DynamicQuantizeMatMul never), ONNX Runtime's CPU multiplies float16 in float32 anyway, and a rotated weight
is not rounded twice. Everything between the layers, inputs, outputs and caches among it, keeps its type.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from .editing import GraphNames, insert_behind
from .errors import ModelError
from .load import unmap
from .sites import LinearSite, constant_root, constant_tensor, linear_sites, looked_up, view_shape

KEY = "onnx_quarot.widened"
OTHERS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def widen_layers(model: ir.Model, sites: Iterable[LinearSite], *, tables: bool = True) -> bool:
    """Let `sites` (`linear_sites` of this model) of another type compute in float32, in place; whether any did.

    tables: constants that rows are looked up in become float32 as well, their rows are made narrow again. Which layers
    they were is written into the model's metadata.
    """
    found = {site.node: site.dtype for site in sites if site.dtype in OTHERS}
    edit = _Edit(model.graph, found)
    roots = [constant_root(node.inputs[1]) for node in found]
    if tables:
        roots += [constant_root(node.inputs[0]) for node in model.graph if _reads_table(node)]
    for root in dict.fromkeys(root for root, _ in filter(None, roots)):
        edit.constant(root)
    for node, narrow in found.items():
        edit.layer(node, narrow)
    if found:
        names = [node.name or node.outputs[0].name for node in found]
        model.metadata_props[KEY] = json.dumps(names, separators=(",", ":"))
    return edit.changed


def widened(model: ir.Model) -> list[str]:
    """The names :func:`widen_layers` wrote; ModelError for what cannot be read."""
    text = model.metadata_props.get(KEY, "[]")
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"model: its metadata entry {KEY!r} cannot be read")
    return names


def widen_alike(model: ir.Model, other: ir.Model) -> None:
    """Widen the layers of `model` that were widened in `other`."""
    names = set(widened(other))
    if names:
        widen_layers(model, [site for site in linear_sites(model) if site.node_name in names])


def widen_bfloat16(model: ir.Model) -> bool:
    """Let a whole graph compute in float32 where it is in bfloat16, in place, to be run where nothing else can be;
    whether it was anywhere.
    """
    graphs = [model.graph, *{node.graph for node in model.graph.all_nodes()} - {model.graph, None}]
    values = [v for g in graphs if g is not None for v in (*g.inputs, *g.initializers.values())]
    nodes = list(model.graph.all_nodes())
    found = [v for v in (*values, *(v for n in nodes for v in n.outputs)) if v.dtype == ir.DataType.BFLOAT16]
    for value in found:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.const_value is not None:
            value.const_value = _wide(value.const_value)
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.value == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _wide(attribute.as_tensor()))
    return bool(found)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    def read() -> ir.TensorProtocol:
        array = tensor.numpy().astype(np.float32)
        unmap(tensor)
        return ir.Tensor(array, name=tensor.name)

    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _reads_table(node: ir.Node) -> bool:
    """Whether a node looks rows of a constant matrix up."""
    found = looked_up(node)
    return found is not None and len(view_shape(*found)) == 2


class _Edit:
    """The edits on one graph; `layers` are the nodes that will read float32."""

    def __init__(self, graph: ir.Graph, layers: Collection[ir.Node]) -> None:
        self._graph, self._names, self._layers = graph, GraphNames(graph), layers
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.changed = False

    def constant(self, root: ir.Value) -> None:
        """Make a constant float32; what reads it otherwise sees the old type, behind a Cast."""
        tensor = constant_tensor(root)
        if tensor is None or tensor.dtype not in OTHERS:
            return

        root.const_value = _wide(tensor)
        root.const_value.name = root.name
        self._made_float(root, tensor.dtype)
        self.changed = True

    def _made_float(self, value: ir.Value, narrow: ir.DataType) -> None:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        for reader, index in tuple(value.uses()):
            if index == 1 and reader in self._layers:
                continue
            if reader.op_type in ("Transpose", "Identity") and reader.domain == "":
                self._made_float(reader.outputs[0], narrow)
            elif index == 0 and _reads_table(reader):
                self._behind(reader, narrow)
            else:
                reader.replace_input_with(index, self._cast(value, narrow))

    def layer(self, node: ir.Node, narrow: ir.DataType) -> None:
        """Casts in front of a layer and behind it."""
        for index, value in enumerate(node.inputs):
            if value is not None and not (index == 1 and value.dtype == ir.DataType.FLOAT):
                node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT))
        self._behind(node, narrow)
        self.changed = True

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) not in self._casts:
            cast = self._node(value, dtype)
            insert_behind(self._graph, value, [cast])
            cast.outputs[0].name = self._names.unique(f"{value.name}_{dtype.name.lower()}")
            self._casts[value, dtype] = cast.outputs[0]
        return self._casts[value, dtype]

    def _behind(self, node: ir.Node, narrow: ir.DataType) -> None:
        """A Cast that takes over the name and the readers of a node's result, which becomes float32."""
        old = node.outputs[0]
        cast = self._node(old, narrow)
        new, name = cast.outputs[0], old.name
        old.name, new.name = self._names.unique(f"{name}_float"), name
        old.type = ir.TensorType(ir.DataType.FLOAT)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        cast.replace_input_with(0, old)
        self._graph.insert_after(node, cast)

    def _node(self, value: ir.Value, dtype: ir.DataType) -> ir.Node:
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=self._names.unique(f"{value.name}/Cast"))
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
        return cast
