"""Products with matrices of 16 bits, widened piece by piece."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnx_quarot import segments
from onnx_quarot.load import load
from onnx_quarot.wide_products import large_matrix, wide_product

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 1111), (3, 1 << 20), (1 << 20, 3)])
def test_against_float64(dtype: type, shape: tuple[int, int]) -> None:
    matrix = RNG.standard_normal(shape).astype(dtype)
    x = RNG.standard_normal((2, 3, shape[0])).astype(np.float32)
    result = wide_product(x, ir.tensor(matrix))
    assert result.dtype == x.dtype
    expected = x.astype(np.float64) @ matrix.astype(np.float64)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_not_a_number_stays_one() -> None:
    matrix = RNG.standard_normal((1024, 1024)).astype(np.float16)
    matrix[3, 4], matrix[5, 6] = np.nan, np.inf
    result = wide_product(np.ones((1, 1024), np.float16), ir.tensor(matrix))
    assert np.isnan(result[0, 4])
    assert np.isposinf(result[0, 6])
    assert np.isfinite(result).sum() == 1022


def save(path: Path, operator: str, dtype: int, rows: int) -> Path:
    shape = [rows, 1024]
    matrix = RNG.standard_normal(shape).astype(np.float16 if dtype == TensorProto.FLOAT16 else np.float32)
    extra = {"transB": 0} if operator == "Gemm" else {}
    nodes = [helper.make_node(operator, ["x", "w"], ["h"], **extra), helper.make_node("Relu", ["h"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", dtype, [2, rows])]
    outputs = [helper.make_tensor_value_info("y", dtype, [2, 1024])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(matrix, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("operator", "dtype", "rows", "taken"),
    [
        ("MatMul", TensorProto.FLOAT16, 1024, True),
        ("MatMul", TensorProto.FLOAT, 1024, False),
        ("MatMul", TensorProto.FLOAT16, 512, False),
        ("Gemm", TensorProto.FLOAT16, 1024, False),
    ],
)
def test_which_are_taken(tmp_path: Path, operator: str, dtype: int, rows: int, taken: bool) -> None:
    path = save(tmp_path / "m.onnx", operator, dtype, rows)
    model = load(path)
    assert (large_matrix(model.graph[0]) is not None) == taken
    x = RNG.standard_normal((2, rows)).astype(helper.tensor_dtype_to_np_dtype(dtype))
    matrix = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    (y,) = segments.run_in_segments(path, {"x": x}, ["y"])
    assert y.dtype == np.float32  # as half precision is computed
    expected = np.maximum(x.astype(np.float64) @ matrix.astype(np.float64), 0)
    np.testing.assert_allclose(y, expected, atol=2e-3 * expected.max())
