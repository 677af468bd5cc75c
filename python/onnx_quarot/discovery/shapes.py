"""Concrete shapes of every value, and which of its dimensions never change.

Exporters leave many last dimensions unknown or symbolic, so the graph is walked twice with every symbolic dimension set
to a prime of its own: a dimension that comes out equal in both walks is static. Shape arithmetic (Shape, Gather, Concat
feeding a Reshape) is evaluated on the way with ONNX's reference evaluator; everything else goes through ONNX's
shape inference one node at a time, and contrib operators through :data:`CONTRIB`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnx_quarot.discovery.basis import DisjointSets
from onnx_quarot.discovery.constants import tensor_shape

Shape = tuple[int, ...]
Array = np.ndarray[Any, Any]
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_MAX_TRACKED_ELEMENTS = 4096  # integer constants up to this size may be shapes, axes or bounds; larger ones are data
_PRIMES = ((3, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61),
           (5, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137))  # fmt: skip


class Shapes:
    """Shapes of one concrete walk, with ``static`` flags from comparing it with another.

    Attributes are dictionaries keyed by :class:`onnx_ir.Value`: ``shape``, ``dtype``, ``static`` (a tuple of flags,
    one a dimension), ``values`` (known integer tensors of the first walk) and ``constants`` (those that are equal in
    both). Values without an entry have an unknown shape.
    """

    def __init__(self, model: ir.Model) -> None:
        merged = DisjointSets()
        first = _walk(model, _PRIMES[0], merged)
        second = _walk(model, _PRIMES[1], merged)
        self.shape: dict[ir.Value, Shape] = first.shape
        self.dtype: dict[ir.Value, ir.DataType] = first.dtype
        self.values: dict[ir.Value, Array] = first.values
        self.static: dict[ir.Value, tuple[bool, ...]] = {
            v: tuple(a == b for a, b in zip(s, second.shape[v], strict=True))
            for v, s in first.shape.items()
            if v in second.shape and len(second.shape[v]) == len(s)
        }
        self.constants: dict[ir.Value, Array] = {
            v: x for v, x in first.values.items() if v in second.values and np.array_equal(x, second.values[v])
        }

    def known(self, value: ir.Value) -> bool:
        return value in self.static

    def is_float(self, value: ir.Value) -> bool:
        return self.dtype.get(value) in FLOATS


class _Conflict(Exception):
    """Two symbols that the graph uses as one dimension."""


class _State:
    def __init__(self) -> None:
        self.shape: dict[ir.Value, Shape] = {}
        self.dtype: dict[ir.Value, ir.DataType] = {}
        self.values: dict[ir.Value, Array] = {}


def _walk(model: ir.Model, primes: Sequence[int], merged: DisjointSets) -> _State:
    """One concrete walk; repeated as often as two symbols turn out to name the same dimension."""
    while True:
        try:
            return _Walk(model, primes, merged).run()
        except _Conflict:
            continue


class _Walk:
    def __init__(self, model: ir.Model, primes: Sequence[int], merged: DisjointSets) -> None:
        self.graph = model.graph
        self.opsets = dict(model.graph.opset_imports)
        self.opsets.setdefault("", 21)
        self.merged = merged
        self.state = _State()
        self._primes = _prime_stream(primes)
        self._symbols: dict[object, int] = {}

    def run(self) -> _State:
        st = self.state
        for value in self.graph.inputs:
            if value.shape is not None and value.dtype is not None:
                st.shape[value] = tuple(self._dimension(d, value, i) for i, d in enumerate(value.shape))
                st.dtype[value] = value.dtype
        for value in self.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            st.shape[value] = tensor_shape(tensor)
            st.dtype[value] = tensor.dtype
            if tensor.dtype not in FLOATS and tensor.size <= _MAX_TRACKED_ELEMENTS:
                st.values[value] = tensor.numpy()
        for node in self.graph:
            self._node(node)
        return st

    def _dimension(self, dim: object, value: ir.Value, axis: int) -> int:
        if isinstance(dim, int):
            return dim
        name = str(dim) if getattr(dim, "value", dim) is not None else f"{value.name}:{axis}"
        key = self.merged.find(name)
        if key not in self._symbols:
            self._symbols[key] = next(self._primes)
        return self._symbols[key]

    def _node(self, node: ir.Node) -> None:
        st = self.state
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type == "Shape" and node.domain == "" and node.inputs[0] in st.shape:
            self._set_value(node.outputs[0], _shape_operator(node, st.shape[node.inputs[0]]))
            return
        if (rule := CONTRIB.get((node.domain, node.op_type))) is not None:
            for value, result in zip(node.outputs, rule(node, st.shape), strict=False):
                if result is not None:
                    st.shape[value] = result
                    source = node.inputs[0]
                    if source in st.dtype:
                        st.dtype[value] = st.dtype[source]
            return
        if any(isinstance(a, ir.Attr) and a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
               for a in node.attributes.values()):  # fmt: skip
            return  # a subgraph: its outputs stay unknown, hence blocked
        if node.outputs and inputs and all(v in st.values for v in inputs) and self._evaluate(node, inputs):
            return
        self._infer(node, inputs)

    def _set_value(self, value: ir.Value, array: Array) -> None:
        st = self.state
        st.shape[value] = tuple(int(d) for d in array.shape)
        st.dtype[value] = ir.DataType.from_numpy(array.dtype)
        if st.dtype[value] not in FLOATS and array.size <= _MAX_TRACKED_ELEMENTS:
            st.values[value] = array

    def _evaluate(self, node: ir.Node, inputs: Sequence[ir.Value]) -> bool:
        """Constant-fold one small integer node; False where the reference has no implementation of it."""
        st = self.state
        make = onnx.helper
        unique = list(dict.fromkeys(inputs))
        ins = [make.make_tensor_value_info(str(v.name), int(st.dtype[v]), None) for v in unique]
        outs = [onnx.ValueInfoProto(name=str(v.name)) for v in node.outputs]
        graph = make.make_graph([ir.to_proto(node)], "node", ins, outs)
        opsets = [make.make_opsetid(d, v) for d, v in self.opsets.items()]
        try:
            results = ReferenceEvaluator(make.make_model(graph, opset_imports=opsets)).run(
                None, {str(v.name): st.values[v] for v in unique}
            )
        except Exception:  # the reference raises whatever it likes; inference is tried next
            return False
        for value, result in zip(node.outputs, results, strict=True):
            self._set_value(value, np.asarray(result))
        return True

    def _infer(self, node: ir.Node, inputs: Sequence[ir.Value]) -> None:
        st = self.state
        make = onnx.helper
        if any(v not in st.shape for v in inputs):
            return
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opsets.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            return
        try:
            results = onnx.shape_inference.infer_node_outputs(
                schema,
                ir.to_proto(node),
                {str(v.name): make.make_tensor_type_proto(int(st.dtype[v]), st.shape[v]) for v in inputs},
                {
                    str(v.name): onnx.numpy_helper.from_array(st.values[v], str(v.name))
                    for v in inputs
                    if v in st.values
                },
                opset_imports=[make.make_opsetid(d, v) for d, v in self.opsets.items()],
                ir_version=8,
            )
        except onnx.shape_inference.InferenceError:
            self._merge_conflicting(inputs)
            return
        for value in node.outputs:
            tensor = results[value.name].tensor_type if value.name in results else None
            if tensor is None:
                continue
            st.dtype[value] = ir.DataType(tensor.elem_type)
            if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
                st.shape[value] = tuple(int(d.dim_value) for d in tensor.shape.dim)

    def _merge_conflicting(self, inputs: Sequence[ir.Value]) -> None:
        """Exporters give one dimension several symbols; where two meet and differ, they are the same."""
        by_prime = {p: key for key, p in self._symbols.items()}
        shapes = [self.state.shape[v] for v in inputs]
        for i, a in enumerate(shapes):
            for b in shapes[i + 1 :]:
                for x, y in zip(reversed(a), reversed(b), strict=False):
                    if x != y and x in by_prime and y in by_prime:
                        self.merged.union(by_prime[x], by_prime[y])
                        raise _Conflict


def _prime_stream(first: Sequence[int]) -> Iterator[int]:
    """The given primes, then larger ones without end (a step of two keeps the walks' streams apart)."""
    yield from first
    candidate = 1009 + first[0]
    while True:
        candidate += 2
        if all(candidate % d for d in range(3, int(candidate**0.5) + 1, 2)):
            yield candidate


def _shape_operator(node: ir.Node, shape: Shape) -> Array:
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(shape))
    return np.array(shape[start:end], np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes of operators that ONNX itself does not know.

ContribRule = Callable[[ir.Node, dict[ir.Value, Shape]], "list[Shape | None]"]


def _same_as_first(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    first = node.inputs[0]
    return [shapes.get(first) if first is not None else None]


def _skip_norm(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    x = shapes.get(node.inputs[0]) if node.inputs[0] is not None else None
    if x is None:
        return []
    statistics = (*x[:-1], 1)
    return [x, statistics, statistics, x]


def _group_query_attention(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    query = shapes.get(node.inputs[0]) if node.inputs[0] is not None else None
    past = node.inputs[3] if len(node.inputs) > 3 else None
    if query is None or len(query) != 3:
        return []
    heads, kv_heads = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    batch, length, width = query
    size = width // (heads + 2 * kv_heads) if node.inputs[1] is None else width // heads
    total = length
    if past is not None and past in shapes:
        total += shapes[past][2]
        for cache in (node.inputs[3], node.inputs[4]):
            if cache is not None and cache in shapes:
                shapes[cache] = (*shapes[cache][:3], size)  # exported with a symbol for the head size
    present = (batch, kv_heads, total, size)
    return [(batch, length, heads * size), present, present]


CONTRIB: dict[tuple[str, str], ContribRule] = {
    ("", "SimplifiedLayerNormalization"): _same_as_first,
    ("com.microsoft", "SimplifiedLayerNormalization"): _same_as_first,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_norm,
    ("com.microsoft", "SkipLayerNormalization"): _skip_norm,
    ("com.microsoft", "GroupQueryAttention"): _group_query_attention,
    ("com.microsoft", "RotaryEmbedding"): _same_as_first,
    ("com.microsoft", "FastGelu"): _same_as_first,
    ("onnx_quarot", "Hadamard"): _same_as_first,
    ("com.microsoft", "QuickGelu"): _same_as_first,
}
