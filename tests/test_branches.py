"""An If whose branch is decided for every input becomes that branch; any other stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot.discovery.branches import resolve_branches
from onnx_quarot.discovery.shapes import Shapes
from onnx_quarot.load import load

node = helper.make_node
SIZES = {"one": [1], "two": [2], "three": [3], "64": [64]}


def branch(name: str, op_type: str, *inputs: str, **attributes: object) -> onnx.GraphProto:
    result = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
    inner = node(op_type, list(inputs), [f"{name}_out"], name=name, **attributes)
    return helper.make_graph([inner], name, [], [result])


def save(path: Path, condition: list[onnx.NodeProto], shape: list[object] | None = None, **more: object) -> Path:
    """x -> a linear layer -> If(condition): itself, else its negative -> a linear layer; ``z`` as long as x, or not."""
    rng = np.random.default_rng(0)
    branches = {"then_branch": branch("yes", "Identity", "h"), "else_branch": branch("no", "Neg", "h"), **more}
    nodes = [
        node("MatMul", ["x", "a"], ["h"]),
        *condition,
        node("If", ["c"], ["i"], name="choice", **branches),
        node("MatMul", ["i", "b"], ["m"]),
        node("Add", ["m", "z"], ["y"]),
    ]
    shape = shape or ["batch", "length", 16]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", "others", 1]),
    ]
    weights = {name: rng.standard_normal((16, 16)).astype(np.float32) for name in "ab"}
    weights |= {name: np.array(value, np.int64) for name, value in SIZES.items()}
    constants = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def size(value: str, axis: int) -> list[onnx.NodeProto]:
    """``<value><axis>``: one dimension of a value, as exporters ask for it."""
    name = f"{value}{axis}"
    index = numpy_helper.from_array(np.array([axis], np.int64))
    return [
        node("Shape", [value], [f"{name}_shape"]),
        node("Constant", [], [f"{name}_index"], value=index),
        node("Gather", [f"{name}_shape", f"{name}_index"], [name]),
    ]


def compared(op_type: str, a: str, b: str) -> list[onnx.NodeProto]:
    return [node(op_type, [a, b], ["c"])]


def negated(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    nodes[-1].output[0] = "d"
    return [*nodes, node("Not", ["d"], ["c"])]


twice = [*size("x", 1), *size("h", 1), node("Mul", ["x1", "two"], ["p"]), node("Add", ["h1", "h1"], ["q"])]
sliced = [
    node("Shape", ["h"], ["s"]),
    node("Slice", ["s", "two", "three"], ["t"]),
    node("Mod", ["t", "two"], ["r"]),
    node("Equal", ["r", "one"], ["c"]),
]
sized = [node("Shape", ["h"], ["s"]), node("Size", ["s"], ["r"])]
DECIDED = {
    "a fixed width": [*size("x", 2), *compared("Greater", "x2", "one")],
    "a fixed width of an inner value": sliced,
    "one length, twice": [*size("x", 1), *size("h", 1), *compared("Equal", "x1", "h1")],
    "one length, negated": negated([*size("x", 1), *size("h", 1), *compared("Equal", "x1", "h1")]),
    "expressions in a length": [*twice, *compared("Equal", "p", "q")],
    "a rank": [*sized, *compared("Less", "r", "64")],
    "constants": compared("Less", "one", "two"),
}
OPEN = {
    "a length against a number": [*size("x", 1), *compared("Less", "x1", "64")],
    "a length that is not the one seen": [*size("x", 1), *compared("Equal", "x1", "64")],
    "a number of elements": [node("Size", ["x"], ["r"]), *compared("Less", "r", "64")],
    "two lengths": [*size("x", 1), *size("z", 1), *compared("Equal", "x1", "z1")],
    "the values": [
        node("ReduceMax", ["x"], ["highest"], keepdims=0),
        node("Cast", ["highest"], ["c"], to=TensorProto.BOOL),
    ],
}


@pytest.mark.parametrize("case", DECIDED)
def test_decided(case: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", DECIDED[case])
    model = load(path)
    resolve_branches(model)
    assert not any(n.op_type == "If" for n in model.graph)
    plan = oq.rotate(path, tmp_path / "r.onnx").plan
    assert plan is not None
    assert not any("subgraphs" in note for note in plan.notes)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 16)).astype(np.float32)}
    feeds["z"] = feeds["x"][:, :, :1]
    before, after = (ort.InferenceSession(p).run(None, feeds)[0] for p in (path, tmp_path / "r.onnx"))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize("case", OPEN)
def test_open(case: str, tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", OPEN[case])
    model = load(path)
    resolve_branches(model)
    assert [n.name for n in model.graph if n.op_type == "If"] == ["choice"]
    assert "subgraphs (If, Loop, Scan) are left alone, with everything they read" in oq.discover(path).notes


def test_one_inside_another(tmp_path: Path) -> None:
    inner = {"then_branch": branch("yes", "Neg", "g"), "else_branch": branch("no", "Abs", "g")}
    outer = helper.make_graph(
        [
            node("Neg", ["h"], ["g"]),
            node("Equal", ["x2", "one"], ["e"]),
            node("If", ["e"], ["j"], name="inner", **inner),
        ],
        "outer",
        [],
        [helper.make_tensor_value_info("j", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([1], np.int64), "more")],
    )
    condition = [*size("x", 2), *compared("Greater", "x2", "one")]
    path = save(tmp_path / "m.onnx", condition, then_branch=outer, else_branch=branch("other", "Exp", "h"))
    model = load(path)
    resolve_branches(model)
    assert [n.op_type for n in model.graph if n.op_type in ("If", "Abs", "Neg", "Exp")] == ["Neg", "Abs"]
    assert oq.rotate(path, tmp_path / "r.onnx").verification is not None


def test_shapes_that_both_branches_agree_on(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", OPEN["a length against a number"])
    model = load(path)
    choice = next(n for n in model.graph if n.op_type == "If")
    assert Shapes(model).static[choice.outputs[0]] == (False, False, True)
    plan = oq.discover(path)
    assert plan.summary()["declined"] == 0  # the layer behind it is rotated online


def test_shapes_that_branches_do_not_agree_on(tmp_path: Path) -> None:
    shorter = branch("no", "Slice", "h", "one", "three", "one")
    path = save(tmp_path / "m.onnx", OPEN["two lengths"], else_branch=shorter)
    model = load(path)
    shapes = Shapes(model)
    choice = next(n for n in model.graph if n.op_type == "If")
    assert shapes.static[choice.outputs[0]] == (False, False, True)
    assert oq.rotate(path, tmp_path / "r.onnx").verification is not None
