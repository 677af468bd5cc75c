from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.observers import Range
from onnx_quarot.qdq import quantize_linears
from onnx_quarot.scheme import Scheme, TensorSpec, parse_scheme
from onnx_quarot.sites import LinearSite, linear_sites
from ranges import calibrate

Array = np.ndarray[Any, Any]
K, N = 32, 48
A8W8 = parse_scheme("a8w8")
SIGNED = Scheme("signed", TensorSpec(), TensorSpec(per_channel=True))
FLOAT_OPS = {"MatMul", "Gemm", "FusedGemm", "FusedMatMul"}


def weights(**shapes: Sequence[int]) -> dict[str, Array]:
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make(
    nodes: list[onnx.NodeProto],
    initializers: dict[str, Array],
    x: Sequence[int | str] = ("m", K),
    *,
    inputs: dict[str, Sequence[int | str]] | None = None,
    output_rank: int | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 21,
) -> onnx.ModelProto:
    fed = {"x": x, **(inputs or {})}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in fed.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def session(model: onnx.ModelProto, *, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Without this, CPUs that have AVX2 but no VNNI add pairs of products in saturating 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def executed(model: onnx.ModelProto, tmp_path: Path) -> list[str]:
    """The operators ONNX Runtime runs."""
    session(model, optimized=tmp_path / "optimized.onnx")
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


def feeds(model: onnx.ModelProto, rows: int = 6) -> dict[str, Array]:
    rng = np.random.default_rng(11)
    fed = {}
    for value in model.graph.input:
        shape = [d.dim_value or rows for d in value.type.tensor_type.shape.dim]
        fed[value.name] = rng.standard_normal(shape).astype(np.float32)
    return fed


def ranges_of(model: onnx.ModelProto, sites: Sequence[LinearSite], tmp_path: Path) -> dict[str, Range]:
    """By node name."""
    onnx.save(model, tmp_path / "float.onnx")
    found = calibrate(tmp_path / "float.onnx", [site.activation for site in sites], [feeds(model)])
    return {site.node_name: found[site.activation] for site in sites}


def quantized(
    model: onnx.ModelProto, tmp_path: Path, scheme: Scheme = A8W8, **options: Any
) -> tuple[onnx.ModelProto, list[Any]]:
    loaded = ir.from_proto(model)
    sites = linear_sites(loaded, **options)
    ranges = ranges_of(model, sites, tmp_path)
    reports, _ = quantize_linears(loaded, sites, ranges, scheme)
    result = ir.to_proto(loaded)
    onnx.checker.check_model(result, full_check=True)
    return result, reports


def relative_error(model: onnx.ModelProto, other: onnx.ModelProto) -> float:
    fed = feeds(model)
    want, got = (session(m).run(None, fed) for m in (model, other))
    assert [w.shape for w in want] == [g.shape for g in got]
    return max(float(np.linalg.norm(w - g) / np.linalg.norm(w)) for w, g in zip(want, got, strict=True))


def arrays(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")
ADD = [helper.make_node("MatMul", ["x", "w"], ["t"], name="mm"), helper.make_node("Add", ["t", "b"], ["y"])]
RANK2, RANK3, STATIC3 = ("m", K), ("b", "m", K), (2, 3, K)


def gemm(*inputs: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node("Gemm", list(inputs), ["y"], name="gemm", **attributes)]


CASES: dict[str, onnx.ModelProto] = {
    "matmul": make([MATMUL], weights(w=(K, N))),
    "matmul 3d": make([MATMUL], weights(w=(K, N)), RANK3),
    "matmul 3d static": make([MATMUL], weights(w=(K, N)), STATIC3),
    "matmul bias": make(ADD, weights(w=(K, N), b=(N,))),
    "matmul bias row": make(ADD, weights(w=(K, N), b=(1, N))),
    "matmul bias scalar": make(ADD, weights(w=(K, N), b=())),
    "matmul bias 3d": make(ADD, weights(w=(K, N), b=(N,)), RANK3),
    "matmul bias 3d static": make(ADD, weights(w=(K, N), b=(N,)), STATIC3),
    "matmul residual": make(ADD, weights(w=(K, N)), inputs={"b": ("m", N)}),
    "matmul residual 3d static": make(ADD, weights(w=(K, N)), STATIC3, inputs={"b": (2, 3, N)}),
    "matmul transposed view": make(
        [
            helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            helper.make_node("Identity", ["wt"], ["wi"]),
            helper.make_node("MatMul", ["x", "wi"], ["y"]),
        ],
        weights(w=(N, K)),
    ),
    "gemm": make(gemm("x", "w"), weights(w=(K, N))),
    "gemm transB": make(gemm("x", "w", transB=1), weights(w=(N, K))),
    "gemm bias": make(gemm("x", "w", "b"), weights(w=(K, N), b=(N,))),
    "gemm bias transB": make(gemm("x", "w", "b", transB=1), weights(w=(N, K), b=(N,))),
    "gemm bias row": make(gemm("x", "w", "b"), weights(w=(K, N), b=(1, N))),
    "gemm bias scalar": make(gemm("x", "w", "b"), weights(w=(K, N), b=())),
    "gemm alpha beta": make(gemm("x", "w", "b", alpha=-0.5, beta=3.0), weights(w=(K, N), b=(N,))),
    "gemm beta 0": make(gemm("x", "w", "b", beta=0.0), weights(w=(K, N), b=(N,))),
    "gemm transA": make(gemm("x", "w", "b", transA=1), weights(w=(6, N), b=(N,)), (6, K)),
    "gemm column": make(gemm("x", "w", "b", beta=2.0), weights(w=(K, N), b=(6, 1)), (6, K)),
    "gemm data bias": make(gemm("x", "w", "b"), weights(w=(K, N)), inputs={"b": ("m", N)}),
    "gemm data bias beta": make(gemm("x", "w", "b", beta=2.0, alpha=0.5), weights(w=(K, N)), inputs={"b": ("m", N)}),
}


@pytest.mark.parametrize("scheme", [A8W8, SIGNED], ids=["uint8", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_accurate_and_runs_on_integers(case: str, scheme: Scheme, tmp_path: Path) -> None:
    model = CASES[case]
    result, (report,) = quantized(model, tmp_path, scheme)
    assert relative_error(model, result) < 0.02
    ran = executed(result, tmp_path)
    assert not FLOAT_OPS & set(ran), ran
    assert {"MatMulIntegerToFloat", "QGemm"} & set(ran), ran
    assert not any(a.dtype == np.float32 and a.size >= K * N for a in arrays(result).values())
    assert report.note == ""
    assert [o.name for o in result.graph.output] == ["y"]


def exact(model: onnx.ModelProto, fed: dict[str, Array]) -> Array:
    """The quantized model evaluated in float64 from its own numbers: one MatMul or Gemm, weight [K, N]."""
    a = arrays(model)
    xs, xz, ws = a["x_scale"].astype(np.float64), a["x_zero_point"].astype(np.int64), a["w_scale"]
    q = np.clip(np.rint(fed["x"] / a["x_scale"]) + xz, *((0, 255) if xz else (-128, 127))) - xz
    return np.asarray((q @ a["w_quantized"].astype(np.float64)) * (xs * ws.astype(np.float64)))


@pytest.mark.parametrize("scheme", [A8W8, SIGNED], ids=["uint8", "int8"])
def test_the_integer_kernel_is_exact(scheme: Scheme, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    extreme = np.sign(rng.standard_normal((K, N))).astype(np.float32)
    result, _ = quantized(make([MATMUL], {"w": extreme}), tmp_path, scheme)
    fed = {"x": np.full((3, K), 10, np.float32)}
    got = session(result).run(None, fed)[0]
    np.testing.assert_allclose(got, exact(result, fed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True], ids=["uint8", "int8 symmetric"])
def test_same_numbers_as_onnxruntime_quantization(symmetric: bool, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Sigmoid", ["h"], ["s"]),
        helper.make_node("Gemm", ["s", "w2", "b2"], ["y"], name="second", transB=1),
    ]
    model = make(nodes, weights(w=(K, N), w2=(16, N), b2=(16,)))
    onnx.save(model, tmp_path / "float.onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.rest = [feeds(model)]

        def get_next(self) -> Any:
            return self.rest.pop() if self.rest else None

    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "theirs.onnx",
        Reader(),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=quantization.QuantType.QInt8 if symmetric else quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # Outputs are left float here, as ours are.
        extra_options={
            "WeightSymmetric": True,
            "ActivationSymmetric": symmetric,
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
        },
    )
    theirs = onnx.load(tmp_path / "theirs.onnx")
    ours, _ = quantized(model, tmp_path, SIGNED if symmetric else A8W8)
    a, b = arrays(ours), arrays(theirs)
    for name in ("x", "s", "w", "w2"):
        np.testing.assert_array_equal(a[f"{name}_scale"], b[f"{name}_scale"])
    for name in ("x", "s"):
        np.testing.assert_array_equal(a[f"{name}_zero_point"], b[f"{name}_zero_point"])
        assert a[f"{name}_zero_point"].dtype == b[f"{name}_zero_point"].dtype
    for name in ("w", "w2"):
        np.testing.assert_array_equal(a[f"{name}_quantized"], b[f"{name}_quantized"])
    np.testing.assert_array_equal(a["b2_quantized"], b["b2_quantized"].reshape(-1))
    fed = feeds(model)
    want, got = (session(m).run(None, fed)[0] for m in (theirs, ours))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_an_activation_is_quantized_once_and_float_readers_keep_it_float(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
        helper.make_node("MatMul", ["r", "w2"], ["y2"]),
        helper.make_node("Abs", ["r"], ["y3"]),
    ]
    model = make(nodes, weights(w=(K, N), w2=(K, 8)), outputs=("y", "y2", "y3"))
    result, reports = quantized(model, tmp_path)
    ops = [node.op_type for node in result.graph.node]
    assert ops.count("QuantizeLinear") == 1
    assert ops.count("DequantizeLinear") == 3
    assert [r.activation for r in reports] == ["r", "r"]
    assert next(n for n in result.graph.node if n.op_type == "Abs").input[0] == "r"
    assert relative_error(model, result) < 0.02


def test_a_shared_weight_is_quantized_once_whatever_way_it_is_seen(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["h2"]),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["h2", "wt"], ["h3"]),
        helper.make_node("Transpose", ["w"], ["wt2"], perm=[1, 0]),
        helper.make_node("MatMul", ["h3", "wt2"], ["y"]),
    ]
    model = make(nodes, weights(w=(K, K)))
    result, reports = quantized(model, tmp_path)
    integers = [a for a in arrays(result).values() if a.itemsize == 1 and a.ndim == 2]
    assert len(integers) == 2  # as it is, and transposed: their channels differ
    assert all(a.dtype == np.uint8 for a in integers)
    assert len(reports) == 4
    assert relative_error(model, result) < 0.05
    assert "Transpose" not in [node.op_type for node in result.graph.node]


def test_a_tied_embedding_keeps_its_float_copy_for_the_gather(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["head"], ["table"], perm=[1, 0]),
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["h"]),
        helper.make_node("MatMul", ["h", "head"], ["y"], name="head_matmul"),
    ]
    model = make(nodes, weights(head=(K, N)), x=("b", "m"))
    result, (report,) = quantized(model, tmp_path)
    assert arrays(result)["head"].dtype == np.float32
    assert "head" in report.note
    assert relative_error(model, result) < 0.02


def test_sites_by_structure(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="left"),
        helper.make_node("MatMul", ["w", "c"], ["const"], name="constant"),
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(weights(k=(N, 4))["k"])),
        helper.make_node("Gemm", ["a", "k"], ["d"], name="right"),
        helper.make_node("MatMul", ["a", "batched"], ["e"], name="batched"),
        helper.make_node("MatMul", ["w", "z"], ["f"], name="swapped"),
        helper.make_node("MatMul", ["d", "z2"], ["g"], name="two activations"),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
    ]
    model = make(
        nodes,
        weights(w=(K, N), c=(N, 2), batched=(2, N, 3)),
        inputs={"z": (N, 3), "z2": (4, 5)},
        outputs=("e", "f", "g", "h", "const"),
    )
    loaded = ir.from_proto(model)
    sites = linear_sites(loaded)
    assert [(s.node_name, s.activation, s.weight, s.depth, s.channels) for s in sites] == [
        ("left", "x", "w", K, N),
        ("right", "a", "k", N, 4),
        ("h", "x", "w", K, N),
    ]
    assert [s.node_name for s in linear_sites(loaded, op_types=["Gemm"])] == ["right"]
    assert [s.node_name for s in linear_sites(loaded, exclude=["le*"])] == ["right", "h"]
    assert [s.node_name for s in linear_sites(loaded, exclude=["left", "h"])] == ["right"]
    with pytest.raises(ConfigError, match=r"exclude: 'nothing\*' matches no linear layer"):
        linear_sites(loaded, exclude=["nothing*"])
    with pytest.raises(ConfigError, match=r"op_types: 'Conv'"):
        linear_sites(loaded, op_types=["Conv"])
    result, _ = quantized(model, tmp_path)
    assert relative_error(model, result) < 0.02


def test_a_name_with_brackets_is_excluded_by_its_exact_name() -> None:
    model = make([helper.make_node("MatMul", ["x", "w"], ["y"], name="layer[0]")], weights(w=(K, N)))
    assert linear_sites(ir.from_proto(model), exclude=["layer[0]"]) == []


def test_an_overridable_weight_is_no_constant() -> None:
    model = make([MATMUL], weights(w=(K, N)), inputs={"w": (K, N)})
    assert linear_sites(ir.from_proto(model)) == []


def test_refusals_come_before_any_change() -> None:
    model = make([MATMUL], weights(w=(K, N)))
    loaded = ir.from_proto(model)
    sites = linear_sites(loaded)
    with pytest.raises(ConfigError, match="ranges: none for 'x'"):
        quantize_linears(loaded, sites, {}, A8W8)
    per_channel = Scheme("odd", TensorSpec(per_channel=True), TensorSpec())
    with pytest.raises(ConfigError, match="odd asks for activations per channel"):
        quantize_linears(loaded, sites, {"mm": Range(-1, 1)}, per_channel)
    assert [node.op_type for node in loaded.graph] == ["MatMul"]
    old = ir.from_proto(make([MATMUL], weights(w=(K, N)), opset=11))
    with pytest.raises(ModelError, match="opset 11"):
        quantize_linears(old, linear_sites(old), {"mm": Range(-1, 1)}, A8W8)
    half = make([MATMUL], weights(w=(K, N)))
    half.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights(w=(K, N))["w"].astype(np.float16), "w"))
    loaded = ir.from_proto(half)
    with pytest.raises(ModelError, match=r"'mm'.* float16"):
        quantize_linears(loaded, linear_sites(loaded), {"mm": Range(-1, 1)}, A8W8)


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = weights(w=(K, N))
    w["w"][3, 4] = np.inf
    loaded = ir.from_proto(make([MATMUL], w))
    quantize_linears(loaded, linear_sites(loaded), {"mm": Range(-1, 1)}, A8W8)
    tensor = loaded.graph.initializers["w_quantized"].const_value
    assert tensor is not None
    with pytest.raises(ModelError, match="weight 'w' holds a value that is not finite"):
        tensor.numpy()


def test_zeros_and_empty_ranges(tmp_path: Path) -> None:
    w = weights(w=(K, N), b=(N,))
    w["w"][:, :5] = 0
    model = make(gemm("x", "w", "b"), w)
    result, _ = quantized(model, tmp_path)
    assert relative_error(model, result) < 0.02
    got = session(result).run(None, feeds(model))[0][:, :5]
    np.testing.assert_allclose(got, np.broadcast_to(w["b"][:5], got.shape), rtol=1e-6)
    loaded = ir.from_proto(make([MATMUL], w))
    quantize_linears(loaded, linear_sites(loaded), {"mm": Range(0.0, 0.0)}, A8W8)
    assert not session(ir.to_proto(loaded)).run(None, {"x": np.zeros((2, K), np.float32)})[0].any()


def test_a_bias_large_against_its_channel_does_not_overflow(tmp_path: Path) -> None:
    w = weights(w=(K, N), b=(N,))
    w["w"][:, 0] *= 1e-12
    w["b"][0] = 100.0
    model = make(gemm("x", "w", "b"), w)
    result, _ = quantized(model, tmp_path)
    got = session(result).run(None, feeds(model))[0]
    np.testing.assert_allclose(got[:, 0], 100.0, rtol=1e-5)


def test_weights_are_evaluated_on_saving_once_each_and_not_held(tmp_path: Path) -> None:
    model = make(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])],
        weights(w=(K, 128), v=(128, 128)),
    )
    loaded = ir.from_proto(model)
    plain = {name: value.const_value.numpy() for name, value in loaded.graph.initializers.items() if value.const_value}
    calls: list[str] = []

    def lazily(name: str) -> ir.LazyTensor:
        def evaluate() -> ir.Tensor:
            calls.append(name)
            return ir.Tensor(plain[name])

        return ir.LazyTensor(evaluate, ir.DataType.FLOAT, ir.Shape(plain[name].shape), name=name)

    for name in plain:
        loaded.graph.initializers[name].const_value = lazily(name)
    ranges = ranges_of(model, linear_sites(loaded), tmp_path)
    quantize_linears(loaded, linear_sites(loaded), ranges, A8W8)
    assert calls == []
    ir.save(loaded, tmp_path / "q.onnx", external_data="q.onnx.data")
    assert calls == ["w", "v"]
    held = [o for o in gc.get_objects() if isinstance(o, np.ndarray) and o.dtype == np.int8 and o.size >= K * 128]
    assert held == []
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)
    want, _ = quantized(model, tmp_path)
    got = onnx.load(tmp_path / "q.onnx")
    for name, array in arrays(want).items():
        np.testing.assert_array_equal(array, arrays(got)[name])


def test_external_weights_are_read_from_their_file_and_let_go(tmp_path: Path) -> None:
    model = make([MATMUL], weights(w=(K, N)))
    want, _ = quantized(model, tmp_path)
    onnx.save(model, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    loaded = ir.load(tmp_path / "e.onnx")
    source = loaded.graph.initializers["w"].const_value
    assert isinstance(source, ir.ExternalTensor)
    quantize_linears(loaded, linear_sites(loaded), ranges_of(model, linear_sites(loaded), tmp_path), A8W8)
    got = ir.to_proto(loaded)
    assert source.raw is None
    np.testing.assert_array_equal(arrays(want)["w_quantized"], arrays(got)["w_quantized"])


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(seed: int, tmp_path: Path) -> None:
    """A few linears in random forms, one after another, keep close to float and leave no float kernel."""
    rng = np.random.default_rng(seed)
    width, value, nodes, constants = K, "x", [], {}
    rank = int(rng.integers(2, 4))
    for i in range(4):
        out, previous = int(rng.integers(8, 64)), value
        value = f"v{i}"
        use_gemm = rank == 2 and rng.random() < 0.5
        trans = bool(rng.random() < 0.5) and use_gemm
        w = rng.standard_normal((width, out)) / np.sqrt(width) * np.exp(rng.standard_normal(out))
        constants[f"w{i}"] = np.ascontiguousarray(w.T if trans else w, np.float32)
        if rng.random() < 0.6:
            constants[f"b{i}"] = rng.standard_normal(out).astype(np.float32)
        bias = [f"b{i}"] if f"b{i}" in constants else []
        if use_gemm:
            alpha = float(rng.uniform(0.5, 2))
            nodes.append(
                helper.make_node("Gemm", [previous, f"w{i}", *bias], [f"t{i}"], transB=int(trans), alpha=alpha)
            )
        else:
            nodes.append(helper.make_node("MatMul", [previous, f"w{i}"], [f"m{i}"]))
            nodes.append(
                helper.make_node("Add", [*bias, f"m{i}"], [f"t{i}"])
                if bias
                else helper.make_node("Neg", [f"m{i}"], [f"t{i}"])
            )
        nodes.append(helper.make_node("LeakyRelu", [f"t{i}"], [value], alpha=0.3))
        width = out
    model = make(nodes, constants, ("b", "m", K)[3 - rank :], outputs=(value,))
    result, reports = quantized(model, tmp_path)
    assert len(reports) == 4
    assert relative_error(model, result) < 0.06
    assert not FLOAT_OPS & set(executed(result, tmp_path))
