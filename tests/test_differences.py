"""The error of a rewrite that is not exact names the place: one layer of real exports is broken at a time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from exports import runnable
from onnx_quarot import verify

# Streams that lose their mean, norms in pieces, masked scores, features in the middle, norms behind the layers.
PLACES = [
    ("gpt2_dynamo", 0),
    ("gpt2_dynamo", 5),
    ("gpt2_dynamo", 8),
    ("llama_script", 0),
    ("llama_script", 8),
    ("llama_script", 14),
    ("whisper_decoder_script", 0),
    ("whisper_decoder_script", 13),
    ("convnet_script", 2),
    ("olmo2_dynamo", 1),
    ("genai_gemma2", 3),
]


@pytest.mark.parametrize(("name", "number"), PLACES)
def test_the_layer_at_fault_is_named(name: str, number: int, tmp_path: Path) -> None:
    path = runnable(name)
    plan = oq.discover(path, seed=1)
    site = plan.sites[number]
    others = tuple(job for job in plan.rebases if job.node != site.node)
    assert len(others) < len(plan.rebases)
    with pytest.raises(oq.VerificationError) as caught:
        oq.rotate(path, tmp_path / "r.onnx", plan=replace(plan, rebases=others))
    found = re.search(r"first difference at (.*); nothing was written", str(caught.value))
    assert found is not None
    if "output itself" in found[1]:
        assert site.name == plan.sites[-1].name
    else:  # the layer, or the addition of its bias
        maker = re.search(r"made by (\w+) '(.*)'\)", found[1])
        assert maker is not None
        assert maker[2] == site.name or (
            maker[1] == "Add" and maker[2].rpartition("/")[0] == site.name.rpartition("/")[0]
        )


def two_layers(path: Path) -> Path:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], "second"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 16]) for n in "xy")
    weights = [numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32), n) for n in ("w1", "w2")]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("exact", [True, False])
def test_rounding_that_the_optimizer_moved_is_told_from_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    """A deep model may make 1e-4 of it: then the graphs as written decide."""
    path, rotated = two_layers(tmp_path / "m.onnx"), tmp_path / "r.onnx"
    plan = oq.discover(path)
    used = plan if exact else replace(plan, rebases=plan.rebases[:1])
    run = verify._run

    def optimized(model: Path, feeds: dict[str, Any], names: list[str]) -> list[Any]:
        return [x * (1 + 3e-4 * (model != path)) for x in run(model, feeds, names)]

    monkeypatch.setattr(verify, "_run", optimized)
    if exact:
        report = oq.rotate(path, rotated, plan=used)
        assert report.verification is not None
        assert report.verification.worst < 1e-6
    else:
        with pytest.raises(oq.VerificationError, match="first difference at the output itself"):
            oq.rotate(path, rotated, plan=used)
