"""Concrete shapes of every value, and which of its dimensions never change.

Exporters leave many last dimensions unknown or symbolic, so the graph is walked twice with every symbolic dimension set
to a prime of its own: a dimension that comes out equal in both walks is static. Shape arithmetic (Shape, Gather, Concat
feeding a Reshape) is evaluated on the way with ONNX's reference evaluator; everything else goes through ONNX's
shape inference one node at a time, and contrib operators through :mod:`contrib_shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnx_quarot.discovery.basis import DisjointSets
from onnx_quarot.discovery.constants import tensor_shape
from onnx_quarot.discovery.contrib_shapes import CLASSIC, CONTRIB, MICROSOFT, Shape
from onnx_quarot.editing import has_subgraphs

Array = np.ndarray[Any, Any]
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_MAX_TRACKED_ELEMENTS = 4096  # integer constants up to this size may be shapes, axes or bounds; larger ones are data
_MAX_TRACKED_FLOATS = 4  # sizes are scaled in floating point (the side of a square of patches)
_GROWING = frozenset(("ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"))
_MAX_GROWN_ELEMENTS = 1 << 20  # of their results: a few numbers can ask for any amount of memory
_IN_EVERY_OPSET = {("", "LayerNormalization"): 17}  # to ONNX Runtime, whose optimizer writes it into old models
_TRACKED_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})
# Small ones first: a length beyond a model's table of positions would be cut.
_PRIMES = ((3, 7, 13, 19, 29, 37, 43, 53, 61, 71, 79, 89), (5, 11, 17, 23, 31, 41, 47, 59, 67, 73, 83, 97))
# Images and sounds are halved many times, and where what was halved and what was doubled again meet, a length that is
# not divisible disagrees with itself. Small lengths come first: a text line's height is 1 in the end.
_DIVISIBLE = 64
_CONVOLUTIONS = frozenset(("Conv", "ConvInteger", "ConvTranspose", "QLinearConv", "MaxPool", "AveragePool", "LpPool"))
_PASSING = frozenset((
    "Add", "Cast", "Clip", "Concat", "Div", "Identity", "Mul", "Pad", "Pow", "QuantizeLinear", "DequantizeLinear",
    "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze",
))  # fmt: skip


class Shapes:
    """Shapes of one concrete walk, with ``static`` flags from comparing it with another.

    Attributes are dictionaries keyed by :class:`onnx_ir.Value`: ``shape``, ``dtype``, ``static`` (a tuple of flags,
    one a dimension), ``values`` (known integer tensors of the first walk) and ``constants`` (those that are equal in
    both). Values without an entry have an unknown shape. ``guesses``: how symbolic dimensions are told apart.
    """

    def __init__(self, model: ir.Model, guesses: Sequence[Guess] | None = None) -> None:
        best: tuple[_State, _State] | None = None
        attempts = [(guess, 1) for guess in guesses or (_as_named, _one_length, _past_and_length)]
        if guesses is None and any(map(_is_convolved, model.graph.inputs)):
            attempts.append((_as_named, _DIVISIBLE))
        for guess, divisor in attempts:
            merged = _Symbols()
            first, second = (_walk(model, primes, merged, guess, divisor) for primes in _PRIMES)
            if merged.bound:  # perhaps found in the second walk only
                first = _walk(model, _PRIMES[0], merged, guess, divisor)
            walks = first, second
            if best is None or len(walks[1].inferred) > len(best[1].inferred):
                best = walks
            if all(v in second.inferred for n in model.graph for v in n.outputs if v.name):
                break
        assert best is not None
        first, second = best
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
    """Two symbols that the graph uses as one dimension, or one that has a fixed value."""


class _Symbols(DisjointSets):
    """Names of dimensions, with those that turned out to be the same, or a number."""

    def __init__(self) -> None:
        super().__init__()
        self.bound: dict[object, int] = {}


# How symbolic dimensions of inputs are told apart. What an exporter named differently is often equal all the same; the
# next guess is tried where a shape stays unknown. A wrong one only costs knowledge: no rotation lives on such an axis.
Guess = Callable[[ir.Value, int, str], "tuple[str, ...]"]


def by_name(value: ir.Value, axis: int, name: str) -> tuple[str, ...]:
    """Exactly as named, which is no guess at all; "a + b" is a sum."""
    return tuple(part.strip() for part in name.split("+"))


def _as_named(value: ir.Value, axis: int, name: str) -> tuple[str, ...]:
    """By name; but the first axis of every input is the batch."""
    return ("axis 0",) if axis == 0 else by_name(value, axis, name)


def _one_length(value: ir.Value, axis: int, name: str) -> tuple[str, ...]:
    """Tokens and their mask are of one length."""
    rank = 0 if value.shape is None else len(value.shape)
    return ("axis 1",) if axis == 1 and rank == 2 else _as_named(value, axis, name)


def _past_and_length(value: ir.Value, axis: int, name: str) -> tuple[str, ...]:
    """The mask covers the cache and the tokens, which are the first input; what else is as long as these is named so. A
    cache may hold keys and values, in front of the batch.
    """
    rank = 0 if value.shape is None else len(value.shape)
    if rank in (4, 5) and axis == rank - 2:
        return ("past",)
    if rank == 5 and axis == 1:
        return ("axis 0",)
    tokens = None if value.graph is None else value.graph.inputs[0]
    first = None if tokens is None else tokens.shape
    if first is not None and len(first) > 1 and axis and name == str(first[1]):
        return ("length",)
    if axis == 1 and rank == 2:
        return ("length",) if value is tokens else ("past", "length")
    return _as_named(value, axis, name)


class _State:
    def __init__(self) -> None:
        self.inferred: set[ir.Value] = set()  # rather than read from the file
        self.shape: dict[ir.Value, Shape] = {}
        self.dtype: dict[ir.Value, ir.DataType] = {}
        self.values: dict[ir.Value, Array] = {}


def _walk(model: ir.Model, primes: Sequence[int], merged: _Symbols, guess: Guess, divisor: int) -> _State:
    """One concrete walk; repeated as often as two symbols turn out to name the same dimension."""
    while True:
        try:
            return _Walk(model, primes, merged, guess, divisor).run()
        except _Conflict:
            continue


class _Walk:
    def __init__(self, model: ir.Model, primes: Sequence[int], merged: _Symbols, guess: Guess, divisor: int) -> None:
        self.guess, self._divisor = guess, divisor
        self.graph = model.graph
        self.opsets = dict(model.graph.opset_imports)
        self.opsets.setdefault("", 21)
        self.merged = merged
        self.state = _State()
        self._primes = _prime_stream(primes)
        self._symbols: dict[object, int] = {}
        self._convolved: set[object] = set()
        self._partial: dict[ir.Value, tuple[int | None, ...]] = {}

    def run(self) -> _State:
        st = self.state
        for value in self.graph.inputs:
            if value.shape is not None and value.dtype is not None:
                if self._divisor > 1 and _is_convolved(value):
                    names = (
                        self._parts(d, value, i) for i, d in enumerate(value.shape) if i and not isinstance(d, int)
                    )
                    self._convolved.update(self.merged.find(name) for parts in names for name in parts)
                st.shape[value] = tuple(self._dimension(d, value, i) for i, d in enumerate(value.shape))
                st.dtype[value] = value.dtype
        self._constants(self.graph)
        for node in self.graph:
            self._node(node)
            for value in node.outputs:
                if value in st.shape:
                    st.inferred.add(value)
                else:
                    self._read(value)
                    self._open(value)
        return st

    def _constants(self, graph: ir.Graph) -> None:
        st = self.state
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            st.shape[value] = tensor_shape(tensor)
            st.dtype[value] = tensor.dtype
            if _may_be_a_size(tensor.dtype, tensor.size):
                st.values[value] = tensor.numpy()

    def _branches(self, node: ir.Node) -> None:
        """What both branches of an If agree on holds whichever is taken; where they differ the length is dynamic."""
        st = self.state
        ends = []
        for name in ("then_branch", "else_branch"):
            branch = node.attributes[name].as_graph()
            self._constants(branch)
            for inner in branch:
                self._node(inner)
            ends.append(branch.outputs)
        for value, one, other in zip(node.outputs, *ends, strict=True):
            a, b = st.shape.get(one), st.shape.get(other)
            if a is not None and b is not None and len(a) == len(b) and st.dtype[one] == st.dtype[other]:
                pairs = enumerate(zip(a, b, strict=True))
                st.shape[value] = tuple(x if x == y else self._symbol(f"{value.name}:{axis}") for axis, (x, y) in pairs)
                st.dtype[value] = st.dtype[one]

    def _read(self, value: ir.Value) -> None:
        """The shape the file states, where it is complete (symbols count)."""
        dims = value.shape
        if (
            dims is None
            or value.dtype is None
            or any(d == 0 or (not isinstance(d, int) and d.value is None) for d in dims)
        ):
            return
        self.state.shape[value] = tuple(self._dimension(d, value, i) for i, d in enumerate(dims))
        self.state.dtype[value] = value.dtype

    def _open(self, value: ir.Value) -> None:
        """A length that only the values decide (the tokens of an expert) is a symbol of its own."""
        st = self.state
        if value not in st.shape and value in self._partial:
            dims = enumerate(self._partial[value])
            st.shape[value] = tuple(self._symbol(f"{value.name}:{i}") if d is None else d for i, d in dims)

    def _dimension(self, dim: object, value: ir.Value, axis: int) -> int:
        if isinstance(dim, int):
            return dim
        parts = self._parts(dim, value, axis)
        return sum(int(part) if part.isdecimal() else self._symbol(part) for part in parts)

    def _parts(self, dim: object, value: ir.Value, axis: int) -> tuple[str, ...]:
        name = str(dim) if getattr(dim, "value", dim) is not None else f"{value.name}:{axis}"
        return self.guess(value, axis, name) if value.is_graph_input() else _as_named(value, -1, name)

    def _symbol(self, name: str) -> int:
        key = self.merged.find(name)
        if key in self.merged.bound:
            return self.merged.bound[key]
        if key not in self._symbols:
            self._symbols[key] = next(self._primes) * (self._divisor if key in self._convolved else 1)
        return self._symbols[key]

    def _node(self, node: ir.Node) -> None:
        st = self.state
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type == "Shape" and node.domain == "" and node.inputs[0] in st.shape:
            self._set_value(node.outputs[0], _shape_operator(node, st.shape[node.inputs[0]]))
            return
        if node.op_type == "Size" and node.domain == "" and node.inputs[0] in st.shape:
            self._set_value(node.outputs[0], np.array(math.prod(st.shape[node.inputs[0]]), np.int64))
            return
        if (rule := CONTRIB.get((node.domain, node.op_type))) is not None:
            for value, result in zip(node.outputs, rule(node, st.shape), strict=False):
                if result is not None:
                    st.shape[value] = result
                    # The features' type: the first input of an embedding is a number of a token.
                    source = next((v for v in inputs if st.dtype.get(v) in FLOATS), node.inputs[0])
                    if node.domain == CLASSIC:
                        st.dtype[value] = ir.DataType.FLOAT
                    elif source in st.dtype:
                        st.dtype[value] = st.dtype[source]
            return
        if node.op_type == "If" and node.domain == "":
            self._branches(node)
            return
        if has_subgraphs(node):
            return  # a subgraph: its outputs stay unknown, hence blocked
        if node.outputs and inputs and all(v in st.values for v in inputs) and self._evaluate(node, inputs):
            return
        self._infer(node, inputs)

    def _set_value(self, value: ir.Value, array: Array) -> None:
        st = self.state
        st.shape[value] = tuple(int(d) for d in array.shape)
        st.dtype[value] = ir.DataType.from_numpy(array.dtype)
        if _may_be_a_size(st.dtype[value], array.size):
            st.values[value] = array

    def _evaluate(self, node: ir.Node, inputs: Sequence[ir.Value]) -> bool:
        """Constant-fold one small integer node; False where the reference has no implementation of it."""
        st = self.state
        if node.op_type in _GROWING and self._grown(node, inputs) > _MAX_GROWN_ELEMENTS:
            return False
        make = onnx.helper
        unique = list(dict.fromkeys(inputs))
        ins = [make.make_tensor_value_info(str(v.name), int(st.dtype[v]), None) for v in unique]
        outs = [onnx.ValueInfoProto(name=str(v.name)) for v in node.outputs]
        graph = make.make_graph([ir.serde.serialize_node(node)], "node", ins, outs)
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

    def _grown(self, node: ir.Node, inputs: Sequence[ir.Value]) -> float:
        """How many elements a node would make; no limit where inference does not say."""
        results = self._inference(node, inputs) or {}
        shapes = [r.tensor_type.shape.dim for r in results.values() if r.tensor_type.HasField("shape")]
        known = shapes and all(d.HasField("dim_value") for dims in shapes for d in dims)
        return sum(math.prod(d.dim_value for d in dims) for dims in shapes) if known else math.inf

    def _infer(self, node: ir.Node, inputs: Sequence[ir.Value]) -> None:
        st = self.state
        if any(v not in st.shape for v in inputs):
            return
        summed = _summed(node, [st.shape[v] for v in inputs])
        fits = summed is None or summed[0] == summed[1]  # which not every version of onnx looks at in a Gemm
        results = self._inference(node, inputs) if fits else None
        if results is None:
            self._merge_conflicting(node, inputs)
            return
        for value in node.outputs:
            tensor = results[value.name].tensor_type if value.name in results else None
            if tensor is None:
                continue
            st.dtype[value] = ir.DataType(tensor.elem_type)
            if tensor.HasField("shape"):
                dims = tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in tensor.shape.dim)
                self._partial[value] = dims
                if all(d is not None for d in dims):
                    st.shape[value] = tuple(int(d.dim_value) for d in tensor.shape.dim)

    def _inference(self, node: ir.Node, inputs: Sequence[ir.Value]) -> dict[str, onnx.TypeProto] | None:
        """The types of the outputs as ONNX infers them, none for an operator it does not know; None if it refuses."""
        st = self.state
        make = onnx.helper
        proto = ir.serde.serialize_node(node)
        if (node.domain, node.op_type) == (MICROSOFT, "FusedConv"):  # a Conv with an activation
            proto.domain, proto.op_type = "", "Conv"
            kept = [a for a in proto.attribute if not a.name.startswith("activation")]
            del proto.attribute[:], proto.input[3:]
            proto.attribute.extend(kept)
            inputs = inputs[:3]
        try:
            opset = max(self.opsets.get(proto.domain, 1), _IN_EVERY_OPSET.get((proto.domain, proto.op_type), 0))
            schema = onnx.defs.get_schema(proto.op_type, opset, proto.domain)
        except onnx.defs.SchemaError:
            return {}
        try:
            return onnx.shape_inference.infer_node_outputs(
                schema,
                proto,
                {str(v.name): make.make_tensor_type_proto(int(st.dtype[v]), st.shape[v]) for v in inputs},
                {
                    str(v.name): onnx.numpy_helper.from_array(st.values[v], str(v.name))
                    for v in inputs
                    if v in st.values
                },
                opset_imports=[make.make_opsetid(d, v) for d, v in self.opsets.items()],
                ir_version=8,
            )
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, TypeError, ValueError):
            return None

    def _merge_conflicting(self, node: ir.Node, inputs: Sequence[ir.Value]) -> None:
        """Exporters give one dimension several symbols; where two meet and differ, they are the same. Where one meets a
        number (the head size of a cache, the rows of a matrix), it is that number. No proof: either may be a length of
        1, broadcast.
        """
        if self.guess is by_name:
            return
        by_prime = {p: key for key, p in self._symbols.items()}
        shapes = [self.state.shape[v] for v in inputs]
        if not shapes:
            return
        if node.op_type == "Split" and inputs[-1] in self.state.values:
            length = shapes[0][node.attributes.get_int("axis", 0)]  # that of the pieces together
            if length in by_prime:
                self.merged.bound[by_prime[length]] = int(self.state.values[inputs[-1]].sum())
                raise _Conflict
        if (summed := _summed(node, shapes)) is not None and summed[0] in by_prime:
            symbol, number = summed
            if all(number % prime for prime in by_prime):
                self.merged.bound[by_prime[symbol]] = number
                raise _Conflict
        joins = node.op_type == "Concat"
        axis = node.attributes.get_int("axis", 0) - (len(shapes[0]) if node.attributes.get_int("axis", 0) >= 0 else 0)
        for i, a in enumerate(shapes):
            for b in shapes[i + 1 :]:
                for back in range(1, min(len(a), len(b)) + 1):
                    x, y = a[-back], b[-back]
                    if x == y or (joins and -back == axis):
                        continue
                    if x in by_prime and y in by_prime:
                        self.merged.union(by_prime[x], by_prime[y])
                        raise _Conflict
                    x, y = (x, y) if x in by_prime else (y, x)
                    if joins and x in by_prime and all(y % prime for prime in by_prime):
                        self.merged.bound[by_prime[x]] = y
                        raise _Conflict


def _is_convolved(value: ir.Value) -> bool:
    """Whether an input is an image or a sound: what a convolution or a pooling reads, with little done to it before."""
    pending, seen = [value], {value}
    while pending:
        for node, _ in pending.pop().uses():
            if node.domain == "" and node.op_type in _CONVOLUTIONS:
                return True
            if node.domain == "" and node.op_type in _PASSING:
                pending += [v for v in node.outputs if v not in seen]
                seen.update(node.outputs)
    return False


def _summed(node: ir.Node, shapes: Sequence[Shape]) -> tuple[int, int] | None:
    """The lengths of the axes that a product sums over, of its first operand and of its second."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm") or any(not shape for shape in shapes[:2]):
        return None
    first, second = shapes[:2]
    rows = node.attributes.get_int("transA", 0) if len(first) > 1 else 0
    columns = node.attributes.get_int("transB", 0) if len(second) > 1 else 1
    return first[-2 if rows else -1], second[-1 if columns else -2]


def _may_be_a_size(dtype: ir.DataType, elements: int) -> bool:
    if dtype in FLOATS:
        return dtype in _TRACKED_FLOATS and elements <= _MAX_TRACKED_FLOATS
    return elements <= _MAX_TRACKED_ELEMENTS


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
