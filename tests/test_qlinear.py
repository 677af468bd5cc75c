"""QLinear: packing, the compiled operator bit for bit, its portable function, and models rewritten to it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
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
from onnx_quarot.custom_op import DOMAIN, add_hadamard, register
from onnx_quarot.errors import ConfigError
from onnx_quarot.portable import Transform
from onnx_quarot.qlinear import QLinearSpec, add_qlinear, pack, pack_scales, pack_zero_points

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
    residual: bool = False,
    **more: Any,
) -> tuple[onnx.ModelProto, Array, Array]:
    """residual: a second input of the graph instead of the bias. more: of the QLinearSpec."""
    weight, scales = make_weight(depth, columns, block)
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["m", depth]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)

    def constant(name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.register_initializer(value)
        return value

    spec = QLinearSpec(depth, columns, block, dtype, bias or residual, **more)
    sign_value = None
    if rotated:
        node = add_hadamard(model, x, size=depth, signs=signs, name="h")
        sign_value = node.inputs[1] if signs is not None else None
        transform = Transform.make(depth, None, signs, False, None, ir.DataType.FLOAT)
        spec = replace(spec, rotation=transform)
    bias_value = constant("b", np.linspace(-1, 1, columns, dtype=np.float32)) if bias else None
    if residual:
        bias_value = ir.Value(name="r", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["m", columns]))
        graph.inputs.append(bias_value)
    operands = [
        x,
        constant("w", pack(weight, block)),
        constant("s", scales if block is None else pack_scales(scales)),
        bias_value,
        sign_value,
    ]
    linear = add_qlinear(model, spec, operands, "linear")
    for index, (output, width) in enumerate(zip(linear.outputs, spec.outputs, strict=True)):
        output.name = f"y{index}" if index else "y"
        assert output.shape == ir.Shape(["m", width])
        graph.outputs.append(output)
    graph.append(linear)
    return ir.to_proto(model), weight, scales


def run(model: onnx.ModelProto, x: Array, library: bool = True, threads: int = 1, name: str = "x") -> Array:
    return run_all(model, {name: x}, library, threads)[0]


def run_all(model: onnx.ModelProto, feeds: dict[str, Array], library: bool = True, threads: int = 1) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, feeds)
    return results


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


def make_raw(depth: int, columns: int, inputs: dict[str, Array | None], **attributes: Any) -> onnx.ModelProto:
    """A node without a function body. inputs: initializers behind X, in order; None is an input left out."""
    attributes = {"K": depth, "N": columns, "layout_version": 1} | attributes
    names = ["x", *("" if value is None else name for name, value in inputs.items())]
    node = helper.make_node("QLinear", names, ["y"], domain=DOMAIN, name="raw", **attributes)
    graph = helper.make_graph(
        [node],
        "raw",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", None])],
        [numpy_helper.from_array(value, name) for name, value in inputs.items() if value is not None],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


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


@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_several_outputs(block: int | None, rows: int, bias: bool) -> None:
    splits = (48, 16, 33)
    model, weight, scales = make_model(130, 97, block, bias=bias, splits=splits)
    onnx.checker.check_model(model)
    x = activations(rows, 130)
    wanted = reference(x, weight, scales, block, np.linspace(-1, 1, 97, dtype=np.float32) if bias else None)
    for threads in (1, 2):
        found = run_all(model, {"x": x}, threads=threads)
        assert [y.shape[1] for y in found] == list(splits)
        np.testing.assert_array_equal(np.concatenate(found, axis=1), wanted)
    portable = run_all(model, {"x": x}, library=False)
    np.testing.assert_allclose(np.concatenate(portable, axis=1), wanted, rtol=1e-4, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_gate(block: int | None, rows: int, dtype: ir.DataType) -> None:
    model, weight, scales = make_model(100, 160, block, dtype, bias=True, gated=True)
    x = activations(rows, 100).astype(dtype.numpy())
    bias = np.linspace(-1, 1, 160, dtype=np.float32)
    sides = reference(x.astype(np.float32), weight, scales, block, bias).reshape(rows, 5, 2, 16).astype(np.float64)
    a, b = (sides[:, :, side].reshape(rows, 80) for side in (0, 1))
    wanted = a / (1 + np.exp(-a)) * b
    tolerance = 1e-6 if dtype == ir.DataType.FLOAT else 1e-3
    for threads in (1, 2):
        np.testing.assert_allclose(run(model, x, threads=threads), wanted, rtol=tolerance, atol=tolerance)
    step = 0.02 * np.abs(wanted).max()
    np.testing.assert_allclose(run(model, x, library=False).astype(np.float64), wanted, rtol=1e-2, atol=step)


@pytest.mark.parametrize("rotated", [False, True])
def test_norm_and_residual(rotated: bool) -> None:
    epsilon = 1e-3
    model, weight, scales = make_model(128, 50, rotated=rotated, residual=True, epsilon=epsilon)
    x = activations(20, 128) * np.float32(10) ** np.arange(-10, 10, dtype=np.float32)[:, None]
    residual = np.random.default_rng(3).standard_normal((20, 50)).astype(np.float32)
    rows = oq.hadamard(x) if rotated else x
    factor = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(axis=1, keepdims=True) + epsilon)
    wanted = reference(rows, weight, scales, None) * factor + residual
    for threads in (1, 2):
        found = run_all(model, {"x": x, "r": residual}, threads=threads)[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    portable = run_all(model, {"x": x, "r": residual}, library=False)[0]
    np.testing.assert_allclose(portable, wanted, rtol=1e-4, atol=0.02 * np.abs(wanted).max())
    with pytest.raises(Exception, match=r"bias has shape \[19, 50\]: it must be \[50\] or \[20, 50\]"):
        run_all(model, {"x": x, "r": residual[1:]})


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
    model = make_raw(32, 20, {"w": pack(weight), "s": scales})
    x = activations(6, 32)
    y = run(model, x.reshape(2, 3, 32))
    np.testing.assert_array_equal(y.reshape(6, 20), reference(x, weight, scales, None))
    assert run(model, np.zeros((2, 0, 32), np.float32)).shape == (2, 0, 20)
    for attribute, value, message in [
        ("layout_version", 2, "layout_version is 2: this library reads 1"),
        ("bits", 5, "bits is 5: it must be 8 or 4"),
        ("gated", 1, "N is 20: with gated=1 it must be a multiple of 32"),
        ("splits", [8, 12], r"splits is \[8, 12\]: it must be up to 3 numbers that add up to N, which is 20"),
        ("splits", [16, 5], r"splits is \[16, 5\]: it must be up to 3 numbers that add up to N, which is 20"),
        ("epsilon", -1.0, "epsilon is -1"),
        ("N", 33, r"W has shape \[2, 8, 16, 4\]: it must be \[3, 8, 16, 4\]"),
        ("bits", "4", "attribute bits has another type: it must be an int"),
        ("gated", 1.0, "attribute gated has another type: it must be an int"),
        ("splits", 20, "attribute splits has another type: it must be ints"),
        ("splits", [16.0, 4.0], "attribute splits has another type: it must be ints"),
        ("epsilon", 1, "attribute epsilon has another type: it must be a float"),
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


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1, 1), (1, 2048, 320), (3, 99, 17), (40, 130, 48)])
def test_zero_points_are_exact(block: int, rows: int, depth: int, columns: int) -> None:
    codes, scales = make_weight(depth, columns, block)
    zeros = np.random.default_rng(5).integers(0, 16, scales.shape)
    bias = np.linspace(-1, 1, columns, dtype=np.float32)
    given = {"w": pack(codes, block), "s": pack_scales(scales)}
    all_inputs = given | {"b": bias, "r": None, "z": pack_zero_points(zeros)}
    model = make_raw(depth, columns, all_inputs, bits=4, block=block)
    x = activations(rows, depth)
    weight = codes.astype(np.int32) + 8 - zeros.repeat(block, axis=0)[:depth]
    for threads in (1, 2):
        y = run(model, x[:, None], threads=threads)
        np.testing.assert_array_equal(y[:, 0], reference(x, weight, scales, block, bias))
    # Without a bias, and all of them 8: as if there were none.
    without = make_raw(depth, columns, given, bits=4, block=block)
    eights = {"b": None, "r": None, "z": pack_zero_points(np.full_like(zeros, 8))}
    model = make_raw(depth, columns, given | eights, bits=4, block=block)
    np.testing.assert_array_equal(run(model, x[:, None]), run(without, x[:, None]))


@pytest.mark.parametrize("rows", [1, 40])
def test_inputs_need_not_be_constants(rows: int) -> None:
    """What is constant is looked at when a session is made, all else in every run."""
    codes, scales = make_weight(96, 20, 32)
    zeros = np.random.default_rng(5).integers(0, 16, scales.shape)
    signs = np.where(np.arange(96) % 3 == 0, -1, 1).astype(np.int8)
    given = {"w": pack(codes, 32), "s": pack_scales(scales), "b": np.ones(20, np.float32), "r": signs}
    given |= {"z": pack_zero_points(zeros)}
    x = activations(rows, 96)
    model = make_raw(96, 20, given, bits=4, block=32, rotate=1)
    constant = run(model, x[:, None])
    weight = codes.astype(np.int32) + 8 - zeros.repeat(32, axis=0)
    wanted = reference(oq.hadamard(x, signs=signs), weight, scales, 32, given["b"])
    np.testing.assert_array_equal(constant[:, 0], wanted)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, None))
    del model.graph.initializer[:]
    np.testing.assert_array_equal(run_all(model, {"x": x[:, None], **given})[0], constant)
    for name, shape in [("w", r"\[2, 12, 16\]"), ("s", r"\[2, 3\]"), ("z", r"\[2, 3\]")]:
        with pytest.raises(Exception, match=f"has shape {shape}: it must be"):
            run_all(model, {"x": x[:, None], **given, name: given[name][..., 0]})
    with pytest.raises(Exception, match=r"signs has shape \[95\]"):
        run_all(model, {"x": x[:, None], **given, "r": signs[1:]})


def test_zero_points_that_do_not_fit_are_refused() -> None:
    codes, scales = make_weight(96, 20, 32)
    x, bias, signs = activations(2, 96)[:, None], np.zeros(20, np.float32), np.ones(96, np.int8)
    given = {"w": pack(codes, 32), "s": pack_scales(scales), "b": bias, "r": signs}
    for shape in [(2, 3), (3, 2, 8), (2, 3, 16)]:
        model = make_raw(96, 20, given | {"z": np.zeros(shape, np.uint8)}, bits=4, block=32)
        with pytest.raises(Exception, match=rf"zero_points has shape \[{shape[0]}, .*: it must be \[2, 3, 8\]"):
            run(model, x)
    weight, scales = make_weight(96, 20, None)
    given = {"w": pack(weight), "s": scales, "b": bias, "r": signs, "z": np.zeros((2, 1, 8), np.uint8)}
    message = "QLinear node 'raw': zero_points are given with bits 8: only weights of 4 bits have them"
    with pytest.raises(Exception, match=message):
        run(make_raw(96, 20, given), x)
    model = make_raw(96, 20, given | {"z": np.zeros((2, 1, 8), np.int8)})
    with pytest.raises(Exception, match=r"int8"):
        run(model, x)


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


@pytest.mark.parametrize(("more", "width"), [({"gated": True}, 32), ({"splits": (48, 16)}, 48)])
def test_session_knows_the_shape_of_a_part(more: dict[str, Any], width: int) -> None:
    """Of the first output: which others a node has is not known when shapes are inferred."""
    model, _, _ = make_model(64, 64, **more)
    model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    options = ort.SessionOptions()
    register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == ["m", width]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["y"], r"outputs are 1: with splits \[16, 16, 32\] there must be 3"),
        (["y", "y1"], r"outputs are 2: with splits \[16, 16, 32\] there must be 3"),
        (["y", "", "y2"], r"output Y1 is left out: with splits \[16, 16, 32\] there must be 3"),
    ],
)
def test_outputs_that_are_not_there_are_refused(names: list[str], message: str) -> None:
    model, _, _ = make_model(64, 64, splits=(16, 16, 32))
    del model.graph.node[0].output[:]
    model.graph.node[0].output.extend(names)
    kept = [output for output in model.graph.output if output.name in names]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    with pytest.raises(Exception, match=f"QLinear node 'linear': {message}"):
        run(model, activations(2, 64))


def test_outputs_that_nothing_fills_are_refused() -> None:
    model, _, _ = make_model(64, 64, splits=(32, 32))
    del model.graph.node[0].attribute[-1]
    assert "splits" not in {attribute.name for attribute in model.graph.node[0].attribute}
    with pytest.raises(Exception, match=r"outputs are 2: with splits \[\] there must be 1"):
        run(model, activations(2, 64))


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="outside -127 to 127"):
        pack(np.full((4, 4), -128, np.int8))
    with pytest.raises(ConfigError, match="block: 16"):
        pack(np.zeros((4, 4), np.int8), 16)
    with pytest.raises(ConfigError, match=r"shape \(4,\)"):
        pack(np.zeros(4, np.int8))
