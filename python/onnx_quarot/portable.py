"""Functions of standard operators that say what the operators of this domain compute: what runs anywhere.

One body for each distinct transform, told apart by its overload. See :mod:`onnx_quarot.custom_op`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_quarot import _core
from onnx_quarot.errors import ModelError, OrderError

DOMAIN = "onnx_quarot"
OPSET_VERSION = 1

# Function overloads, which tell transforms of different sizes apart, came with this version of the format. ONNX
# Runtime follows them from 1.27 on; an older one inlines any overload for all, so there only the library is right.
_MIN_IR_VERSION = 10
# Used for the function body where a model imports no standard operators at all.
_DEFAULT_OPSET = 21
TYPE_SUFFIX = {
    ir.DataType.FLOAT: "",
    ir.DataType.FLOAT16: "_f16",
    ir.DataType.BFLOAT16: "_bf16",
    ir.DataType.DOUBLE: "_f64",
}


def check_input(x: ir.Value, size: int, name: str, types: tuple[ir.DataType, ...]) -> ir.DataType:
    if x.dtype is None or x.dtype not in types:
        kind = "unknown" if x.dtype is None else x.dtype.name
        *others, last_type = (dtype.name for dtype in types)
        allowed = f"{', '.join(others)} or {last_type}" if others else last_type
        raise ModelError(f"{name}: the type of x ({x.name!r}) is {kind}: it must be {allowed}")
    if x.shape is not None and (x.shape.rank() == 0 or x.shape[-1] not in (size, None)):
        last = x.shape[-1] if x.shape.rank() else None
        if last is None or isinstance(last, int):
            raise ModelError(f"{name}: x ({x.name!r}) has shape {x.shape}: its last axis must have length {size}")
    return x.dtype


def _signs_value(model: ir.Model, signs: npt.NDArray[np.int8]) -> ir.Value:
    # Named by content, so that equal signs find each other without reading other initializers.
    name = f"onnx_quarot.signs.{hashlib.sha256(signs.tobytes()).hexdigest()[:16]}"
    initializers = model.graph.initializers
    if name not in initializers:
        tensor = ir.tensor(signs, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(signs.shape), const_value=tensor)
        model.graph.register_initializer(value)
    return initializers[name]


@dataclass(frozen=True)
class Transform:
    """What tells one function body from another: the type of x does, its shape does not."""

    block: int
    signs_length: int  # 0: none
    transpose: bool
    scale: float | None
    dtype: ir.DataType

    @staticmethod
    def make(
        size: int,
        block_size: int | None,
        signs: npt.NDArray[Any] | None,
        transpose: bool,
        scale: float | None,
        dtype: ir.DataType,
    ) -> Transform:
        block = size if block_size is None else block_size
        if block < 1 or size < 1 or size % block != 0:
            raise OrderError(f"block_size is {block}: it must divide size, which is {size}")
        if not _core.has_order(block):
            argument = "size" if block_size is None else "block_size"
            raise OrderError(f"{argument} is {block}: no Hadamard matrix of this size is available")
        if signs is not None:
            if signs.shape not in ((block,), (size,)):
                raise ModelError(f"signs has shape {signs.shape}: it must be ({block},) or ({size},)")
            if not np.all(np.abs(signs) == 1):
                raise ModelError("signs holds values other than +1 and -1")
        if scale is not None and not math.isfinite(scale):
            raise ModelError(f"scale is {scale}: it must be finite")
        # The attribute is a float32, and both ways of running have to mean the same number.
        exact = None if scale is None else float(np.float32(scale))
        return Transform(block, 0 if signs is None else len(signs), bool(transpose), exact, dtype)

    @staticmethod
    def of(node: ir.Node, size: int, signs: ir.Value | None) -> Transform:
        """What a node's attributes say, of a Hadamard or of an operator that has one inside; float32."""
        length = 0 if signs is None or signs.const_value is None else int(signs.const_value.shape.numpy()[0])
        return Transform(
            node.attributes.get_int("block_size", size),
            length,
            bool(node.attributes.get_int("transpose", 0)),
            node.attributes.get_float("scale", None),
            ir.DataType.FLOAT,
        )

    def prepare(self, model: ir.Model, signs: npt.NDArray[Any] | None) -> list[ir.Value]:
        """Make `model` ready for functions of this domain; return the input that holds the signs, if there are any."""
        held = [] if signs is None else [_signs_value(model, np.asarray(signs).astype(np.int8))]
        model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
        model.opset_imports.setdefault("", _DEFAULT_OPSET)
        model.opset_imports[DOMAIN] = OPSET_VERSION
        return held

    def attributes(self, size: int) -> dict[str, int | float]:
        attributes: dict[str, int | float] = {}
        if self.block != size:
            attributes["block_size"] = self.block
        if self.transpose:
            attributes["transpose"] = 1
        if self.scale is not None:
            attributes["scale"] = self.scale
        return attributes

    def overload(self) -> str:
        parts = [f"b{self.block}"]
        if self.signs_length:
            parts.append(f"signs{self.signs_length}")
        if self.transpose:
            parts.append("t")
        if self.scale is not None:
            parts.append(f"scale{np.float32(self.scale)!s}")
        return "_".join(parts) + TYPE_SUFFIX[self.dtype]

    def function(self, opset_version: int) -> ir.Function:
        """The transform in standard operators. The number and the lengths of leading axes are left open."""
        body = Body(opset_version)
        x = ir.Value(name="X", type=ir.TensorType(self.dtype))
        signs = self.signs_input()
        y = self.apply(body, x, signs)
        y.name = "Y"
        return self.wrap(body, "Hadamard", self.overload(), [x] if signs is None else [x, signs], [y])

    def signs_input(self) -> ir.Value | None:
        return ir.Value(name="signs", type=ir.TensorType(ir.DataType.INT8)) if self.signs_length else None

    def apply(self, body: Body, x: ir.Value, signs: ir.Value | None) -> ir.Value:
        """Nodes that transform `x`; the result has its shape and type."""
        short = self.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        body.compute = ir.DataType.FLOAT if short else self.dtype
        y = body.cast(x, body.compute) if short else x
        if signs is not None and not self.transpose:
            y = self._times_signs(body, y, signs)
        y = self._times_matrix(body, y)
        if signs is not None and self.transpose:
            y = self._times_signs(body, y, signs)
        if short:
            y = body.cast(y, self.dtype)
        # A length of 0 in the shape means 0. Before opset 14 it always meant "as in the input", which leaves only
        # an empty first axis right.
        allow_zero: dict[str, Any] = {"allowzero": 1} if body.opset_version >= 14 else {}
        return body.node("Reshape", [y, body.node("Shape", [x])], **allow_zero)

    def wrap(
        self, body: Body, op_type: str, overload: str, inputs: list[ir.Value], outputs: list[ir.Value]
    ) -> ir.Function:
        """The body as a function of this domain."""
        graph = ir.Graph(inputs, outputs, nodes=body.nodes, opset_imports={"": body.opset_version}, name=overload)
        # Declared for the nodes that carry them; their values are in the body already.
        declared = [
            ir.AttrInt64("block_size", self.block),
            ir.AttrInt64("transpose", int(self.transpose)),
            ir.AttrFloat32("scale", self.block**-0.5 if self.scale is None else self.scale),
        ]
        return ir.Function(DOMAIN, op_type, overload, graph=graph, attributes=declared)

    def _times_signs(self, body: Body, x: ir.Value, signs: ir.Value) -> ir.Value:
        rows = body.reshape(x, [-1, self.signs_length])
        return body.node("Mul", [rows, body.cast(signs, body.compute)])

    def _times_matrix(self, body: Body, x: ir.Value) -> ir.Value:
        """Multiply by a Kronecker product, one factor at a time, the last one first.

        Each factor meets its axis as the last one; a transposition then brings the next axis there, and after as
        many turns as there are factors the axes are in order again. A factor on the left would need no
        transposition, but ONNX Runtime before 1.32 fails in batched MatMuls of no rows; these are all 2-D.
        """
        scale = self.block**-0.5 if self.scale is None else self.scale
        first, *others = reversed(list(_factor_matrices(self.block)))
        for matrix, factor_scale in [(first, scale), *((other, None) for other in others)]:
            size = len(matrix)
            right = body.matrix(matrix.T if self.transpose else matrix, factor_scale)
            x = body.node("MatMul", [body.reshape(x, [-1, size]), right])
            if others:
                x = body.node("Transpose", [body.reshape(x, [-1, self.block // size, size])], perm=[0, 2, 1])
        return x


class Body:
    """Nodes of a function, in order."""

    def __init__(self, opset_version: int) -> None:
        self.opset_version = opset_version
        self.compute = ir.DataType.FLOAT
        self.nodes: list[ir.Node] = []

    def node(self, op_type: str, inputs: list[ir.Value], *, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: npt.NDArray[Any]) -> ir.Value:
        return self.node("Constant", [], value=ir.tensor(array))

    def reshape(self, x: ir.Value, shape: list[int]) -> ir.Value:
        return self.node("Reshape", [x, self.constant(np.array(shape, np.int64))])

    def split(self, x: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """Parts of the last axis."""
        node = ir.node("Split", [x, self.constant(np.array(sizes, np.int64))], {"axis": -1}, num_outputs=len(sizes))
        for index, output in enumerate(node.outputs):
            output.name = f"v{len(self.nodes)}_{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def reduce(self, op_type: str, x: ir.Value) -> ir.Value:
        """Over the last axis, which stays, with a length of 1."""
        if self.opset_version >= 18:
            return self.node(op_type, [x, self.constant(np.array([-1], np.int64))], keepdims=1)
        return self.node(op_type, [x], axes=[-1], keepdims=1)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.node("Cast", [x], to=int(dtype))

    def matrix(self, signs: npt.NDArray[np.int8], scale: float | None = None) -> ir.Value:
        """A matrix of +1 and -1, a byte an entry in the file."""
        matrix = self.cast(self.constant(np.ascontiguousarray(signs)), self.compute)
        if scale is None:
            return matrix
        return self.node("Mul", [matrix, self.constant(np.array(scale, self.compute.numpy()))])


def _factor_sizes(orders: list[int], log2_power: int, limit: int = 64) -> list[int]:
    """Sizes of as few factors as possible whose product is that of ``orders`` times ``2**log2_power``, about equal and
    at most ``limit`` unless an order is larger; those with the orders in them come first."""
    for count in range(len(orders), len(orders) + log2_power + 1):
        sizes = [*orders, *[1] * (count - len(orders))]
        for _ in range(log2_power):
            # Sylvester's factors stand behind the orders, so only the last order can take one in.
            last = sizes[len(orders) - 1 :]
            sizes[len(orders) - 1 + last.index(min(last))] *= 2
        if max(sizes) <= max(limit, *orders):
            break
    return sizes


def _factor_matrices(block: int) -> Iterator[npt.NDArray[np.int8]]:
    order, log2_power = _core.factorize(block)
    orders = _core.order_factors(order)
    for index, size in enumerate(_factor_sizes(orders, log2_power)):
        if index < len(orders):
            yield np.kron(_core.order_matrix(orders[index]), _sylvester(size // orders[index]))
        else:
            yield _sylvester(size)


def _sylvester(power: int) -> npt.NDArray[np.int8]:
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < power:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.int8))
    return matrix
