"""Constant expressions are computed before discovery: small ones at once, weights when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnx_quarot as oq
from onnx_quarot.discovery.prepare import simplify
from onnx_quarot.load import load
from onnx_quarot.verify import random_feeds
from test_legality import Nodes, decide, how, i64, node, rand, save

WIDE = 320  # a square of it is a weight, not a parameter
HALF = rand(WIDE // 2, WIDE)
LARGE: dict[str, tuple[Nodes, dict[str, np.ndarray]]] = {
    "a factor": ([node("Mul", "w f", "c")], {"w": rand(WIDE, WIDE), "f": rand(WIDE)}),
    "a sum": ([node("Add", "w v", "c")], {"w": rand(WIDE, WIDE), "v": rand(WIDE, WIDE)}),
    "another shape": ([node("Reshape", "w s", "c")], {"w": rand(WIDE * WIDE), "s": i64(WIDE, -1)}),
    "halves": ([node("Concat", "w v", "c", axis=0)], {"w": HALF, "v": HALF + 1}),
    "one behind another": (
        [node("Transpose", "w", "t", perm=[1, 0]), node("Div", "t f", "q"), node("Reshape", "q s", "c")],
        {"w": rand(WIDE, WIDE), "f": np.float32(3), "s": i64(0, -1)},
    ),
    "a type that is wider": (
        [node("Cast", "w", "t", to=1), node("Cast", "v", "u", to=1), node("Add", "t u", "c")],
        {"w": rand(WIDE, WIDE).astype(np.float16), "v": rand(WIDE, WIDE).astype(np.float16)},
    ),
}
KEPT: dict[str, tuple[Nodes, dict[str, np.ndarray]]] = {
    "larger than what it is made of": (
        [node("Add", "w v", "c")],
        {"w": rand(WIDE, 1), "v": rand(1, WIDE)},
    ),
    "read elsewhere too": (
        [node("Mul", "w f", "c"), node("MatMul", "x2 w", "other")],
        {"w": rand(WIDE, WIDE), "f": rand(WIDE)},
    ),
}


def model(path: Path, middle: Nodes, weights: dict[str, np.ndarray]) -> Path:
    nodes = [node("MatMul", "x a", "h"), *middle, node("Tanh", "h", "x2"), node("MatMul", "x2 c", "m")]
    nodes.sort(key=lambda n: n.op_type == "MatMul" and n.input[0] == "x2")
    outputs = "y other" if any(n.output[0] == "other" for n in middle) else "y"
    last = node("MatMul", "m b", "y")
    return save(path, [*nodes, last], [3, 16], outputs, a=rand(16, WIDE), b=rand(WIDE, 8), **weights)


@pytest.mark.parametrize("case", LARGE)
def test_weights_are_computed_when_they_are_read(case: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", *LARGE[case])
    found = load(path)
    assert simplify(found)
    assert sorted(n.op_type for n in found.graph) == ["MatMul", "MatMul", "MatMul", "Tanh"]
    assert isinstance(found.graph.initializers["c"].const_value, ir.LazyTensor)
    assert sorted(found.graph.initializers) == ["a", "b", "c"]
    plan = decide(path)
    assert [how(plan, name) for name in ("m", "y")] == ["online", "offline"]


@pytest.mark.parametrize("case", KEPT)
def test_what_would_take_more_room_is_left_alone(case: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", *KEPT[case])
    assert not simplify(load(path))
    decide(path)


def test_computed_weights_are_quantized(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", *LARGE["a factor"])
    data = [random_feeds(oq.data.input_specs(load(path)))]
    report = oq.quantize(path, tmp_path / "q.onnx", data, rotations=())
    assert {layer.node_name for layer in report.quantized} == {"h", "m", "y"}


def test_small_constants_keep_the_type_of_what_is_seen(tmp_path: Path) -> None:
    """A Cast is a view: what is computed from it has its type, not that of the file."""
    scale = [node("Cast", "g", "g32", to=1), node("Add", "g32 g32", "f"), node("Mul", "h f", "m")]
    nodes = [node("MatMul", "x a", "h"), *scale, node("MatMul", "m b", "y")]
    path = save(tmp_path / "m.onnx", nodes, [3, 16], a=rand(16, 32), b=rand(32, 8), g=rand(32).astype(np.float16))
    found = load(path)
    simplify(found)
    assert found.graph.initializers["f"].dtype == ir.DataType.FLOAT
    decide(path)
