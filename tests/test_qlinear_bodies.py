"""QLinear without the library: what its functions compute, with zero points, and by operators of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnx_quarot as oq
from onnx_quarot import _core
from onnx_quarot.custom_op import add_hadamard
from onnx_quarot.errors import ConfigError
from onnx_quarot.portable import Transform
from onnx_quarot.qlinear import QLinearSpec, add_qlinear, pack, pack_scales, pack_zero_points

Array = np.ndarray[Any, Any]
EPSILON = 1e-3


@dataclass(frozen=True)
class Case:
    depth: int
    columns: int
    block: int | None
    zeros: bool = True
    bias: bool = False
    rotated: bool = False
    signs: bool = False
    epsilon: float | None = None
    gated: bool = False
    splits: tuple[int, ...] = ()
    dtype: ir.DataType = ir.DataType.FLOAT

    def weights(self) -> tuple[Array, Array, Array]:
        """Codes [K, N] from 0 to 15, scales and zero points [blocks, N]; of 8 bits, codes from 1 to 255, one block."""
        random = np.random.default_rng(1)
        if self.block is None:
            scales = (random.random((1, self.columns)) * 0.001 + 0.0001).astype(np.float32)
            return random.integers(1, 256, (self.depth, self.columns)), scales, np.full(scales.shape, 128)
        grid = (-(-self.depth // self.block), self.columns)
        scales = (random.random(grid) * 0.01 + 0.001).astype(np.float32)
        zeros = random.integers(0, 16, grid) if self.zeros else np.full(grid, 8)
        return random.integers(0, 16, (self.depth, self.columns)), scales, zeros

    def matrix(self) -> Array:
        codes, *grids = self.weights()
        scales, zeros = (np.repeat(grid, self.block or self.depth, axis=0)[: self.depth] for grid in grids)
        return ((codes - zeros) * scales).astype(np.float64)

    def signs_array(self) -> Array | None:
        return np.where(np.arange(self.depth) % 3 == 0, -1, 1).astype(np.int8) if self.signs else None

    def bias_array(self) -> Array:
        return np.linspace(-1, 1, self.columns, dtype=np.float32)

    def model(self, *, opset: int = 21, contrib: bool = False) -> onnx.ModelProto:
        x = ir.Value(name="x", type=ir.TensorType(self.dtype), shape=ir.Shape(["m", self.depth]))
        graph = ir.Graph([x], [], nodes=[], opset_imports={"": opset}, name="g")
        model = ir.Model(graph, ir_version=10)

        def constant(name: str, array: Array) -> ir.Value:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph.register_initializer(value)
            return value

        spec = QLinearSpec(self.depth, self.columns, self.block, self.dtype, self.bias, epsilon=self.epsilon)
        spec = replace(spec, splits=self.splits, gated=self.gated, zero_points=self.zeros, contrib=contrib)
        signs = None
        if self.rotated:
            rotation = add_hadamard(model, x, size=self.depth, signs=self.signs_array(), name="h")
            signs = rotation.inputs[1] if self.signs else None
            transform = Transform.make(self.depth, None, self.signs_array(), False, None, ir.DataType.FLOAT)
            spec = replace(spec, rotation=transform)
        codes, scales, zeros = self.weights()
        inputs = [
            x,
            constant("w", pack(codes - (128 if self.block is None else 8), self.block)),
            constant("s", scales[0] if self.block is None else pack_scales(scales)),
            constant("b", self.bias_array()) if self.bias else None,
            signs,
            constant("z", pack_zero_points(zeros)) if self.zeros else None,
        ]
        linear = add_qlinear(model, spec, inputs, "linear")
        for index, output in enumerate(linear.outputs):
            output.name = f"y{index}"
            graph.outputs.append(output)
        graph.append(linear)
        return ir.to_proto(model)

    def reference(self, x: Array) -> Array:
        """In float64, with activations that are not quantized."""
        rows = x.astype(np.float64)
        if self.epsilon is not None:
            rows = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + self.epsilon)
        if self.rotated:
            rows = oq.hadamard(rows, signs=self.signs_array())
        y = rows @ self.matrix() + (self.bias_array() if self.bias else 0)
        if self.gated:
            sides = y.reshape(len(y), -1, 2, 16)
            a, b = (sides[:, :, side].reshape(len(y), -1) for side in (0, 1))
            y = a / (1 + np.exp(-a)) * b
        return np.asarray(y)


CASES = {
    "whole": Case(128, 32, 32),
    "nothing is whole": Case(99, 17, 64),
    "an odd number of blocks": Case(96, 48, 32, bias=True),
    "no zero points": Case(130, 33, 128, zeros=False),
    "several outputs": Case(144, 97, 64, splits=(48, 16, 33), bias=True),
    "rotated": Case(128, 48, 64, rotated=True, signs=True),
    "all at once": Case(128, 96, 128, rotated=True, signs=True, bias=True, epsilon=EPSILON, gated=True),
    "gated": Case(100, 64, 32, gated=True, epsilon=EPSILON),
    "8 bits": Case(99, 35, None, zeros=False, bias=True, rotated=False, epsilon=EPSILON),
    "8 bits, gated": Case(128, 64, None, zeros=False, rotated=True, signs=True, gated=True),
    "half precision": Case(130, 33, 64, dtype=ir.DataType.FLOAT16),
}


def activations(case: Case, rows: int = 40) -> Array:
    return np.random.default_rng(7).standard_normal((rows, case.depth)).astype(case.dtype.numpy())


def run(model: onnx.ModelProto, x: Array, options: ort.SessionOptions | None = None) -> Array:
    options = options or ort.SessionOptions()
    dynamic = any(node.op_type == "DynamicQuantizeMatMul" for function in model.functions for node in function.node)
    if dynamic and not _core.has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate(session.run(None, {"x": x}), axis=1)


def error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("opset", [13, 17, 23])
@pytest.mark.parametrize("contrib", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_functions_are_the_layer(case: Case, contrib: bool, opset: int) -> None:
    model = case.model(opset=opset, contrib=contrib)
    onnx.checker.check_model(model)
    (function,) = (f for f in model.functions if f.name == "QLinear")
    product = "DynamicQuantizeMatMul" if case.block is None else "MatMulNBits"
    assert sum(node.op_type == product for node in function.node) == int(contrib)
    assert (f"_{product.lower()}" in function.overload) == contrib
    x = activations(case)
    for rows in (x, x[:1]):
        assert error(run(model, rows), case.reference(rows)) < 0.03


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_that_are_unpacked_are_exact(case: Case) -> None:
    """Activations of one feature alone are 127 (or 255) or 0 in the operator: what is left is the weights."""
    plain = replace(case, rotated=False, signs=False, epsilon=None, gated=False, splits=(), dtype=ir.DataType.FLOAT)
    x = np.eye(case.depth, dtype=np.float32)
    np.testing.assert_allclose(run(plain.model(contrib=True), x), plain.reference(x), rtol=1e-5, atol=1e-6)


def test_matmulnbits_is_all_that_is_left_of_the_weights(tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    case = replace(CASES["all at once"], rotated=False, signs=False)
    x = activations(case)
    assert error(run(case.model(contrib=True), x, options), case.reference(x)) < 0.03
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    (product,) = (node for node in graph.node if node.op_type == "MatMulNBits")
    assert set(product.input[1:]) - {""} <= {tensor.name for tensor in graph.initializer}
    kept = {node.op_type for node in graph.node}
    assert not kept & {"BitShift", "QLinearMatMul", "Transpose", "Slice", "Pad"}


def test_packed_zero_points() -> None:
    zeros = np.arange(20) % 16
    packed = pack_zero_points(np.stack([zeros, 15 - zeros]))
    assert packed.shape == (2, 2, 8)
    np.testing.assert_array_equal(packed[0, 0], [low + 16 * (low + 8) for low in range(8)])
    np.testing.assert_array_equal(packed[1, 1], [15, 14, 13, 12, 0, 0, 0, 0])
    with pytest.raises(ConfigError, match="zeros: holds values outside 0 to 15"):
        pack_zero_points(np.array([[16]]))


def test_eight_bits_have_no_zero_points() -> None:
    with pytest.raises(ConfigError, match="zero_points: 8 bits, which block None means, have none"):
        QLinearSpec(32, 16, zero_points=True)
