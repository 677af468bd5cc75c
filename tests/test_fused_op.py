"""Transforms that quantize at once: the compiled operators and their function bodies, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_quarot.custom_op import session
from onnx_quarot.errors import ModelError, OrderError
from onnx_quarot.fused_op import add_hadamard_dynamic_quantize_linear, add_hadamard_quantize_linear
from onnx_quarot.transform import hadamard

# Rows of 8960 and of 64 batches are in several pieces of work, odd sizes leave rests of vectors.
CASES: list[tuple[int, dict[str, Any]]] = [
    (64, {}),
    (8960, {}),
    (12, {}),
    (20, {"block_size": 4}),
    (96, {"block_size": 12, "transpose": True}),
    (576, {"scale": 0.06}),
]


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), const_value=ir.tensor(array))
    value.shape = ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def new_model(size: int, opset: int) -> tuple[ir.Model, ir.Value]:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "t", size]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": opset}, name="g")
    return ir.Model(graph, ir_version=10), x


def finish(model: ir.Model, node: ir.Node, path: Path) -> Path:
    model.graph.append(node)
    model.graph.outputs.extend(node.outputs)
    ir.save(model, path)
    return path


def static_model(
    path: Path, size: int, y_scale: float, zero_point: np.generic, opset: int = 21, **options: Any
) -> Path:
    model, x = new_model(size, opset)
    scale = initializer(model, "y_scale", np.array(y_scale, np.float32))
    zero = initializer(model, "y_zero_point", np.asarray(zero_point))
    return finish(model, add_hadamard_quantize_linear(model, x, scale, zero, size=size, name="had", **options), path)


def dynamic_model(path: Path, size: int, opset: int = 21, **options: Any) -> Path:
    model, x = new_model(size, opset)
    return finish(model, add_hadamard_dynamic_quantize_linear(model, x, size=size, name="had", **options), path)


def off_by_rounding_only(got: np.ndarray, exact: np.ndarray, low: int, high: int) -> None:
    """Every value is the nearest integer, or as near where the exact one is half way between two."""
    np.testing.assert_array_less(np.abs(got - np.clip(exact, low, high)), 0.5 + 1e-3)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("zero_point", [np.int8(-3), np.int8(0), np.uint8(131)])
@pytest.mark.parametrize(("size", "options"), CASES)
def test_static(tmp_path: Path, size: int, options: dict[str, Any], zero_point: np.generic, library: bool) -> None:
    rng = np.random.default_rng(size)
    signs = rng.choice(np.array([-1, 1], np.int8), options.get("block_size", size))
    path = static_model(tmp_path / "m.onnx", size, 0.021, zero_point, signs=signs, **options)
    runner = session(path, use_library=library)
    assert runner.get_outputs()[0].type == f"tensor({zero_point.dtype.name})"
    assert runner.get_outputs()[0].shape == ["b", "t", size]
    x = rng.standard_normal((3, 7, size)).astype(np.float32)
    (y,) = runner.run(None, {"x": x})
    assert y.dtype == zero_point.dtype
    exact = hadamard(x.astype(np.float64), signs=signs, **options) / np.float32(0.021) + float(zero_point)
    info = np.iinfo(zero_point.dtype)
    off_by_rounding_only(y.astype(np.float64), exact, info.min, info.max)
    # Some values saturate and most do not: both are tested.
    assert 0 < np.mean((exact < info.min) | (exact > info.max)) < 0.5


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(("size", "options"), CASES)
def test_dynamic(tmp_path: Path, size: int, options: dict[str, Any], library: bool) -> None:
    rng = np.random.default_rng(size)
    signs = rng.choice(np.array([-1, 1], np.int8), size)
    runner = session(dynamic_model(tmp_path / "m.onnx", size, signs=signs, **options), use_library=library)
    assert [output.shape for output in runner.get_outputs()] == [["b", "t", size], ["b", "t", 1]]
    x = (rng.standard_normal((3, 40, size)) * np.exp(rng.standard_normal((3, 40, 1)))).astype(np.float32)
    x[1, 2] = 0
    x[2, 3] *= np.float32(1e-42)  # denormal, and below what has a scale of its own
    y, y_scale = runner.run(None, {"x": x})
    assert (y.dtype, y_scale.dtype) == (np.int8, np.float32)
    exact = hadamard(x.astype(np.float64), signs=signs, **options)
    most = np.abs(exact).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(y_scale, np.where(most < 2.0**-100, 1, most / 127), rtol=3e-6)
    off_by_rounding_only(y.astype(np.float64), exact / y_scale, -127, 127)
    assert not y[1, 2].any()
    assert not y[2, 3].any()
    assert (np.abs(y).max(axis=-1)[0] == 127).all()


def test_threads_change_nothing(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((8, 64, 1536)).astype(np.float32)
    static = static_model(tmp_path / "s.onnx", 1536, 0.02, np.int8(1))
    dynamic = dynamic_model(tmp_path / "d.onnx", 1536)
    for path in (static, dynamic):
        alone, together = (session(path, threads=n).run(None, {"x": x}) for n in (1, 3))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b)


def test_infinity_and_nan_show(tmp_path: Path) -> None:
    x = np.ones((1, 3, 64), np.float32)
    x[0, 0, 5], x[0, 1, 5] = np.inf, np.nan
    _, y_scale = session(dynamic_model(tmp_path / "d.onnx", 64)).run(None, {"x": x})
    assert not np.isfinite(y_scale[0, :2]).any()
    assert y_scale[0, 2, 0] == pytest.approx(8 / 127)
    (y,) = session(static_model(tmp_path / "s.onnx", 64, 1.0, np.int8(0))).run(None, {"x": x})
    assert y[0, 2].tolist() == [8] + [0] * 63


def test_no_rows(tmp_path: Path) -> None:
    x = np.ones((2, 0, 64), np.float32)
    assert session(static_model(tmp_path / "s.onnx", 64, 1.0, np.uint8(0))).run(None, {"x": x})[0].shape == (2, 0, 64)
    shapes = [y.shape for y in session(dynamic_model(tmp_path / "d.onnx", 64)).run(None, {"x": x})]
    assert shapes == [(2, 0, 64), (2, 0, 1)]


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_bodies_in_older_operator_sets(tmp_path: Path, opset: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 96)).astype(np.float32)
    path = dynamic_model(tmp_path / "d.onnx", 96, opset=opset)
    compiled, portable = (session(path, use_library=library).run(None, {"x": x}) for library in (True, False))
    np.testing.assert_allclose(compiled[1], portable[1], rtol=1e-5)
    assert np.abs(compiled[0].astype(int) - portable[0]).max() <= 1


def test_bad_scales_are_errors_of_the_run(tmp_path: Path) -> None:
    for y_scale, message in ((0.0, "y_scale is 0"), (-1.0, "y_scale is -1"), (float("nan"), "y_scale is nan")):
        runner = session(static_model(tmp_path / "m.onnx", 64, y_scale, np.int8(0)))
        with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match=message):
            runner.run(None, {"x": np.ones((1, 1, 64), np.float32)})


def test_refusals() -> None:
    model, x = new_model(96, 21)
    scale = initializer(model, "y_scale", np.array(1, np.float32))
    zero = initializer(model, "y_zero_point", np.array(0, np.int16))
    with pytest.raises(ModelError, match=r"type of y_zero_point .* is INT16: it must be INT8 or UINT8"):
        add_hadamard_quantize_linear(model, x, scale, zero, size=96, name="had")
    with pytest.raises(OrderError, match="block_size is 64"):
        add_hadamard_dynamic_quantize_linear(model, x, size=96, block_size=64, name="had")
    half = ir.Value(name="h", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["b", 96]))
    with pytest.raises(ModelError, match="is FLOAT16: it must be FLOAT"):
        add_hadamard_dynamic_quantize_linear(model, half, size=96, name="had")
    assert not model.functions
