"""Models whose linear layers become QLinear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.shape_inference
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import onnx_quarot as oq
import small_llama
from onnx_quarot.info import model_facts
from onnx_quarot.judged import squared_error
from onnx_quarot.sensitivity import measure_sensitivity

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


@pytest.fixture(scope="module")
def shaped(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, which states the shapes of its values, as exporters do."""
    model = onnx.load(llama)
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gather") or "LayerNormalization" in node.op_type:
            width = LLAMA.hidden
            if node.op_type == "MatMul":
                width = next(tuple(w.dims)[1] for w in model.graph.initializer if w.name == node.input[1])
            for name in node.output:
                if name and name not in ("logits", "mask_size"):
                    dims = ["batch_size", "sequence_length", width]
                    model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    path = tmp_path_factory.mktemp("shaped") / "model.onnx"
    onnx.save(model, path)
    return path


def test_norms_and_sums_become_parts_of_it(shaped: Path, tmp_path: Path) -> None:
    oq.quantize(shaped, tmp_path / "q.onnx", batches(2), scheme="a8w8-dynamic")
    wanted, found = logits(shaped), logits(tmp_path / "q.onnx")
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.06
    portable = logits(tmp_path / "q.onnx", library=False)
    assert np.linalg.norm(portable - found) / np.linalg.norm(found) < 0.03
    model = onnx.load(tmp_path / "q.onnx")
    onnx.checker.check_model(model)
    linears = [node for node in model.graph.node if node.op_type == "QLinear"]
    assert len(linears) == 9
    # All norms but the last, whose weights are not folded where the head is tied.
    norms = [node for node in model.graph.node if "LayerNormalization" in node.op_type]
    assert [node.name for node in norms] == ["/model/layers.2/final_norm_layernorm/SkipLayerNorm"]
    constants = {weight.name for weight in model.graph.initializer}
    summed = [node for node in linears if len(node.input) > 3 and node.input[3] and node.input[3] not in constants]
    assert len(summed) == 3
    assert sum(any(a.name == "epsilon" for a in node.attribute) for node in linears) == 4
    used = {(node.op_type, node.overload) for node in model.graph.node if node.domain == "onnx_quarot"}
    assert {(function.name, function.overload) for function in model.functions} == used


def test_shapes_are_inferred_strictly_of_a_model_that_states_none(llama: Path, tmp_path: Path) -> None:
    oq.quantize(llama, tmp_path / "q.onnx", batches(1), scheme="a8w8-dynamic")
    model = onnx.load(tmp_path / "q.onnx")
    assert any(node.op_type == "GroupQueryAttention" and node.domain == "onnx_quarot" for node in model.graph.node)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def test_a_stream_of_unknown_shape_stays_outside(llama: Path, tmp_path: Path) -> None:
    """The operator adds no smaller or larger value, which a norm with a skip would."""
    oq.quantize(llama, tmp_path / "q.onnx", batches(1), scheme="a8w8-dynamic")
    model = onnx.load(tmp_path / "q.onnx")
    assert sum(node.op_type == "SkipSimplifiedLayerNormalization" for node in model.graph.node) == 4


def test_separate_projections_become_outputs_of_one(tmp_path: Path) -> None:
    config = small_llama.Config(layers=1, vocab=160, separate_qkv=True)
    path = small_llama.save(tmp_path / "model.onnx", config)
    feeds = [small_llama.decoder_feeds(config, np.random.default_rng(seed), 48) for seed in range(2)]
    oq.quantize(path, tmp_path / "q.onnx", feeds, scheme="a8w8-dynamic")
    model = onnx.load(tmp_path / "q.onnx")
    outputs = [len(node.output) for node in model.graph.node if node.op_type == "QLinear"]
    assert sorted(outputs) == [1, 1, 1, 1, 3]
    results = [oq.session(p).run(["logits"], feeds[1])[0] for p in (path, tmp_path / "q.onnx")]
    assert np.linalg.norm(results[1] - results[0]) / np.linalg.norm(results[0]) < 0.06


def test_a_gate_that_something_else_reads_stays_outside(llama: Path, tmp_path: Path) -> None:
    model = onnx.load(llama)
    model.graph.output.append(onnx.ValueInfoProto(name="/model/layers.0/act"))
    onnx.save(model, tmp_path / "m.onnx")
    oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", batches(1), scheme="a8w8-dynamic")
    found = onnx.load(tmp_path / "q.onnx").graph.node
    assert sum(node.op_type == "Sigmoid" for node in found) == 1
    assert sum(any(a.name == "splits" for a in node.attribute) for node in found) == 1


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
    assert not {"Split", "Sigmoid"} & set(names)
    assert sum(any(a.name == "gated" for a in node.attribute) for node in linears) == 2
    assert not {"MatMul", "Gemm", "MatMulNBits"} & set(names)
    rotated = [node.name for node in linears if any(a.name == "rotate" for a in node.attribute)]
    assert sum("down_proj" in name for name in rotated) == 2
    facts = model_facts(tmp_path / "q.onnx")
    assert facts["quantization"] == {"QLinear": 9}
    assert facts["online_rotations"] == len(rotated) + names.count("Hadamard")
    # Without the library: the function bodies, which differ by roundings of halves only.
    portable = logits(tmp_path / "q.onnx", library=False)
    assert np.linalg.norm(portable - found) / np.linalg.norm(found) < 0.03


def test_a_rotation_of_a_layer_left_in_float_stays(llama: Path, tmp_path: Path) -> None:
    oq.rotate(llama, tmp_path / "r.onnx")  # quantizing makes none for such a layer
    oq.quantize(
        tmp_path / "r.onnx", tmp_path / "q.onnx", batches(1), scheme="a8w8-dynamic", exclude=["*down*"], rotations=()
    )
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


def test_sensitivity_sees_layers_with_sums_and_norms_inside(shaped: Path, tmp_path: Path) -> None:
    oq.quantize(shaped, tmp_path / "q.onnx", batches(2), scheme="a8w8-dynamic", op_types=("MatMul",))
    (feeds,) = batches(1)
    found = measure_sensitivity(shaped, tmp_path / "q.onnx", feeds)
    assert len(found.layers) == 1 + 4 * 2  # the head; queries with keys and values, their output, gate with up, down
    wanted, actual = (oq.session(path).run(["logits"], feeds)[0] for path in (shaped, tmp_path / "q.onnx"))
    assert found.all == pytest.approx(squared_error([wanted], [actual]), rel=2e-2)
