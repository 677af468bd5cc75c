from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_quarot as oq
from onnx_quarot.load import load
from onnx_quarot.routers import routers
from onnx_quarot.sites import linear_sites

_HEAD = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[n, 16] x) => (float[n, 8] y)
<float[16, 16] a, float[16, 4] r, float[16, 8] b, float[4] bias, float[4, 16, 16] w, float[4, 16, 16] v, int64[1] two,
 int64[1] last, int64[1] one, int64[2] flat, int64[1] zero, int64 four, float[2] off_on, float floor = {-1.0}> {
  h = MatMul(x, a)
"""
_TAIL = """
  y = MatMul(s, b)
}"""
GRAPHS = {
    "the operator for experts": """
  p = MatMul(h, r)
  s = com.microsoft.MoE <k = 2, activation_type = "relu"> (h, p, w, , v)""",
    "with a bias": """
  logits = MatMul(h, r)
  p = Add(logits, bias)
  s = com.microsoft.MoE <k = 2, activation_type = "relu"> (h, p, w, , v)""",
    "matrices picked by their numbers": """
  p = MatMul(h, r)
  share = Softmax <axis = -1> (p)
  top, ids = TopK (share, two)
  picked = Gather <axis = 0> (w, ids)
  rows = Unsqueeze(h, flat)
  made = MatMul(rows, picked)
  s = ReduceSum <keepdims = 0> (made, flat)""",
    "chosen by scores with a bias, of the better half": """
  p = MatMul(h, r)
  score = Sigmoid(p)
  biased = Add(score, bias)
  best, where = TopK (biased, two)
  least = ReduceMin <keepdims = 1> (best, last)
  enough = GreaterOrEqual(biased, least)
  masked = Where(enough, biased, floor)
  top, ids = TopK (masked, two)
  column = Unsqueeze(ids, last)
  picked = GatherND(w, column)
  rows = Unsqueeze(h, flat)
  made = MatMul(rows, picked)
  s = ReduceSum <keepdims = 0> (made, flat)""",
    "the best, and the best of the others": """
  p = MatMul(h, r)
  best = ArgMax <axis = -1, keepdims = 1> (p)
  low = Neg(p)
  taken = GatherElements <axis = 1> (low, best)
  without = ScatterElements <axis = 1> (p, best, taken)
  top, next = TopK (without, one)
  ids = Concat <axis = -1> (best, next)
  picked = Gather <axis = 0> (w, ids)
  rows = Unsqueeze(h, flat)
  made = MatMul(rows, picked)
  s = ReduceSum <keepdims = 0> (made, flat)""",
    "layers of the rows that chose them": """
  p = MatMul(h, r)
  top, ids = TopK (p, two)
  each = OneHot <axis = -1> (ids, four, off_on)
  by_expert = Transpose <perm = [2, 1, 0]> (each)
  its = Gather <axis = 0> (by_expert, last)
  chosen = NonZero(its)
  expert, place, row = Split <axis = 0, num_outputs = 3> (chosen)
  number = Squeeze(row, zero)
  rows = Gather <axis = 0> (h, number)
  made = MatMul(rows, a)
  column = Unsqueeze(number, last)
  s = ScatterND <reduction = "add"> (h, column, made)""",
}
OTHERS = {
    "the best rows of a table": """
  p = MatMul(h, r)
  top, ids = TopK (p, two)
  picked = Gather <axis = 0> (b2, ids)
  s = ReduceSum <keepdims = 0> (picked, two)""",
    "a constant choice": """
  s = Add(h, h)""",
}


def model(body: str) -> ir.Model:
    text = (_HEAD + body + _TAIL).replace("float[4] bias,", "float[4] bias, float[4, 16] b2,")
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.name = "router" if node.input[-1] == "r" else node.output[0]
    values: dict[str, np.ndarray] = {
        "two": np.array([2]),
        "one": np.array([1]),
        "last": np.array([-1]),
        "flat": np.array([1, 2]),
        "floor": np.array(-1.0, np.float32),
        "zero": np.array([0]),
        "four": np.array(4),
        "off_on": np.array([0.0, 1.0], np.float32),
    }
    rng = np.random.default_rng(0)
    given = {name for node in proto.graph.node for name in node.input}
    del proto.graph.initializer[:]
    shapes = {"a": (16, 16), "r": (16, 4), "b": (16, 8), "bias": 4, "w": (4, 16, 16), "v": (4, 16, 16), "b2": (4, 16)}
    values |= {name: rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in values.items() if n in given)
    return ir.from_proto(proto)


@pytest.mark.parametrize("body", GRAPHS.values(), ids=GRAPHS)
def test_what_chooses_experts_is_a_router(body: str) -> None:
    graph = model(body)
    assert routers(graph, linear_sites(graph)) == {"router"}


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_what_chooses_anything_else_is_none(body: str) -> None:
    graph = model(body)
    assert routers(graph, linear_sites(graph)) == set()


@pytest.mark.parametrize("body", GRAPHS.values(), ids=GRAPHS)
def test_routers_stay_in_floating_point_unless_they_are_named(tmp_path: Path, body: str) -> None:
    ir.save(model(body), tmp_path / "m.onnx")
    data = [{"x": np.random.default_rng(1).standard_normal((200, 16)).astype(np.float32)}]
    for layers, count in (({}, 0), ({"router": "a8w8"}, 1)):
        report = oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", data, layers=layers)
        assert [part.node_name for part in report.quantized].count("router") == count
        assert any("the router of experts 'router' stayed" in note for note in report.notes) == (not count)
        assert len(load(tmp_path / "q.onnx").graph) > 0
        oq.session(tmp_path / "q.onnx").run(None, data[0])


def test_a_router_that_is_left_out_hides_no_other_layer() -> None:
    graph = model(GRAPHS["with a bias"])
    sites = linear_sites(graph, exclude=["router"])
    assert routers(graph, sites) == set()
