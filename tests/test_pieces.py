"""Weights that are cut into pieces at run time are linear layers all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_quarot as oq
from onnx_quarot.discovery.prepare import simplify
from onnx_quarot.load import load
from test_legality import Nodes, i64, node, rand, save

WIDTH = 32
SLICES = [
    node("Slice", "w zero one axis", "wq"),
    node("Slice", "w one two axis", "wk"),
    node("Slice", "b zero one axis", "bq"),
    node("Slice", "b one two axis", "bk"),
]
STACKED = [node("Gather", f"{w} {i}", f"{w}{p}") for w in "wb" for i, p in (("first", "q"), ("second", "k"))]
WIDTHS = [  # as torch's older exporter has it: the bounds are worked out of the width of the rows
    node("Shape", "x", "shape"),
    node("Gather", "shape last", "width"),
    node("Add", "width width", "twice"),
    node("Slice", "w zero width axis", "wq"),
    node("Slice", "w width twice axis", "wk"),
    *SLICES[2:],
]
SPLITS = [node("Split", "w sizes", "wq wk"), node("Split", "b sizes", "bq bk")]


def model(path: Path, cuts: Nodes, more: Nodes = ()) -> Path:
    """Queries are made of x and keys of x's rows turned round, with halves of one matrix, as cross-attention does."""
    nodes = [
        *cuts,
        node("Transpose", "wq", "wqt", perm=[1, 0]),
        node("Transpose", "wk", "wkt", perm=[1, 0]),
        node("MatMul", "x wqt", "q0"),
        node("Add", "q0 bq", "q"),
        node("Tanh", "x", "t"),
        node("MatMul", "t wkt", "k0"),
        node("Add", "k0 bk", "k"),
        node("Add", "q k", "s"),
        node("MatMul", "s v", "y"),
        *more,
    ]
    stacked = cuts is STACKED
    weights = (
        {"w": rand(2, WIDTH, WIDTH), "b": rand(2, WIDTH)}
        if stacked
        else {"w": rand(2 * WIDTH, WIDTH), "b": rand(2 * WIDTH)}
    )
    weights |= {"first": np.array(0), "second": np.array(-1)}
    bounds = {"zero": i64(0), "one": i64(WIDTH), "two": i64(2 * WIDTH), "axis": i64(0), "sizes": i64(WIDTH, WIDTH)}
    bounds["last"] = i64(1)
    return save(path, nodes, [6, WIDTH], v=rand(WIDTH, 8), **weights, **bounds)


@pytest.mark.parametrize("cuts", [SLICES, WIDTHS, SPLITS, STACKED], ids=["Slice", "Slice by width", "Split", "Gather"])
@pytest.mark.parametrize("rotations", [None, ()], ids=["rotated", "as it is"])
def test_pieces_of_a_matrix_are_layers(tmp_path: Path, cuts: Nodes, rotations: tuple[str, ...] | None) -> None:
    source, target = model(tmp_path / "m.onnx", cuts), tmp_path / "q.onnx"
    data = [{"x": np.random.default_rng(i).standard_normal((6, WIDTH)).astype(np.float32)} for i in range(4)]
    report = oq.quantize(source, target, data, scheme="a8w8-dynamic", rotations=rotations)
    assert len(report.quantized) == 3
    assert rotations == () or not report.plan.declined
    expected, found = (oq.session(p).run(None, data[0])[0] for p in (source, target))
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert not {n.op_type for n in onnx.load(target).graph.node} & {"Gather", "Split", "Slice"}


def test_a_matrix_that_is_read_whole_too_or_whose_pieces_overlap_is_not_cut(tmp_path: Path) -> None:
    read = model(tmp_path / "read.onnx", SPLITS, [node("Identity", "w", "w2"), node("ReduceSum", "w2", "z")])
    overlap = [node("Slice", "w zero two axis", "wa"), node("Slice", "wa zero one axis", "wq"), *SLICES[1:]]
    for path in (read, model(tmp_path / "overlap.onnx", overlap)):
        found = load(path)
        simplify(found)
        assert "w" in found.graph.initializers
