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
    (site,) = linear_sites(loaded)
    bounds = {site.node_name: Range(float(TABLE.min()), float(TABLE.max()))}
    quantize_linears(loaded, [site], bounds, parse_scheme("a8w8"))
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


STACK = np.random.default_rng(1).standard_normal((6, 8, 16)).astype(np.float32)
PICKED = np.array([[1, 4, 5], [0, 1, 1]])
PICK = helper.make_node("GatherND", ["stack", "deep"], ["rows"], name="pick")
DEEPER = helper.make_node("Unsqueeze", ["ids", "last"], ["deep"])


def picked(*nodes: onnx.NodeProto, **more: Any) -> onnx.ModelProto:
    """Experts of three tokens in two sequences."""
    made = make([*nodes], {"stack": STACK, "last": np.array([-1]), **more}, "y")
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    return made


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("lookup", ["Gather", "GatherND"])
def test_matrices_of_experts_that_tokens_pick(lookup: str, vector: bool) -> None:
    """Results of products with matrices are scaled, those of a vector have no axis of rows' values left."""
    nodes = [helper.make_node("Gather", ["stack", "ids"], ["rows"])] if lookup == "Gather" else [DEEPER, PICK]
    x = np.random.default_rng(2).standard_normal(16 if vector else (2, 3, 16, 1)).astype(np.float32)
    model = picked(*nodes, helper.make_node("MatMul", ["rows", "x"], ["y"]), x=x)
    loaded = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    (report,) = quantize_tables(loaded, min_elements=1)
    assert (report.rows, report.width, report.quantized_bytes) == (48, 16, STACK.size)
    result = ir.to_proto(loaded)
    order = [node.op_type for node in result.graph.node]
    assert (order.index("Mul") < order.index("MatMul")) == vector
    steps = np.abs(STACK).max(-1, keepdims=True) / 127
    integers = np.rint(STACK / steps) * steps
    onnx.checker.check_model(result, full_check=True)
    session = ort.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"ids": PICKED})
    np.testing.assert_allclose(got, STACK[PICKED] @ x, atol=16 * np.abs(STACK).max() / 127)
    # Ranges of least squared error differ a little from these.
    assert np.abs(got - integers[PICKED] @ x).mean() < 0.05


@pytest.mark.parametrize("depth", [None, 3])
def test_matrices_picked_by_an_index_of_unknown_or_whole_depth_stay(depth: int | None) -> None:
    end = helper.make_node("ReduceMax", ["rows"], ["y"], keepdims=0)
    model = picked(PICK, end)
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("deep", TensorProto.INT64, ["n", depth or "d"]))
    assert quantize_tables(ir.from_proto(model), min_elements=1) == []
