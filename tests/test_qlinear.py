"""QLinear: packing, the compiled operator bit for bit, its portable function, and models rewritten to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot import _core
from onnx_quarot.custom_op import DOMAIN, _Transform, add_hadamard, register
from onnx_quarot.errors import ConfigError
from onnx_quarot.qlinear import QLinearSpec, add_qlinear, pack, pack_scales

Array = np.ndarray[Any, Any]


def make_weight(depth: int, columns: int, block: int | None, seed: int = 0) -> tuple[Array, Array]:
    """Integers [K, N], and scales [N] or [blocks, N]."""
    random = np.random.default_rng(seed)
    low, high = (-127, 128) if block is None else (-8, 8)
    blocks = () if block is None else (-(-depth // block),)
    scales = (random.random((*blocks, columns)) * 0.01 + 0.001).astype(np.float32)
    return random.integers(low, high, (depth, columns)).astype(np.int8), scales


def make_model(
    depth: int,
    columns: int,
    block: int | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
    bias: bool = False,
    rotated: bool = False,
    signs: Array | None = None,
) -> tuple[onnx.ModelProto, Array, Array]:
    weight, scales = make_weight(depth, columns, block)
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["m", depth]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)

    def constant(name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.register_initializer(value)
        return value

    spec = QLinearSpec(depth, columns, block, dtype, bias)
    sign_value = None
    if rotated:
        node = add_hadamard(model, x, size=depth, signs=signs, name="h")
        sign_value = node.inputs[1] if signs is not None else None
        transform = _Transform.make(depth, None, signs, False, None, ir.DataType.FLOAT)
        spec = QLinearSpec(depth, columns, block, dtype, bias, transform)
    operands = [
        x,
        constant("w", pack(weight, block)),
        constant("s", scales if block is None else pack_scales(scales)),
        constant("b", np.linspace(-1, 1, columns, dtype=np.float32)) if bias else None,
        sign_value,
    ]
    linear = add_qlinear(model, spec, operands, "linear")
    linear.outputs[0].name = "y"
    linear.outputs[0].shape = ir.Shape(["m", columns])
    graph.append(linear)
    graph.outputs.append(linear.outputs[0])
    return ir.to_proto(model), weight, scales


def run(model: onnx.ModelProto, x: Array, library: bool = True, threads: int = 1, name: str = "x") -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {name: x})[0]
    return result


def reference(x: Array, weight: Array, scales: Array, block: int | None, bias: Array | None = None) -> Array:
    """As the operator documents it, in int32 and single steps of float32."""
    peak = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30))
    codes = np.rint(x * (np.float32(127) / peak)).astype(np.int32)
    row_scale = peak / np.float32(127)
    if block is None:
        y = (codes @ weight.astype(np.int32)).astype(np.float32) * row_scale * scales
    else:
        y = np.zeros((len(x), weight.shape[1]), np.float32)
        for index, start in enumerate(range(0, len(weight), block)):
            part = codes[:, start : start + block] @ weight[start : start + block].astype(np.int32)
            y += part.astype(np.float32) * scales[index]
        y = y * row_scale
    return y if bias is None else y + bias


def activations(rows: int, depth: int) -> Array:
    return np.random.default_rng(7).standard_normal((rows, depth)).astype(np.float32)


@pytest.mark.parametrize("block", [None, 32, 64, 128])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 1, 1), (1, 2048, 320), (3, 99, 17), (40, 130, 48), (300, 257, 33)]
)
def test_operator_is_exact(block: int | None, rows: int, depth: int, columns: int) -> None:
    model, weight, scales = make_model(depth, columns, block, bias=True)
    x = activations(rows, depth)
    wanted = reference(x, weight, scales, block, np.linspace(-1, 1, columns, dtype=np.float32))
    for threads in (1, 2):
        np.testing.assert_array_equal(run(model, x, threads=threads), wanted)


@pytest.mark.parametrize("isa", _core.isas())
def test_every_isa_is_exact(isa: str, tmp_path: Path) -> None:
    model, weight, scales = make_model(512, 96)
    onnx.save(model, tmp_path / "m.onnx")
    x = activations(9, 512)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import numpy as np, sys, onnx_quarot as oq\n"
        "f = sys.argv[1]\n"
        "np.save(f + '/y.npy', oq.session(f + '/m.onnx').run(None, {'x': np.load(f + '/x.npy')})[0])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"ONNX_QUAROT_ISA": isa, "PATH": ""})
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), reference(x, weight, scales, None))


def test_deep_layers_do_not_overflow() -> None:
    depth = 32768
    model, weight, scales = make_model(depth, 16)
    x = np.where(weight[:, 0] < 0, -1, 1).astype(np.float32)[None]
    np.testing.assert_array_equal(run(model, x), reference(x, weight, scales, None))


@pytest.mark.parametrize("block", [None, 64])
def test_bad_rows_leave_their_neighbours_alone(block: int | None) -> None:
    model, weight, scales = make_model(100, 20, block)
    x = activations(6, 100)
    clean = x.copy()
    x[1], x[2, 3], x[4, 50] = 0, np.nan, np.inf
    for library in (True, False):
        y = run(model, x, library)
        assert not y[1].any()
        assert np.isnan(y[[2, 4]]).all()
        kept = [0, 3, 5]
        np.testing.assert_allclose(y[kept], reference(clean, weight, scales, block)[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [None, 32, 128])
@pytest.mark.parametrize(("depth", "columns"), [(130, 33), (96, 64)])
@pytest.mark.parametrize("rotated", [False, True])
def test_function_body_is_the_same_layer(block: int | None, depth: int, columns: int, rotated: bool) -> None:
    if rotated and depth == 130:
        depth = 144
    signs = np.where(np.arange(depth) % 3 == 0, -1, 1).astype(np.int8) if rotated else None
    model, weight, scales = make_model(depth, columns, block, bias=True, rotated=rotated, signs=signs)
    onnx.checker.check_model(model)
    x = activations(5, depth)
    rows = oq.hadamard(x, signs=signs) if rotated else x
    bias = np.linspace(-1, 1, columns, dtype=np.float32)
    y = run(model, x)
    np.testing.assert_array_equal(y, reference(rows, weight, scales, block, bias))
    # One quantization step of one activation: a value halfway between two may be rounded to the other.
    largest = scales.max() * np.abs(weight).max() if block is None else (scales.max() * 8)
    step = np.abs(rows).max() / 127 * largest
    np.testing.assert_allclose(run(model, x, library=False), y, atol=1.01 * step)


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)]
)
@pytest.mark.parametrize("rotated", [False, True])
def test_short_floats(dtype: int, numpy_dtype: Any, rotated: bool) -> None:
    model, weight, scales = make_model(64, 40, dtype=ir.DataType(dtype), rotated=rotated)
    # numpy has no bfloat16, so values come and go as float32.
    model.graph.node.insert(0, helper.make_node("Cast", ["wide_x"], ["x"], to=dtype))
    model.graph.node.append(helper.make_node("Cast", ["y"], ["wide_y"], to=TensorProto.FLOAT))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("wide_x", TensorProto.FLOAT, ["m", 64]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("wide_y", TensorProto.FLOAT, ["m", 40]))
    x = (activations(7, 64) * np.float32(10) ** np.arange(-6, 1, dtype=np.float32)[:, None]).astype(numpy_dtype)
    rows = x.astype(np.float32)
    wanted = reference(oq.hadamard(rows) if rotated else rows, weight, scales, None).astype(numpy_dtype)
    found = run(model, rows, name="wide_x")
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_leading_axes_and_no_rows() -> None:
    weight, scales = make_weight(32, 20, None)
    node = helper.make_node("QLinear", ["x", "w", "s"], ["y"], domain=DOMAIN, K=32, N=20, layout_version=1)
    graph = helper.make_graph(
        [node],
        "raw",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", 20])],
        [numpy_helper.from_array(pack(weight), "w"), numpy_helper.from_array(scales, "s")],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    x = activations(6, 32)
    y = run(model, x.reshape(2, 3, 32))
    np.testing.assert_array_equal(y.reshape(6, 20), reference(x, weight, scales, None))
    assert run(model, np.zeros((2, 0, 32), np.float32)).shape == (2, 0, 20)
    for attribute, value, message in [
        ("layout_version", 2, "layout_version is 2: this library reads 1"),
        ("bits", 5, "bits is 5: it must be 8 or 4"),
        ("N", 33, r"W has shape \[2, 8, 16, 4\]: it must be \[3, 8, 16, 4\]"),
    ]:
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        found = {a.name: a for a in broken.graph.node[0].attribute}
        if attribute in found:
            found[attribute].i = value
        else:
            broken.graph.node[0].attribute.append(helper.make_attribute(attribute, value))
        with pytest.raises(Exception, match=message):
            run(broken, x.reshape(2, 3, 32))


@pytest.mark.parametrize(("dtype", "block"), [(TensorProto.FLOAT, None), (TensorProto.FLOAT16, 32)])
def test_session_knows_the_shape(dtype: int, block: int | None) -> None:
    """An output that the model states nothing about: the operator says its type and shape."""
    model, _, _ = make_model(64, 20, block, dtype=ir.DataType(dtype))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", dtype, ["a", "b", 64]))
    model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    options = ort.SessionOptions()
    register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output = session.get_outputs()[0]
    assert output.shape == ["a", "b", 20]
    assert output.type == ("tensor(float)" if dtype == TensorProto.FLOAT else "tensor(float16)")


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="outside -127 to 127"):
        pack(np.full((4, 4), -128, np.int8))
    with pytest.raises(ConfigError, match="block: 16"):
        pack(np.zeros((4, 4), np.int8), 16)
    with pytest.raises(ConfigError, match=r"shape \(4,\)"):
        pack(np.zeros(4, np.int8))
