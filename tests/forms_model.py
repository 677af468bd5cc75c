"""A graph with every kind of linear layer, and what a quantized copy of it computes, for tests of the forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnx_quarot.sites import LinearSite, linear_sites

DEPTH, HIDDEN, OUT = 96, 128, 40


def save(path: Path, *, opset: int = 21, trans_a: int = 0) -> Path:
    """x [n, 96] -> MatMul -> Relu -> Gemm (transB, alpha, beta, bias) -> Tanh -> MatMul by a transposed constant."""
    rng = np.random.default_rng(5)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32), name)

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node(
            "Gemm", ["b", "w2", "c2"], ["d"], name="second", transB=1, alpha=0.5, beta=2.0, transA=trans_a
        ),
        helper.make_node("Tanh", ["d"], ["e"]),
        helper.make_node("Transpose", ["w3"], ["w3t"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "w3t"], ["y"], name="third"),
    ]
    constants = [weight("w1", DEPTH, HIDDEN), weight("w2", HIDDEN, HIDDEN), weight("c2", HIDDEN)]
    constants.append(weight("w3", OUT, HIDDEN))
    rows = HIDDEN if trans_a else "n"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, DEPTH])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, OUT])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def load(path: Path) -> tuple[ir.Model, list[LinearSite]]:
    model = ir.load(path)
    return model, linear_sites(model)


def run(model: Path | ir.Model) -> np.ndarray[Any, Any]:
    """The output for a fixed input."""
    x = np.random.default_rng(1).standard_normal((33, DEPTH)).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Four-bit weights behind a DequantizeLinear: no 8-bit activations of the runtime's own.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    result: np.ndarray[Any, Any] = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]
    return result


def relative(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))
