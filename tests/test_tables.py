from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_quarot.errors import ConfigError
from onnx_quarot.observers import Range
from onnx_quarot.qdq import quantize_linears
from onnx_quarot.scheme import TensorSpec, parse_scheme
from onnx_quarot.sites import linear_sites
from onnx_quarot.tables import quantize_tables

ROWS, WIDTH = 40, 16
TABLE = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
IDS = np.array([[3, 39, 0], [7, 7, -1]])


def make(nodes: list[onnx.NodeProto], initializers: dict[str, Any], *outputs: str) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto) -> list[Any]:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    # Without this, CPUs that have AVX2 but no VNNI add pairs of products in saturating 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"ids": IDS}))


GATHER = helper.make_node("Gather", ["table", "ids"], ["rows"], name="lookup")


def test_rows_are_within_half_a_step_of_float() -> None:
    model = make([GATHER], {"table": TABLE}, "rows")
    loaded = ir.from_proto(model)
    (report,) = quantize_tables(loaded, min_elements=1)
    result = ir.to_proto(loaded)
    assert (report.table, report.rows, report.width) == ("table", ROWS, WIDTH)
    assert report.float_bytes == 4 * report.quantized_bytes
    (got,) = run(result)
    half_step = np.abs(TABLE[IDS]).max(-1, keepdims=True) / 254
    assert (np.abs(got - TABLE[IDS]) <= half_step * 1.001).all()
    assert "table" not in [t.name for t in result.graph.initializer]


def test_a_tied_embedding_leaves_no_float_copy_once_its_linear_is_quantized_too() -> None:
    nodes = [
        helper.make_node("Transpose", ["head"], ["table"], perm=[1, 0]),
        GATHER,
        helper.make_node("MatMul", ["rows", "head"], ["logits"]),
    ]
    model = make(nodes, {"head": np.ascontiguousarray(TABLE.T)}, "logits", "rows")
    loaded = ir.from_proto(model)
    bounds = {"rows": Range(float(TABLE.min()), float(TABLE.max()))}
    quantize_linears(loaded, linear_sites(loaded), bounds, parse_scheme("a8w8"))
    assert len(quantize_tables(loaded, min_elements=1)) == 1
    result = ir.to_proto(loaded)
    assert max(numpy_helper.to_array(t).nbytes for t in result.graph.initializer) == ROWS * WIDTH
    for want, got in zip(run(model), run(result), strict=True):
        assert np.linalg.norm(want - got) < 0.05 * np.linalg.norm(want)
    assert [o.name for o in result.graph.output] == ["logits", "rows"]


def test_what_is_no_table_is_left_alone() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["columns"], axis=1),
        helper.make_node("Gather", ["vector", "ids"], ["scalars"]),
        helper.make_node("Gather", ["table", "fixed"], ["constant"]),
    ]
    constants = {
        "table": np.ones((4, ROWS), np.float32),
        "vector": np.ones(ROWS, np.float32),
        "fixed": np.array([1]),
    }
    loaded = ir.from_proto(make(nodes, constants, "columns", "scalars", "constant"))
    assert quantize_tables(loaded, min_elements=1) == []
    small = ir.from_proto(make([GATHER], {"table": TABLE}, "rows"))
    assert quantize_tables(small) == []


def test_a_spec_that_does_not_suit() -> None:
    loaded = ir.from_proto(make([GATHER], {"table": TABLE}, "rows"))
    with pytest.raises(ConfigError, match="does not suit a table"):
        quantize_tables(loaded, TensorSpec(signed=False, symmetric=False))
