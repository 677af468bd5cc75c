"""What has a mean is not made worse by a rotation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq


def save(path: Path, activation: str) -> Path:
    random = np.random.default_rng(0)
    weights = {
        "a": random.standard_normal((64, 512)).astype(np.float32) / 8,
        "b": random.standard_normal((512, 32)).astype(np.float32) / 22,
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node(activation, ["h"], ["g"]),
            helper.make_node("MatMul", ["g", "b"], ["y"]),
        ],
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-dynamic"])
@pytest.mark.parametrize("activation", ["Relu", "Gelu"])
def test_rotating_what_an_activation_function_makes(tmp_path: Path, activation: str, scheme: str) -> None:
    path = save(tmp_path / "m.onnx", activation)
    x = np.random.default_rng(1).standard_normal((400, 64)).astype(np.float32)
    (wanted,) = oq.session(path).run(None, {"x": x})
    errors = []
    for rotations in ((), ("R4",)):
        report = oq.quantize(path, tmp_path / "q.onnx", [{"x": x}], scheme=scheme, rotations=rotations)
        assert report.rotations == rotations
        (got,) = oq.session(tmp_path / "q.onnx").run(None, {"x": x})
        errors.append(np.linalg.norm(got - wanted))
    assert errors[1] < 1.25 * errors[0]


def test_only_rotations_behind_such_have_signs_without_a_seed(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", "Relu")
    plans = [oq.discover(path) for _ in range(2)]
    first, second = ({n: r.signs for n, r in plan.rotations.items() if plan.kinds[n] == "R4"} for plan in plans)
    assert first
    for name, signs in first.items():
        assert signs is not None
        np.testing.assert_array_equal(signs, second[name])
    assert all(plan.rotations[n].signs is None for plan in plans for n, k in plan.kinds.items() if k != "R4")
