from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_quarot import _core
from onnx_quarot.custom_op import DOMAIN, add_hadamard, custom_op_library, register, session
from onnx_quarot.errors import ModelError, OnnxQuarotError, OrderError
from onnx_quarot.transform import hadamard, hadamard_matrix

# Largest difference from the float64 result, relative to its largest magnitude: a few roundings of the type.
TOLERANCE = {
    ir.DataType.FLOAT: 3e-6,
    ir.DataType.DOUBLE: 1e-14,
    ir.DataType.FLOAT16: 1e-3,
    ir.DataType.BFLOAT16: 8e-3,
}
SIZES = [576, 1536, 28 * 64, 1024, 140, 12, 2, 1]  # 36 * 16, 12 * 128, 28 * 2**6, ...


def signs_of(n: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), n)


def build(
    path: Path,
    calls: Sequence[dict[str, Any]],
    shapes: Sequence[Sequence[int | str | None]],
    dtype: ir.DataType = ir.DataType.FLOAT,
    opset: int = 21,
) -> ir.Model:
    """A model with one Hadamard node for each call, each with an input x{i} of its own and an output y{i}."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="test")
    model = ir.Model(graph, ir_version=8)
    for i, (call, shape) in enumerate(zip(calls, shapes, strict=True)):
        # bfloat16 cannot be fed from numpy: cast at both ends, in every type, to test the same graph.
        x = ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape(shape))
        graph.inputs.append(x)
        inner = ir.node("Cast", [x], {"to": int(dtype)}, name=f"cast_in{i}")
        inner.outputs[0].dtype, inner.outputs[0].shape = dtype, ir.Shape(shape)
        node = add_hadamard(model, inner.outputs[0], name=f"had{i}", **call)
        outer = ir.node("Cast", [node.outputs[0]], {"to": int(ir.DataType.DOUBLE)}, name=f"cast_out{i}")
        y = outer.outputs[0]
        y.name, y.dtype, y.shape = f"y{i}", ir.DataType.DOUBLE, ir.Shape(shape)
        graph.extend([inner, node, outer])
        graph.outputs.append(y)
    ir.save(model, path)
    return model


def run_both(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    return {
        way: session(path, use_library=way == "library", threads=1).run(None, feeds) for way in ("library", "function")
    }


def round_to(x: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    narrow = ml_dtypes.bfloat16 if dtype == ir.DataType.BFLOAT16 else dtype.numpy()
    return x.astype(narrow).astype(np.float64)


def check_close(got: np.ndarray, expected: np.ndarray, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
    assert got.shape == expected.shape
    if expected.size:
        assert np.abs(got - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


def executed_types(path: Path, tmp_path: Path, *, use_library: bool) -> list[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    optimized = tmp_path / f"optimized{use_library}.onnx"
    options.optimized_model_filepath = str(optimized)
    session(path, session_options=options, use_library=use_library)
    return [node.op_type for node in onnx.load(optimized).graph.node]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: d.name)
def test_library_and_function_agree_with_the_matrix_for_many_sizes_in_one_model(
    tmp_path: Path, dtype: ir.DataType
) -> None:
    calls: list[dict[str, Any]] = [{"size": n} for n in SIZES]
    calls += [
        {"size": 1536, "block_size": 64},
        {"size": 576, "block_size": 36},
        {"size": 1536, "transpose": True},
        {"size": 1536, "scale": 0.375},
        {"size": 1536, "block_size": 96, "signs": signs_of(96)},
        {"size": 1536, "block_size": 96, "signs": signs_of(1536), "transpose": True, "scale": 0.125},
        {"size": 576, "signs": signs_of(576), "transpose": True},
    ]
    path = tmp_path / "m.onnx"
    model = build(path, calls, [["b", call["size"]] for call in calls], dtype)
    onnx.checker.check_model(path, full_check=True)
    assert len(model.functions) == len(calls)
    rng = np.random.default_rng(0)
    feeds = {f"x{i}": rng.standard_normal((5, call["size"])) for i, call in enumerate(calls)}
    for outputs in run_both(path, feeds).values():
        for i, (call, got) in enumerate(zip(calls, outputs, strict=True)):
            rest = {key: value for key, value in call.items() if key != "size"}
            expected = round_to(feeds[f"x{i}"], dtype) @ hadamard_matrix(call["size"], **rest)
            check_close(got, expected, dtype)


def test_transposed_node_undoes_the_plain_one(tmp_path: Path) -> None:
    # 12 * 2**k and 20 * 2**k: H_K is not symmetric, so a mixed-up transpose shows.
    for n in (96, 160):
        signs = signs_of(n)
        assert not np.array_equal(hadamard_matrix(n), hadamard_matrix(n).T)
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", n]))
        graph.inputs.append(x)
        model = ir.Model(graph, ir_version=10)
        forth = add_hadamard(model, x, size=n, signs=signs, name="forth")
        back = add_hadamard(model, forth.outputs[0], size=n, signs=signs, transpose=True, name="back")
        graph.extend([forth, back])
        graph.outputs.append(back.outputs[0])
        path = tmp_path / f"{n}.onnx"
        ir.save(model, path)
        # Equal signs are one initializer.
        assert len(model.graph.initializers) == 1
        data = np.random.default_rng(1).standard_normal((4, n)).astype(np.float32)
        for (got,) in run_both(path, {"x": data}).values():
            check_close(got, data)


def test_library_runs_the_operator_and_without_it_the_function_is_inlined(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 1536}, {"size": 64}], [["b", 1536], ["b", 64]])
    with_library = executed_types(path, tmp_path, use_library=True)
    assert with_library.count("Hadamard") == 2
    assert "MatMul" not in with_library
    without = executed_types(path, tmp_path, use_library=False)
    assert "Hadamard" not in without
    assert "MatMul" in without


@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 3, 96), (2, 2, 3, 96), (0, 96), (2, 0, 96)], ids=str)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_every_rank_static_and_dynamic(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    declared = list(shape) if kind == "static" else [*(f"d{i}" for i in range(len(shape) - 1)), 96]
    calls: list[dict[str, Any]] = [
        {"size": 96},
        {"size": 96, "block_size": 32, "signs": signs_of(32), "transpose": True},
    ]
    path = tmp_path / "m.onnx"
    build(path, calls, [declared] * 2)
    x = np.random.default_rng(2).standard_normal(shape)
    for plain, blocked in run_both(path, {"x0": x, "x1": x}).values():
        check_close(plain, x @ hadamard_matrix(96))
        check_close(blocked, x @ hadamard_matrix(96, block_size=32, signs=signs_of(32), transpose=True))


def test_last_axis_unknown_to_the_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 96}], [["b", "n"]])
    x = np.random.default_rng(2).standard_normal((3, 96))
    for (got,) in run_both(path, {"x0": x}).values():
        check_close(got, x @ hadamard_matrix(96))


@pytest.mark.parametrize("opset", [13, 17, 23])
def test_function_follows_the_opset_of_the_model(tmp_path: Path, opset: int) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 192, "signs": signs_of(192)}], [["b", 192]], ir.DataType.BFLOAT16, opset)
    onnx.checker.check_model(path, full_check=True)
    x = round_to(np.random.default_rng(3).standard_normal((3, 192)), ir.DataType.BFLOAT16)
    for (got,) in run_both(path, {"x0": x}).values():
        check_close(got, x @ hadamard_matrix(192, signs=signs_of(192)), ir.DataType.BFLOAT16)


def test_overloads_and_external_data_survive_onnx_ir(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    calls = [{"size": 1536, "block_size": 64, "signs": signs_of(1536)}, {"size": 1536, "transpose": True}]
    build(path, calls, [["b", 1536]] * 2)
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "m.onnx"
    loaded = ir.load(path)
    ir.save(loaded, copy, external_data="m.onnx.data", size_threshold_bytes=0)
    assert (tmp_path / "copy" / "m.onnx.data").stat().st_size >= 1536
    again = ir.load(copy)
    assert sorted(key[2] for key in again.functions) == ["b1536_t", "b64_signs1536"]
    assert {n.overload for n in again.graph if n.op_type == "Hadamard"} == {"b1536_t", "b64_signs1536"}
    assert again.ir_version == 10
    assert again.opset_imports[DOMAIN] == 1
    onnx.checker.check_model(copy, full_check=True)
    x = np.random.default_rng(4).standard_normal((3, 1536))
    for outputs in run_both(copy, {"x0": x, "x1": x}).values():
        check_close(outputs[0], x @ hadamard_matrix(1536, block_size=64, signs=signs_of(1536)))
        check_close(outputs[1], x @ hadamard_matrix(1536, transpose=True))


def test_body_is_small_factors_shared_by_equal_transforms(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = build(path, [{"size": 8192}] * 3, [["b", 8192]] * 3)
    assert [key[2] for key in model.functions] == ["b8192"]
    largest = max(
        node.attributes["value"].as_tensor().size
        for function in model.functions.values()
        for node in function
        if node.op_type == "Constant"
    )
    assert largest <= 64 * 64
    assert path.stat().st_size < 20_000


def test_function_means_the_transform_to_the_reference_evaluator(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 96, "signs": signs_of(96), "scale": 0.5}], [["b", 96]])
    inlined = onnx.inliner.inline_local_functions(onnx.load(path))
    x = np.random.default_rng(6).standard_normal((3, 96))
    (got,) = onnx.reference.ReferenceEvaluator(inlined).run(None, {"x0": x})
    check_close(got, x @ hadamard_matrix(96, signs=signs_of(96), scale=0.5))


def test_output_type_and_shape_are_those_of_x(tmp_path: Path) -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={}, name="g")
    model = ir.Model(graph, ir_version=11)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["b", "t", 64]))
    node = add_hadamard(model, x, size=64, block_size=64, name="online")
    assert node.outputs[0].dtype == ir.DataType.FLOAT16
    assert node.outputs[0].shape == x.shape
    assert node.outputs[0].name == "online_output"
    assert node.graph is None
    assert not node.attributes  # a block of the whole axis is the default
    assert model.ir_version == 11
    assert model.opset_imports[""] >= 13


@pytest.mark.parametrize("rows", [1, 3, 400])
def test_result_does_not_depend_on_threads(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 1536, "signs": signs_of(1536)}], [["b", 1536]])
    x = np.random.default_rng(8).standard_normal((rows, 1536))
    results = [session(path, threads=threads).run(None, {"x0": x})[0] for threads in (1, 2, 5)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    # The same code as the Python face.
    assert np.array_equal(results[0], hadamard(x.astype(np.float32), signs=signs_of(1536)).astype(np.float64))


def test_two_sessions_and_eight_threads(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 576}], [["b", 576]])
    sessions = [session(path, threads=threads) for threads in (1, 2)]
    rng = np.random.default_rng(9)
    inputs = [rng.standard_normal((1 + 40 * i, 576)) for i in range(8)]
    expected = [x @ hadamard_matrix(576) for x in inputs]

    def work(i: int) -> None:
        for repeat in range(10):
            (got,) = sessions[(i + repeat) % 2].run(None, {"x0": inputs[i]})
            check_close(got, expected[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_registering_again_and_sessions_made_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 64}], [["b", 64]])
    options = ort.SessionOptions()
    register(options)
    register(options)
    x = np.random.default_rng(10).standard_normal((2, 64))
    for _ in range(5):
        (got,) = session(path, session_options=options).run(None, {"x0": x})
        check_close(got, x @ hadamard_matrix(64))
        (got,) = session(path).run(None, {"x0": x})
        check_close(got, x @ hadamard_matrix(64))


def test_options_that_were_given_the_library_another_way(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 64}], [["b", 64]])
    copy = tmp_path / Path(custom_op_library()).name  # as onnxruntime-genai has it, beside the model
    shutil.copy(custom_op_library(), copy)
    x = np.random.default_rng(10).standard_normal((2, 64))
    for library in (Path(custom_op_library()), copy):
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        (got,) = session(path, session_options=options).run(None, {"x0": x})
        check_close(got, x @ hadamard_matrix(64))
        # They would run the operator, whatever is asked for.
        with pytest.raises(OnnxQuarotError, match="use_library is False"):
            session(path, session_options=options, use_library=False)


@pytest.mark.parametrize("isa", _core.isas())
def test_isa_is_forced_by_the_environment(tmp_path: Path, isa: str) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 1536}], [["b", 1536]])
    script = (
        "import sys, numpy as np; from onnx_quarot import _core; from onnx_quarot.custom_op import session\n"
        "assert _core.isa() == sys.argv[2]\n"
        "x = np.random.default_rng(11).standard_normal((3, 1536))\n"
        "np.save(sys.argv[3], session(sys.argv[1], threads=1).run(None, {'x0': x})[0])"
    )
    out = tmp_path / "y.npy"
    environment = {**os.environ, "ONNX_QUAROT_ISA": isa}
    subprocess.run([sys.executable, "-c", script, path, isa, out], check=True, env=environment)
    x = np.random.default_rng(11).standard_normal((3, 1536))
    check_close(np.load(out), x @ hadamard_matrix(1536))


def test_an_isa_that_does_not_exist_is_an_error_of_the_session(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    build(path, [{"size": 64}], [["b", 64]])
    script = "import sys; from onnx_quarot.custom_op import session; session(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        env={**os.environ, "ONNX_QUAROT_ISA": "pdp11"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "ModelError" in done.stderr
    assert "pdp11" in done.stderr


def test_session_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        session(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is not a model")
    with pytest.raises(ModelError, match=r"broken\.onnx cannot be loaded by onnxruntime") as caught:
        session(broken)
    assert "\n" not in str(caught.value)
    build(tmp_path / "m.onnx", [{"size": 64}], [["b", 64]])
    with pytest.raises(OnnxQuarotError, match="threads is 0"):
        session(tmp_path / "m.onnx", threads=0)


@pytest.mark.parametrize("vnni", [False, True])
def test_exact_products_are_asked_for_where_they_are_not_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool
) -> None:
    build(tmp_path / "m.onnx", [{"size": 64}], [[2, 64]])
    monkeypatch.setattr(_core, "has_vnni", lambda: vnni)
    key = "session.x64quantprecision"
    for exact in (True, False):
        options = ort.SessionOptions()
        session(tmp_path / "m.onnx", session_options=options, exact=exact)
        if exact and not vnni:
            assert options.get_session_config_entry(key) == "1"
        else:
            with pytest.raises(RuntimeError, match=key):
                options.get_session_config_entry(key)


def test_add_hadamard_refuses_what_does_not_fit() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=9)

    def value(dtype: ir.DataType | None = ir.DataType.FLOAT, shape: Sequence[int | str] | None = ("b", 96)) -> ir.Value:
        return ir.Value(
            name="x",
            type=None if dtype is None else ir.TensorType(dtype),
            shape=None if shape is None else ir.Shape(shape),
        )

    cases: list[tuple[type[Exception], str, ir.Value, dict[str, Any]]] = [
        (ModelError, r"type of x \('x'\) is INT8", value(ir.DataType.INT8), {"size": 96}),
        (ModelError, r"type of x \('x'\) is unknown", value(None), {"size": 96}),
        (ModelError, "its last axis must have length 64", value(), {"size": 64}),
        (ModelError, "its last axis must have length 96", value(shape=()), {"size": 96}),
        (
            OrderError,
            "block_size is 64: it must divide size, which is 96",
            value(),
            {"size": 96, "block_size": 64},
        ),
        (OrderError, "block_size is 0", value(), {"size": 96, "block_size": 0}),
        (OrderError, "block_size is 6: no Hadamard matrix", value(), {"size": 96, "block_size": 6}),
        (OrderError, "size is 6: no Hadamard matrix", value(shape=None), {"size": 6}),
        (ModelError, r"signs has shape \(95,\)", value(), {"size": 96, "signs": np.ones(95, np.int8)}),
        (ModelError, "other than", value(), {"size": 96, "signs": np.zeros(96, np.int8)}),
        (ModelError, "scale is nan", value(), {"size": 96, "scale": float("nan")}),
    ]
    for kind, message, x, arguments in cases:
        with pytest.raises(kind, match=message):
            add_hadamard(model, x, name="bad", **arguments)
    # Nothing was left behind.
    assert not model.functions
    assert not model.graph.initializers
    assert model.ir_version == 9
    assert DOMAIN not in model.opset_imports
