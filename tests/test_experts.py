from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot.experts import expert_sites, quantize_experts
from onnx_quarot.load import load
from onnx_quarot.runtime_faults import version
from onnx_quarot.scheme import TensorSpec, parse_scheme

MS = "com.microsoft"
EXPERTS, HIDDEN, INNER, ROWS = 4, 64, 96, 20
SPECS = {
    "8 bits": TensorSpec(method="mse"),
    "4 bits": TensorSpec(bits=4, signed=False, symmetric=False, method="mse"),
    "4 bits symmetric": TensorSpec(bits=4, method="mse"),
}


def rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def save(
    path: Path, kind: str = "swiglu", hidden: int = HIDDEN, dtype: Any = np.float32, normalized: bool = True
) -> Path:
    """A linear layer, its router, and experts: gated ones with biases, or plain ones without."""
    gated = kind == "swiglu"
    more: dict[str, Any] = {"normalize_routing_weights": 1} if normalized else {}
    more |= {"swiglu_fusion": 1, "activation_alpha": 1.7, "activation_beta": 1.0} if gated else {}
    weights = {
        "a": rand(HIDDEN, hidden) / 8, "r": rand(hidden, EXPERTS), "b": rand(hidden, HIDDEN) / 8,
        "up": rand(EXPERTS, INNER * (1 + gated), hidden) / 8, "down": rand(EXPERTS, hidden, INNER),
    }  # fmt: skip
    if gated:
        weights |= {"up_bias": rand(EXPERTS, 2 * INNER) / 8, "down_bias": rand(EXPERTS, hidden) / 8}
    inputs = ["h", "p", "up", "up_bias" * gated, "down", "down_bias" * gated]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "r"], ["p"], name="router"),
        helper.make_node("MoE", inputs, ["e"], name="experts", domain=MS, k=2, activation_type=kind, **more),
        helper.make_node("Add", ["h", "e"], ["s"]),
        helper.make_node("MatMul", ["s", "b"], ["y"], name="last"),
    ]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "experts",
        [helper.make_tensor_value_info("x", element, ["n", HIDDEN])],
        [helper.make_tensor_value_info("y", element, ["n", HIDDEN])],
        [numpy_helper.from_array(array.astype(dtype), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def run(path: Path, dtype: Any = np.float32) -> np.ndarray:
    return oq.session(path).run(None, {"x": rand(ROWS, HIDDEN).astype(dtype)})[0].astype(np.float64)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def median_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Of the tokens, some of which may be sent to another expert."""
    return float(np.median(np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)))


def stored(model: ir.Model, name: str, spec: TensorSpec, block: int) -> np.ndarray:
    """What the codes, scales and zero points of a matrix in a graph stand for, [expert, out, in]."""
    found = model.graph.initializers
    codes = found[f"{name}_quantized"].const_value.numpy()
    if spec.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    scales = found[f"{name}_scales"].const_value.numpy()
    zeros: Any = 2 ** (spec.bits - 1)
    if f"{name}_zero_points" in found:
        packed = found[f"{name}_zero_points"].const_value.numpy()
        zeros = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)[..., : scales.shape[2]]
        zeros = np.repeat(zeros, block, axis=2)
    scales = scales[..., None] if scales.ndim == 2 else np.repeat(scales, block, axis=2)
    result: np.ndarray = (codes.astype(np.float32) - zeros) * scales
    return result


@pytest.mark.parametrize(("kind", "normalized"), [("swiglu", True), ("swiglu", False), ("relu", False)])
@pytest.mark.parametrize("block", [16, 32, None])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_kernel_computes_what_the_stored_weights_say(
    tmp_path: Path, spec: TensorSpec, block: int | None, kind: str, normalized: bool
) -> None:
    path = save(tmp_path / "m.onnx", kind, normalized=normalized)
    model, exact = load(path), load(path)
    wide = TensorSpec(bits=16) if block is None else TensorSpec()  # which keeps products in floating point
    scheme = replace(parse_scheme("a8w4-block"), activation=wide, weight=spec, block=block)
    (report,), _ = quantize_experts(model, expert_sites(model), {"experts": scheme})
    assert (report.op_type, report.weight_bits, report.weight) == ("QMoE", spec.bits, "up, down")
    assert report.activation == "h"
    assert [n.op_type for n in model.graph if n.domain == MS] == ["QMoE"]
    for name in ("up", "down"):
        weight = exact.graph.initializers[name].const_value.numpy()
        values = stored(model, name, spec, block or weight.shape[2])
        assert relative(values, weight) < (0.01 if spec.bits == 8 else 0.14)
        exact.graph.initializers[name].const_value = ir.tensor(values, name=name)
        assert name not in model.graph.initializers
    ir.save(model, tmp_path / "q.onnx")
    ir.save(exact, tmp_path / "exact.onnx")
    # Where rows have one scale nothing else is rounded; else activations may be, to 8 bits.
    assert relative(run(tmp_path / "q.onnx"), run(tmp_path / "exact.onnx")) < (1e-5 if block is None else 0.02)


@pytest.mark.parametrize(
    ("scheme", "note", "worst"),
    [("a8w8", "blocks of 32", 0.04), ("a16w8", "one scale a row", 0.025), ("a8w4-block", "blocks of 32", 0.3)],
)
def test_experts_are_rotated_and_quantized_in_every_scheme(
    tmp_path: Path, scheme: str, note: str, worst: float
) -> None:
    path = save(tmp_path / "m.onnx")
    report = oq.quantize(path, tmp_path / "q.onnx", [{"x": rand(400, HIDDEN)}], scheme=scheme)
    (experts,) = (part for part in report.quantized if part.op_type == "QMoE")
    assert experts.note.startswith(note)
    assert experts.quantized_bytes == experts.float_bytes * experts.weight_bits // 32
    error = median_error(run(tmp_path / "q.onnx"), run(path))
    oq.quantize(path, tmp_path / "without.onnx", [{"x": rand(400, HIDDEN)}], scheme=scheme, layers={"MoE": None})
    assert error < worst
    assert error < 1.5 * median_error(run(tmp_path / "without.onnx"), run(path))
    assert report.plan is not None
    assert {site.op_type: site.how for site in report.plan.sites}["MoE"] == "offline"
    facts = dict(report._facts())
    assert facts["scheme"] == f"{scheme}: 2 linear layers, 1 mixtures of experts, 0 tables"
    level = {n.op_type: n.attributes.get_int("accuracy_level", 0) for n in load(tmp_path / "q.onnx").graph}["QMoE"]
    told = any("1.31" in remark for remark in report.notes)
    assert (level == 4) == told == (scheme == "a8w4-block" and version() >= (1, 31))


@pytest.mark.parametrize(
    "options", [{"layers": {"MoE": None}}, {"exclude": ["exp*"]}, {"exclude": ["experts"]}, {"op_types": ["MatMul"]}]
)
def test_experts_can_stay_as_they_are(tmp_path: Path, options: dict[str, Any]) -> None:
    path = save(tmp_path / "m.onnx")
    report = oq.quantize(path, tmp_path / "q.onnx", [{"x": rand(400, HIDDEN)}], **options)
    assert [n.op_type for n in load(tmp_path / "q.onnx").graph if n.domain == MS] == ["MoE"]
    assert {part.op_type for part in report.quantized} == {"MatMul"}


def test_experts_can_have_a_scheme_of_their_own(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx")
    oq.quantize(path, tmp_path / "q.onnx", [{"x": rand(400, HIDDEN)}], layers={"experts": "a8w4-block"})
    (node,) = (n for n in load(tmp_path / "q.onnx").graph if n.op_type == "QMoE")
    assert node.attributes.get_int("expert_weight_bits", 0) == 4


def test_rows_that_fill_no_bytes_keep_floating_point(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", hidden=33)
    data = [{"x": rand(400, HIDDEN)}]
    report = oq.quantize(path, tmp_path / "q.onnx", data, scheme="a8w4-block", weights="rtn")
    assert any(note.startswith("experts of 'experts' keep floating point") for note in report.notes)
    report = oq.quantize(path, tmp_path / "w.onnx", data)
    assert [part.note for part in report.quantized if part.op_type == "QMoE"] == [
        "one scale a row, rounded to the nearest"
    ]
    assert median_error(run(tmp_path / "w.onnx"), run(path)) < 0.04


@pytest.mark.parametrize("scheme", ["a8w8", "a8w4-block"])
def test_experts_of_half_precision(tmp_path: Path, scheme: str) -> None:
    path = save(tmp_path / "m.onnx", dtype=np.float16)
    oq.quantize(path, tmp_path / "q.onnx", [{"x": rand(400, HIDDEN).astype(np.float16)}], scheme=scheme)
    got, wanted = run(tmp_path / "q.onnx", np.float16), run(path, np.float16)
    assert median_error(got, wanted) < (0.04 if scheme == "a8w8" else 0.3)
