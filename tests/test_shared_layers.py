"""Layers that share their weights: rotated, quantized and stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq

LAYERS, WIDTH, FFN = 4, 32, 48
RNG = np.random.default_rng(0)


def rand(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


WEIGHTS = {
    "a": rand(16, WIDTH), "u": rand(WIDTH, FFN), "d": rand(FFN, WIDTH), "b": rand(WIDTH, 8),
    "g": 1 + rand(WIDTH), "c": rand(WIDTH),
}  # fmt: skip
MATRICES = sum(w.nbytes for w in WEIGHTS.values() if w.ndim == 2)


def save(path: Path, *, copies: bool, norm_first: bool) -> Path:
    """``copies``: as torch's exporter writes it, every layer but the first reads Identity nodes of the weights."""
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h0"])]
    for i in range(LAYERS):
        names = {w: f"{w}{i}" if copies and i else w for w in "udgc"}
        nodes += [helper.make_node("Identity", [w], [name]) for w, name in names.items() if name != w]
        u, d, g, c = names.values()
        inner = f"n{i}" if norm_first else f"h{i}"
        layer = [
            helper.make_node("MatMul", [inner, u], [f"p{i}"]),
            helper.make_node("Relu", [f"p{i}"], [f"r{i}"]),
            helper.make_node("MatMul", [f"r{i}", d], [f"s{i}"]),
        ]
        total = f"h{i + 1}" if norm_first else f"t{i}"
        layer.append(helper.make_node("Add", [f"h{i}", f"s{i}"], [total]))
        if norm_first:
            layer.insert(0, helper.make_node("LayerNormalization", [f"h{i}", g, c], [inner]))
        else:
            layer.append(helper.make_node("LayerNormalization", [total, g, c], [f"h{i + 1}"]))
        nodes += layer
    nodes.append(helper.make_node("MatMul", [f"h{LAYERS}", "b"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 9, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 9, 8])],
        [numpy_helper.from_array(w, name) for name, w in WEIGHTS.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def matrix_bytes(path: Path) -> int:
    arrays = map(numpy_helper.to_array, onnx.load(path).graph.initializer)
    return sum(a.nbytes for a in arrays if a.ndim == 2 and a.shape[0] > 8)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_they_are_rotated_as_one(tmp_path: Path, copies: bool, norm_first: bool, seed: int | None) -> None:
    """Also the last layer's, though folding the last norm into what follows would save a transform."""
    source = save(tmp_path / "m.onnx", copies=copies, norm_first=norm_first)
    report = oq.rotate(source, tmp_path / "r.onnx", seed=seed)
    assert report.plan is not None
    assert [site.how for site in report.plan.sites].count("none") == 0
    assert matrix_bytes(tmp_path / "r.onnx") == MATRICES


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-dynamic-tensor", "a8w8-dynamic"])
def test_they_are_quantized_as_one(tmp_path: Path, scheme: str) -> None:
    source = save(tmp_path / "m.onnx", copies=True, norm_first=False)
    data = [{"x": RNG.standard_normal((4, 9, 16)).astype(np.float32)} for _ in range(4)]
    report = oq.quantize(source, tmp_path / "q.onnx", data, scheme=scheme)
    assert len(report.quantized) == 2 * LAYERS + 2
    assert matrix_bytes(tmp_path / "q.onnx") < 0.4 * MATRICES
    expected, found = (oq.session(p).run(None, data[0])[0] for p in (source, tmp_path / "q.onnx"))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
