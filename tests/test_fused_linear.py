"""Models whose linear layers become QLinear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_quarot as oq
import small_llama

LLAMA = small_llama.Config(layers=2, vocab=160)


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [small_llama.decoder_feeds(LLAMA, rng, 48) for _ in range(count)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("llama") / "model.onnx", LLAMA)


def logits(path: Path, library: bool = True) -> np.ndarray:
    session = oq.session(path, use_library=library)
    result: np.ndarray = session.run(["logits"], batches(5)[-1])[0]
    return result


@pytest.mark.parametrize(("scheme", "most"), [("a8w8-dynamic", 0.06), ("a8w4-dynamic", 0.6)])
def test_layers_become_one_op_each_input(llama: Path, tmp_path: Path, scheme: str, most: float) -> None:
    report = oq.quantize(llama, tmp_path / "q.onnx", batches(4), scheme=scheme)
    wanted = logits(llama)
    found = logits(tmp_path / "q.onnx")
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < most
    assert len(report.quantized) == 11
    model = onnx.load(tmp_path / "q.onnx")
    linears = [node for node in model.graph.node if node.op_type == "QLinear"]
    names = [node.op_type for node in model.graph.node]
    # Packed q/k/v, o, gate with up, down in each of two layers, and the head.
    assert len(linears) == 9
    assert names.count("Split") == 2
    assert not {"MatMul", "Gemm", "MatMulNBits"} & set(names)
    rotated = [node.name for node in linears if any(a.name == "rotate" for a in node.attribute)]
    assert sum("down_proj" in name for name in rotated) == 2
    # Without the library: the function bodies, which differ by roundings of halves only.
    portable = logits(tmp_path / "q.onnx", library=False)
    assert np.linalg.norm(portable - found) / np.linalg.norm(found) < 0.03


def test_a_rotation_of_a_layer_left_in_float_stays(llama: Path, tmp_path: Path) -> None:
    oq.quantize(llama, tmp_path / "q.onnx", batches(1), scheme="a8w8-dynamic", exclude=["*down*"])
    model = onnx.load(tmp_path / "q.onnx")
    kept = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(kept) == 2
    rotations = {output for node in model.graph.node if node.op_type == "Hadamard" for output in node.output}
    assert all(node.input[0] in rotations for node in kept)


def test_the_per_tensor_form_can_be_chosen(llama: Path, tmp_path: Path) -> None:
    oq.quantize(llama, tmp_path / "q.onnx", batches(1), scheme="a8w8-dynamic-tensor")
    names = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]
    assert names.count("DynamicQuantizeMatMul") == 11
    assert "QLinear" not in names


def test_threads_do_not_change_the_result(llama: Path, tmp_path: Path) -> None:
    oq.quantize(llama, tmp_path / "q.onnx", batches(1), scheme="a8w8-dynamic")
    results = []
    for threads in (1, 2):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = oq.session(tmp_path / "q.onnx", session_options=options, threads=threads)
        results.append(session.run(["logits"], batches(1)[0])[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)
