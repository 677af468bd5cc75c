from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot.errors import ConfigError, DataError
from onnx_quarot.scheme import parse_scheme

LAYERS, WIDTH, TOKENS, BOOSTED = 20, 32, 64, 7


@pytest.fixture
def spiky(tmp_path: Path) -> Path:
    """Twenty layers; at the input of one, the first token is 3,000 times larger than the others."""
    rng = np.random.default_rng(3)
    nodes, constants, h = [], [], "x"
    for layer in range(LAYERS):
        weight = (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{layer}"))
        if layer == BOOSTED:
            nodes.append(helper.make_node("Mul", [h, "gain"], ["boosted"]))
            h = "boosted"
        nodes.append(helper.make_node("MatMul", [h, f"w{layer}"], [f"p{layer}"], name=f"linear{layer}"))
        nodes.append(helper.make_node("Tanh", [f"p{layer}"], [f"h{layer}"]))
        h = f"h{layer}"
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", TOKENS, WIDTH]),
        helper.make_tensor_value_info("gain", TensorProto.FLOAT, ["n", TOKENS, 1]),
    ]
    outputs = [helper.make_tensor_value_info(h, TensorProto.FLOAT, ["n", TOKENS, WIDTH])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    path = tmp_path / "spiky.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    gain = np.ones((1, TOKENS, 1), np.float32)
    gain[:, 0] = 3000
    return [{"x": rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32), "gain": gain.copy()} for _ in range(2)]


def error(reference: Path, candidate: Path) -> float:
    feeds = batches()[0]
    a, b = (oq.session(path).run(None, feeds)[0] for path in (reference, candidate))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_the_one_layer_that_needs_16_bits_gets_them(spiky: Path, tmp_path: Path) -> None:
    reports = {}
    for mixed in (False, True):
        target = tmp_path / f"{mixed}.onnx"
        options = {"rotations": (), "method": "minmax", "mixed": mixed}
        reports[mixed] = oq.quantize(spiky, target, batches(), **options)
    wide = [q.node_name for q in reports[True].quantized if q.activation_bits == 16]
    assert wide == [f"linear{BOOSTED}"]
    assert any(f"linear{BOOSTED}" in note and "1 of 20" in note for note in reports[True].notes)
    assert reports[True].to_json()["scheme"] == "a8w8 mixed"
    types = [t.dtype for t in (v.const_value for v in ir.load(tmp_path / "True.onnx").graph.initializers.values()) if t]
    assert types.count(ir.DataType.UINT16) == 1
    assert error(spiky, tmp_path / "True.onnx") < 0.25 * error(spiky, tmp_path / "False.onnx")


def test_the_budget_is_kept(spiky: Path, tmp_path: Path) -> None:
    report = oq.quantize(spiky, tmp_path / "q.onnx", batches(), rotations=(), mixed=0.15)
    assert sum(q.activation_bits == 16 for q in report.quantized) <= 3


@pytest.mark.parametrize("budget", [0.0, 1.5, -0.1])
def test_budgets_out_of_range(spiky: Path, tmp_path: Path, budget: float) -> None:
    with pytest.raises(ConfigError, match="mixed: a budget of"):
        oq.quantize(spiky, tmp_path / "q.onnx", batches(), rotations=(), mixed=budget)
    assert not (tmp_path / "q.onnx").exists()


def test_schemes_without_static_narrow_activations_are_refused(spiky: Path, tmp_path: Path) -> None:
    assert parse_scheme("a16w8").activation.bits == 16
    with pytest.raises(ConfigError, match="a16w8 has no static activations"):
        oq.quantize(spiky, tmp_path / "q.onnx", batches(), rotations=(), scheme="a16w8", mixed=True)


def test_data_of_zeros_is_refused(spiky: Path, tmp_path: Path) -> None:
    zeros = [{name: np.zeros_like(array) for name, array in batch.items()} for batch in batches()]
    with pytest.raises(DataError, match="all 20 activations are zero throughout"):
        oq.quantize(spiky, tmp_path / "q.onnx", zeros, rotations=())


def test_nan_names_the_layer_it_reached(spiky: Path, tmp_path: Path) -> None:
    data = batches()
    data[1]["gain"][0, 3] = np.nan
    with pytest.raises(DataError, match=r"input of 'linear7', holds NaN.*batch 1"):
        oq.quantize(spiky, tmp_path / "q.onnx", data, rotations=())
