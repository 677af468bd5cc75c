"""Batch normalization of rows goes into the layers beside it, exactly; any other is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_quarot as oq
from onnx_quarot.discovery.prepare import prepare, simplify
from onnx_quarot.load import load
from onnx_quarot.verify import random_feeds
from test_legality import Nodes, decide, how, i64, node, rand, save

WIDTH = 32
PARAMETERS = {"g": rand(WIDTH), "o": rand(WIDTH), "m": rand(WIDTH), "v": rand(WIDTH) ** 2 + 0.1}
NORM = "g o m v"


def norm(x: str, y: str, **attributes: object) -> onnx.NodeProto:
    return node("BatchNormalization", f"{x} {NORM}", y, **attributes)


IN_FRONT: dict[str, tuple[Nodes, dict[str, np.ndarray]]] = {
    "a product": ([node("MatMul", "h c", "k"), norm("k", "n")], {"c": rand(WIDTH, WIDTH)}),
    "a product, as rows": (
        [node("Reshape", "h s", "h3"), node("MatMul", "h3 c", "k3"), node("Reshape", "k3 f", "k"), norm("k", "n")],
        {"c": rand(WIDTH, WIDTH), "s": i64(3, 2, WIDTH), "f": i64(-1, WIDTH)},
    ),
    "a sum": ([node("MatMul", "h c", "j"), node("Add", "j e", "k"), norm("k", "n")],
              {"c": rand(WIDTH, WIDTH), "e": rand(WIDTH)}),
    "a matrix of columns": (
        [node("Gemm", "h c e", "k", transB=1, alpha=0.5, beta=2.0), norm("k", "n", epsilon=0.1)],
        {"c": rand(WIDTH, WIDTH), "e": rand(WIDTH)},
    ),
}  # fmt: skip
KEPT: dict[str, tuple[Nodes, dict[str, np.ndarray]]] = {
    "of channels": (
        [node("Reshape", "h s", "h3"), norm("h3", "n3"), node("Reshape", "n3 f", "n")],
        {"s": i64(-1, WIDTH, 1), "f": i64(-1, WIDTH)},
    ),
    "behind an activation": ([node("Tanh", "h", "k"), norm("k", "j"), node("Tanh", "j", "n")], {}),
    "of a matrix that is read elsewhere": (
        [node("MatMul", "h c", "k"), norm("k", "j"), node("Tanh", "j", "p"), node("MatMul", "p c", "n")],
        {"c": rand(WIDTH, WIDTH)},
    ),
}


def model(path: Path, middle: Nodes, weights: dict[str, np.ndarray]) -> Path:
    """x -> h -> middle -> n -> n + h -> y."""
    nodes = [node("MatMul", "x a", "h"), *middle, node("Add", "h n", "r"), node("MatMul", "r b", "y")]
    return save(path, nodes, [6, 16], a=rand(16, WIDTH), b=rand(WIDTH, 8), **PARAMETERS, **weights)


def norms(path: Path, *, rotated: bool) -> int:
    found = load(path)
    (prepare if rotated else simplify)(found)
    return sum(n.op_type == "BatchNormalization" for n in found.graph)


@pytest.mark.parametrize("case", IN_FRONT)
def test_the_layer_in_front_takes_it_in(case: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", *IN_FRONT[case])
    assert norms(path, rotated=False) == 0
    plan = decide(path)
    assert not any(site.how == "none" for site in plan.sites)
    assert how(plan, "y") == "offline"
    assert len(plan.online) == 1  # the input of the graph


def test_it_is_taken_in_without_rotation_too(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", *IN_FRONT["a product, as rows"])
    data = [random_feeds(oq.data.input_specs(load(path)))]
    oq.quantize(path, tmp_path / "q.onnx", data, rotations=(), method="minmax")
    (before,), (after,) = (oq.session(p).run(None, data[0]) for p in (path, tmp_path / "q.onnx"))
    assert np.abs(after - before).max() < 0.05 * np.abs(before).max()
    assert not any(n.op_type == "BatchNormalization" for n in load(tmp_path / "q.onnx").graph)


def test_layers_behind_take_it_in_where_it_reads_a_stream(tmp_path: Path) -> None:
    nodes = [norm("h", "k"), node("Gemm", "k c e", "n", transB=1)]
    path = model(tmp_path / "m.onnx", nodes, {"c": rand(WIDTH, WIDTH), "e": rand(WIDTH)})
    assert norms(path, rotated=False) == 1
    assert norms(path, rotated=True) == 0
    plan = decide(path)
    assert [how(plan, name) for name in "ny"] == ["offline", "offline"]
    assert len(plan.online) == 1


@pytest.mark.parametrize("case", KEPT)
def test_others_are_left_alone(case: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", *KEPT[case])
    assert norms(path, rotated=True) == 1
    decide(path)
