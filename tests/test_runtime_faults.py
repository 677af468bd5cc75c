"""Models that an old ONNX Runtime would run wrongly or die of are refused, and only they, and only there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import onnx_quarot as oq
from exports import RUNTIME
from onnx_quarot.calibrate import open_model
from onnx_quarot.custom_op import add_hadamard
from onnx_quarot.errors import ModelError
from onnx_quarot.segments import run_in_segments
from test_legality import MS, node, rand, save

NEEDED = r"Attention node '[yz]' has no bias.*onnxruntime 1\.31\.0: onnxruntime 1\.32 or later"


def transforms(path: Path, *transposed: bool) -> Path:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    for i, transpose in enumerate(transposed):
        x = ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 96]))
        graph.inputs.append(x)
        # 12 x 8: not symmetric, so that the two directions are two functions.
        graph.append(add_hadamard(model, x, size=96, transpose=transpose, name=f"h{i}"))
        graph.outputs.append(graph[-1].outputs[0])
    ir.save(model, path)
    return path


def attention(path: Path, inputs: str) -> Path:
    weights = {"w": rand(16, 48), "b": rand(48)}
    call = node("Attention", "x w", "y", MS, num_heads=2)
    call.input[:] = inputs.split(" ")
    return save(path, [call], [2, 5, 16], **{n: w for n, w in weights.items() if n in call.input})


def test_an_onnxruntime_that_ignores_overloads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single, several = transforms(tmp_path / "1.onnx", False), transforms(tmp_path / "2.onnx", False, True)
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    oq.session(single)
    with pytest.raises(ModelError, match=r"overloads of the function onnx_quarot::Hadamard.*1\.27 or later"):
        oq.session(several)
    monkeypatch.setattr("onnxruntime.__version__", "1.27.0")
    oq.session(several)


@pytest.mark.parametrize("inputs", ["x w", "x w ", "x w  "], ids=["absent", "empty", "empties"])
def test_attention_without_a_bias_is_refused(inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attention(tmp_path / "m.onnx", inputs)
    monkeypatch.setattr("onnxruntime.__version__", "1.31.0")
    with pytest.raises(ModelError, match=NEEDED):
        oq.session(model)
    with pytest.raises(ModelError, match=NEEDED):
        run_in_segments(model, {"x": rand(2, 5, 16)}, ["y"])
    with ExitStack() as stack, pytest.raises(ModelError, match=NEEDED):
        open_model(ir.load(model), tmp_path, stack)
    with pytest.raises(ModelError, match=NEEDED):
        oq.rotate(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    monkeypatch.setattr("onnxruntime.__version__", "1.32.0")
    oq.session(model)


def test_attention_with_a_bias_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.31.0")
    model = attention(tmp_path / "m.onnx", "x w b")
    x = rand(2, 5, 16)
    (whole,) = oq.session(model).run(None, {"x": x})
    (pieces,) = run_in_segments(model, {"x": x}, ["y"])
    np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-5)


def test_attention_in_a_branch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    call = node("Attention", "x w", "z", MS, num_heads=2)
    branches = {name: helper.make_graph([call], name, [], result) for name in ("then_branch", "else_branch")}
    choice = node("If", "c", "y", **branches)
    model = save(tmp_path / "m.onnx", [choice], [2, 5, 16], c=np.array(True), w=rand(16, 48))
    monkeypatch.setattr("onnxruntime.__version__", "1.31.0")
    with pytest.raises(ModelError, match=NEEDED):
        oq.session(model)


@pytest.mark.skipif(RUNTIME < (1, 32), reason="this ONNX Runtime has faults")
def test_a_broken_file_is_onnxruntimes_to_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "m.onnx"
    broken.write_bytes(b"\xff\xff")
    with pytest.raises(ModelError) as now:
        oq.session(broken)
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    with pytest.raises(ModelError) as old:
        oq.session(broken)
    assert str(old.value) == str(now.value)
