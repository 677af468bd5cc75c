"""Linear layers in one compiled operator, ``onnx_quarot::QLinear``: rotate, quantize per token, multiply, scale.

Weights are stored packed, as the kernel reads them (layout version 1, see :func:`pack`). A model-local function unpacks
them, so that the model runs without the library too: in standard operators to the same integers, if slowly, or for
an operator of ONNX Runtime's own, as fast as that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .errors import ConfigError
from .portable import DOMAIN, OPSET_VERSION, Body, Transform
from .scheme import FUSED_BLOCKS
from .transform import hadamard

Array = npt.NDArray[Any]

OP_TYPE = "QLinear"
LAYOUT_VERSION = 1
PANEL = 16
MOST_OUTPUTS = 3
MAX_DEPTH = 131072
_MICROSOFT = "com.microsoft"
_MIN_IR_VERSION = 10
# Rows whose largest value is below this count as zeros.
_LEAST_PEAK = 1e-30


def pack(weight: Array, block: int | None = None) -> npt.NDArray[np.uint8]:
    """Pack integer weights ``[K, N]`` for the operator; zeros fill what is not full.

    block None: 8 bits, values -127 to 127, packed as ``[panels, steps, 16, 4]``: panels of 16 outputs, steps of 4
    features, each value + 128. block 32, 64 or 128: 4 bits, values -8 to 7, the same with steps of 8 features and two
    values (+ 8) a byte, byte j with feature j in its lower half and feature 4 + j in its upper one.
    """
    bound = (-127, 127) if block is None else (-8, 7)
    if weight.ndim != 2 or 0 in weight.shape or weight.shape[0] > MAX_DEPTH:
        raise ConfigError(f"weight: shape {weight.shape} cannot be packed; use [K, N] with K up to {MAX_DEPTH}")
    if block is not None and block not in FUSED_BLOCKS:
        raise ConfigError(f"block: {block} is not supported; use one of {', '.join(map(str, FUSED_BLOCKS))}")
    if weight.min() < bound[0] or weight.max() > bound[1]:
        raise ConfigError(f"weight: holds values outside {bound[0]} to {bound[1]}")
    depth, columns = weight.shape
    step = 4 if block is None else 8
    filled = np.pad(weight, ((0, -depth % (block or step)), (0, -columns % PANEL)))
    codes = (filled.astype(np.int16) - (-128 if block is None else -8)).astype(np.uint8)
    panels = codes.reshape(-1, step, codes.shape[1] // PANEL, PANEL).transpose(2, 0, 3, 1)
    if block is None:
        return np.ascontiguousarray(panels)
    packed: npt.NDArray[np.uint8] = panels[..., :4] | (panels[..., 4:] << 4)
    return packed


def pack_scales(scales: Array) -> npt.NDArray[np.float32]:
    """Scales ``[blocks, N]`` of 4-bit weights as the operator reads them, ``[panels, blocks, 16]``."""
    filled = np.pad(scales.astype(np.float32), ((0, 0), (0, -scales.shape[1] % PANEL)))
    return np.ascontiguousarray(filled.reshape(len(scales), -1, PANEL).transpose(1, 0, 2))


def pack_zero_points(zeros: Array) -> npt.NDArray[np.uint8]:
    """Zero points ``[blocks, N]`` of 4-bit weights, 0 to 15, as the operator reads them: ``[panels, blocks, 8]``.

    Byte j of a panel's block holds that of output j in its lower half and of output 8 + j in its upper one.
    """
    if zeros.min() < 0 or zeros.max() > 15:
        raise ConfigError("zeros: holds values outside 0 to 15")
    filled = np.pad(zeros.astype(np.uint8), ((0, 0), (0, -zeros.shape[1] % PANEL)))
    panels = filled.reshape(len(zeros), -1, PANEL).transpose(1, 0, 2)
    packed: npt.NDArray[np.uint8] = panels[..., :8] | (panels[..., 8:] << 4)
    return packed


@dataclass(frozen=True)
class QLinearSpec:
    """What tells one QLinear from another, its tensors aside.

    block: None for 8 bits. rotation: of float32 rows. epsilon: rows are divided by sqrt(mean of squares + epsilon)
    first. splits: columns of each output, all but the last multiples of 16, at most :data:`MOST_OUTPUTS`. gated: every
    32 columns are 16 ``a`` and 16 ``b``, and outputs are ``silu(a) * b``, half as many. zero_points: of 4-bit weights;
    without them all are 8, in the codes' own numbers. contrib: the function multiplies by MatMulNBits, which makes
    activations integers per token and block, 8 bits by DynamicQuantizeMatMul, with one range for all tokens; else by
    standard operators, to the operator's own integers.
    """

    depth: int
    columns: int
    block: int | None = None
    dtype: ir.DataType = ir.DataType.FLOAT
    has_bias: bool = False
    rotation: Transform | None = None
    epsilon: float | None = None
    splits: tuple[int, ...] = ()
    gated: bool = False
    zero_points: bool = False
    contrib: bool = False

    def __post_init__(self) -> None:
        if self.block is None and self.zero_points:
            raise ConfigError("zero_points: 8 bits, which block None means, have none")

    @property
    def outputs(self) -> tuple[int, ...]:
        """Columns of each output."""
        return self.splits or (self.columns // 2 if self.gated else self.columns,)

    @property
    def attributes(self) -> dict[str, int | float | list[int]]:
        """The node's attributes."""
        found: dict[str, int | float | list[int]] = {"K": self.depth, "N": self.columns}
        found["layout_version"] = LAYOUT_VERSION
        if self.block is not None:
            found |= {"bits": 4, "block": self.block}
        if self.rotation is not None:
            found |= {"rotate": 1, **self.rotation.attributes(self.depth)}
        if self.epsilon is not None:
            found["epsilon"] = self.epsilon
        if self.splits:
            found["splits"] = list(self.splits)
        if self.gated:
            found["gated"] = 1
        return found

    @property
    def overload(self) -> str:
        """The name of the function body."""
        parts = [f"k{self.depth}_n{self.columns}", "w8" if self.block is None else f"w4b{self.block}"]
        parts += ["zero_points"] if self.zero_points else []
        parts += ["bias"] if self.has_bias else []
        parts += [f"hadamard_{self.rotation.overload()}"] if self.rotation is not None else []
        parts += [f"norm_{self.epsilon:g}"] if self.epsilon is not None else []
        parts += ["split_" + "_".join(map(str, self.splits))] if self.splits else []
        parts += ["gated"] if self.gated else []
        if self.contrib:
            parts.append("dynamicquantizematmul" if self.block is None else "matmulnbits")
        return "_".join(parts) + {ir.DataType.FLOAT16: "_f16", ir.DataType.BFLOAT16: "_bf16"}.get(self.dtype, "")


def add_qlinear(model: ir.Model, spec: QLinearSpec, inputs: Sequence[ir.Value | None], name: str) -> ir.Node:
    """Make a node, and the function it stands for, which is put into the model; the caller places the node.

    inputs: X, packed weights, scales, and each or None: bias, signs, zero points. A bias is [N], or of the shape of the
    only output. Shapes of outputs follow from X's, where that is known: ONNX Runtime learns of those behind the first
    one from the model alone.
    """
    model.ir_version = max(model.ir_version, _MIN_IR_VERSION)
    model.opset_imports[DOMAIN] = OPSET_VERSION
    if spec.contrib:
        model.opset_imports.setdefault(_MICROSOFT, 1)
    identifier = (DOMAIN, OP_TYPE, spec.overload)
    if identifier not in model.functions:
        model.functions[identifier] = _function(spec, model.opset_imports[""])
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    node = ir.node(
        OP_TYPE,
        given,
        spec.attributes,
        domain=DOMAIN,
        overload=spec.overload,
        num_outputs=len(spec.outputs),
        name=name,
    )
    shape = None if inputs[0] is None else inputs[0].shape
    for output, width in zip(node.outputs, spec.outputs, strict=True):
        output.type = ir.TensorType(spec.dtype)
        if shape is not None and shape.rank():
            output.shape = ir.Shape([*shape.dims[:-1], width])
    return node


def entering_rows(node: ir.Node, x: Array) -> Array:
    """What a QLinear node makes integers of: its X ``[..., K]``, normalized and rotated as it says, in float32."""
    rows = x.astype(np.float32)
    epsilon = node.attributes.get_float("epsilon", None)
    if epsilon is not None:
        rows /= np.sqrt(np.square(rows).mean(axis=-1, keepdims=True) + np.float32(epsilon))
    if not node.attributes.get_int("rotate", 0):
        return rows
    signs = node.inputs[4] if len(node.inputs) > 4 else None
    turn = Transform.of(node, rows.shape[-1], signs)
    known = None if signs is None or signs.const_value is None else signs.const_value.numpy()
    return hadamard(rows, block_size=turn.block, signs=known, transpose=turn.transpose, scale=turn.scale)


def _function(spec: QLinearSpec, opset: int) -> ir.Function:
    """What the operator does, in others."""
    body = Body(opset)
    kinds = [ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8]
    names = ["X", "W", "scales", "bias", "signs", "zero_points"]
    inputs = [ir.Value(name=n, type=ir.TensorType(k)) for n, k in zip(names, [spec.dtype, *kinds], strict=True)]
    x, packed, scales, bias, signs, zeros = inputs
    has_signs = spec.rotation is not None and spec.rotation.signs_length > 0
    rows = x if spec.dtype == ir.DataType.FLOAT else body.cast(x, ir.DataType.FLOAT)
    weights = [packed, scales, *([zeros] if spec.zero_points else [])]
    multiply = _multiply_at_once if spec.contrib else _multiply
    product = multiply(body, spec, rows, signs if has_signs else None, weights)
    if spec.has_bias:
        product = body.node("Add", [product, _sides_apart(body, spec, bias, [], [])])
    products = [product]
    if len(spec.outputs) > 1:
        products = body.split(product, spec.outputs)
    elif spec.gated:
        first, second = body.split(product, [spec.columns // 2] * 2)
        silu = body.node("Mul", [first, body.node("Sigmoid", [first])])
        products = [body.node("Mul", [silu, second])]
    is_float = spec.dtype == ir.DataType.FLOAT
    products = [body.node("Identity", [y]) if is_float else body.cast(y, spec.dtype) for y in products]
    for index, y in enumerate(products):
        y.name = f"Y{index}" if index else "Y"
    used = [True, True, True, spec.has_bias, has_signs, spec.zero_points]
    count = len(used) - used[::-1].index(True)
    imports = {"": opset, _MICROSOFT: 1} if spec.contrib else {"": opset}
    graph = ir.Graph(inputs[:count], products, nodes=body.nodes, opset_imports=imports, name=spec.overload)
    # Declared for the nodes that carry them; their values are in the body already.
    declared = [_attribute(name, value) for name, value in spec.attributes.items()]
    return ir.Function(DOMAIN, OP_TYPE, spec.overload, graph=graph, attributes=declared)


def _attribute(name: str, value: float | list[int]) -> ir.Attr:
    if isinstance(value, list):
        return ir.AttrInt64s(name, value)
    return ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)


def _multiply(
    body: Body, spec: QLinearSpec, straight: ir.Value, signs: ir.Value | None, weights: Sequence[ir.Value]
) -> ir.Value:
    """The operator in standard operators: the same integers, multiplied in float32."""
    rows = straight if spec.rotation is None else spec.rotation.apply(body, straight, signs)
    largest = body.reduce("ReduceMax", body.node("Abs", [rows]))
    peak = body.node("Max", [largest, _real(body, _LEAST_PEAK)])
    inverse = body.node("Div", [_real(body, 127.0), peak])
    # Infinity times zero is NaN, as is what a NaN touches: the whole row of one becomes NaN, as in the operator.
    codes = body.node("Round", [body.node("Mul", [rows, inverse])])
    row_scale = body.node("Div", [peak, _real(body, 127.0)])
    if spec.epsilon is not None:
        row_scale = body.node("Div", [row_scale, _length(body, straight, spec.epsilon)])
    weight = _sides_apart(body, spec, _unpacked(body, spec, weights), [spec.depth], [])
    product = body.node("Mul", [body.node("MatMul", [codes, weight]), row_scale])
    if spec.block is None:
        product = body.node("Mul", [product, _sides_apart(body, spec, weights[1], [], [])])
    return product


def _multiply_at_once(
    body: Body, spec: QLinearSpec, rows: ir.Value, signs: ir.Value | None, weights: Sequence[ir.Value]
) -> ir.Value:
    """The layer by an operator of ONNX Runtime's, whose weights are made once, where it folds constants."""
    if spec.epsilon is not None:
        # Multiplied by ones, it is a norm that ONNX Runtime knows, and makes one operator of.
        normal = body.node("Div", [rows, _length(body, rows, spec.epsilon)])
        rows = body.node("Mul", [normal, body.constant(np.ones(spec.depth, np.float32))])
    if spec.rotation is not None:
        rows = spec.rotation.apply(body, rows, signs)
    packed, scales, *zeros = weights
    if spec.block is None:
        matrix = _sides_apart(body, spec, _integers(body, spec, packed), [spec.depth], [])
        scales = _sides_apart(body, spec, scales, [], [])
        # The zero point could be left out, but ONNX Runtime before 1.30 goes by it where sums are to be exact.
        operands = [rows, body.cast(matrix, ir.DataType.INT8), scales, body.constant(np.zeros(1, np.int8))]
        return body.node("DynamicQuantizeMatMul", operands, domain=_MICROSOFT)
    blocks = -(-spec.depth // spec.block)
    codes = _pairs(body, _halves(body, packed), 8)
    operands = [
        _channels_first(body, spec, codes, [blocks, spec.block // 2]),
        _channels_first(body, spec, scales, [blocks]),
    ]
    if zeros:
        points = _halves(body, zeros[0])
        if blocks % 2:
            points = body.node("Pad", [points, body.constant(np.array([0, 0, 0, 0, 1, 0], np.int64))])
        even = blocks + blocks % 2
        points = body.reshape(_channels_first(body, spec, points, [even]), [spec.columns, even // 2, 2])
        operands.append(body.reshape(_pairs(body, points, 2), [spec.columns, even // 2]))
    sizes: dict[str, Any] = {"K": spec.depth, "N": spec.columns, "bits": 4, "block_size": spec.block}
    return body.node("MatMulNBits", [rows, *operands], domain=_MICROSOFT, **sizes, accuracy_level=4)


def _real(body: Body, value: float) -> ir.Value:
    return body.constant(np.array(value, np.float32))


def _length(body: Body, x: ir.Value, epsilon: float) -> ir.Value:
    """The root of the mean square of each row, with an epsilon under it."""
    mean = body.reduce("ReduceMean", body.node("Pow", [x, _real(body, 2.0)]))
    return body.node("Sqrt", [body.node("Add", [mean, _real(body, epsilon)])])


def _sides_apart(body: Body, spec: QLinearSpec, x: ir.Value, before: list[int], after: list[int]) -> ir.Value:
    """[*before, N, *after] in the order of the product: of a gated one, all of ``a`` before all of ``b``."""
    if not spec.gated:
        return x
    axis = len(before)
    pairs = body.reshape(x, [*before, spec.columns // (2 * PANEL), 2, PANEL, *after])
    order = [*range(axis), axis + 1, axis, *range(axis + 2, axis + 3 + len(after))]
    return body.reshape(body.node("Transpose", [pairs], perm=order), [*before, spec.columns, *after])


def _channels_first(body: Body, spec: QLinearSpec, panels: ir.Value, shape: list[int]) -> ir.Value:
    """[N, *shape] of panels, [panels, steps or blocks, 16] or with bytes of a step behind."""
    order = [0, 2, 1, 3] if len(shape) > 1 else [0, 2, 1]
    rows = body.reshape(body.node("Transpose", [panels], perm=order), [-1, *shape])
    if spec.columns % PANEL:
        ends = [body.constant(np.array([place], np.int64)) for place in (0, spec.columns, 0)]
        rows = body.node("Slice", [rows, *ends])
    return _sides_apart(body, spec, rows, [], shape)


def _halves(body: Body, x: ir.Value) -> ir.Value:
    """uint8 [..., n] as [..., 2 n]: the lower halves, then the upper ones."""
    four, sixteen = (body.constant(np.array(value, np.uint8)) for value in (4, 16))
    high = body.node("BitShift", [x, four], direction="RIGHT")
    return body.node("Concat", [body.node("Mod", [x, sixteen]), high], axis=-1)


def _pairs(body: Body, x: ir.Value, size: int) -> ir.Value:
    """Halves [..., size] as bytes [..., size / 2], the even ones lower: a product, as bits are or-ed since opset 18."""
    matrix = np.kron(np.eye(size // 2, dtype=np.uint8), np.array([[1], [16]], np.uint8))
    one, zero = _real(body, 1.0), body.constant(np.array(0, np.uint8))
    return body.node("QLinearMatMul", [x, one, zero, body.constant(matrix), one, zero, one, zero])


def _unpacked(body: Body, spec: QLinearSpec, weights: Sequence[ir.Value]) -> ir.Value:
    """[K, N] float32: the integers, for 4 bits times their scales."""
    packed, scales, *zeros = weights
    if spec.block is None:
        return _integers(body, spec, packed)
    panels, blocks = -(-spec.columns // PANEL), -(-spec.depth // spec.block)
    codes = body.cast(_halves(body, packed), ir.DataType.FLOAT)
    points = _real(body, 8.0)
    if zeros:
        halves = body.cast(_halves(body, zeros[0]), ir.DataType.FLOAT)
        points = body.reshape(halves, [panels, blocks, 1, PANEL, 1])
    grouped = body.reshape(codes, [panels, blocks, spec.block // 8, PANEL, 8])
    factors = body.reshape(scales, [panels, blocks, 1, PANEL, 1])
    scaled = body.node("Mul", [body.node("Sub", [grouped, points]), factors])
    return _matrix(body, spec, body.reshape(scaled, [panels, blocks * spec.block // 8, PANEL, 8]), 8)


def _integers(body: Body, spec: QLinearSpec, packed: ir.Value) -> ir.Value:
    """[K, N] float32: the integers of 8 bits."""
    return _matrix(body, spec, body.node("Sub", [body.cast(packed, ir.DataType.FLOAT), _real(body, 128.0)]), 4)


def _matrix(body: Body, spec: QLinearSpec, values: ir.Value, step: int) -> ir.Value:
    """[K, N] of panels with steps of so many features."""
    order = body.node("Transpose", [values], perm=[1, 3, 0, 2])
    matrix = body.reshape(order, [-1, -(-spec.columns // PANEL) * PANEL])
    if spec.columns % PANEL == 0 and spec.depth % (spec.block or step) == 0:
        return matrix
    ends = body.constant(np.array([spec.depth, spec.columns], np.int64))
    return body.node(
        "Slice", [matrix, body.constant(np.array([0, 0], np.int64)), ends, body.constant(np.array([0, 1], np.int64))]
    )
