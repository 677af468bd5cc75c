"""What other tools make of a model that was rotated or quantized here (see docs/other-tools.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnxruntime.quantization import quantize_dynamic, quantize_static

import onnx_quarot as oq
import small_llama
from exports import RUNTIME, runnable
from onnx_quarot import _core
from onnx_quarot.data import input_specs
from onnx_quarot.verify import random_feeds


@pytest.mark.skipif(RUNTIME < (1, 32), reason="its quantizer transposes weights, and leaves what the file says of them")
@pytest.mark.parametrize("name", ["gpt2_script", "opt_script", "vit_script", "phi2_script"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_rotated_model_is_quantized_by_onnxruntime(name: str, static: bool, tmp_path: Path) -> None:
    """It takes types from ONNX's shape inference, which does not know the norms that rotations leave."""
    source, rotated, result = runnable(name), tmp_path / "r.onnx", tmp_path / "q.onnx"
    assert not onnx.load(source).graph.value_info
    oq.rotate(source, rotated)
    feeds = random_feeds(input_specs(source))
    kinds = ["MatMul", "Gemm"]
    if static:
        reader = small_llama.Reader([feeds])
        quantize_static(rotated, result, reader, per_channel=True, op_types_to_quantize=kinds)
    else:
        quantize_dynamic(rotated, result, op_types_to_quantize=kinds)
    wanted = oq.session(source).run(None, feeds)[0]
    for library in (True, False):
        found = oq.session(result, use_library=library).run(None, feeds)[0]
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.1


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-dynamic", "a8w4-block"])
def test_inlining_leaves_no_operator_of_ours(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "has_vnni", lambda: False)  # exact sums are asked for
    source, path, inlined = runnable("llama_script"), tmp_path / "q.onnx", tmp_path / "i.onnx"
    feeds = random_feeds(input_specs(source))
    oq.quantize(source, path, [feeds], scheme=scheme, weights="rtn")
    assert any(node.domain == "onnx_quarot" for node in onnx.load(path).graph.node)
    onnx.save(onnx.inliner.inline_local_functions(onnx.load(path)), inlined)
    nodes = onnx.load(inlined).graph.node
    assert not any(node.domain == "onnx_quarot" for node in nodes)
    # With fewer, exact sums end the process in ONNX Runtime before 1.30.
    dynamic = [len(node.input) for node in nodes if node.op_type == "DynamicQuantizeMatMul"]
    assert set(dynamic) == ({4} if scheme == "a8w4-block" else set())
    wanted = oq.session(path, use_library=False).run(None, feeds)[0]
    np.testing.assert_allclose(oq.session(inlined).run(None, feeds)[0], wanted, rtol=1e-3, atol=1e-3)
