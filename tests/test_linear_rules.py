"""Linear layers with something inside, and where products are no layers: exact, and no more rotated than is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_quarot.load import load
from test_legality import MS, Nodes, decide, how, node, rand, save


@pytest.mark.parametrize(
    ("middle", "offline"),
    [
        ([node("AveragePool", "h", "m", kernel_shape=[2, 2])], True),
        ([node("GlobalAveragePool", "h", "m")], True),
        ([node("MaxPool", "h", "m", kernel_shape=[2, 2])], False),
        ([node("FusedConv", "h c", "m", MS, kernel_shape=[1, 1], activation="Relu")], False),
        ([node("FusedConv", "h c b h", "m", MS, kernel_shape=[1, 1], activation="Relu")], False),
        ([node("Conv", "h g", "m", group=8)], False),
    ],
    ids=["average", "global average", "maximum", "fused", "fused with a sum", "groups"],
)
def test_between_convolutions(middle: Nodes, offline: bool, tmp_path: Path) -> None:
    weights = {"a": rand(16, 8, 1, 1), "d": rand(4, 16, 1, 1)}
    read = {name for n in middle for name in n.input}
    weights |= {n: w for n, w in {"c": rand(16, 16, 1, 1), "b": rand(16), "g": rand(16, 2, 1, 1)}.items() if n in read}
    nodes = [node("Conv", "x a", "h"), *middle, node("Conv", "m d", "y")]
    plan = decide(save(tmp_path / "m.onnx", nodes, [2, 8, 6, 6], **weights))
    fused = next((s.how for s in plan.sites if s.name == "m"), None)
    # What does not preserve the channels costs one more online transform, or more than it is worth.
    assert how(plan, "y") == "offline" if offline else how(plan, "y") in ("online", "none")
    assert fused is None or fused in ("offline", "none")


def test_an_activation_inside_a_gemm_ends_the_basis_behind_it_only(tmp_path: Path) -> None:
    nodes = [
        node("Gemm", "x a", "h"),
        node("FusedGemm", "h c b", "m", MS, activation="Relu"),
        node("Gemm", "m d", "y"),
    ]
    weights = {"a": rand(16, 32), "c": rand(32, 32), "b": rand(32), "d": rand(32, 8)}
    plan = decide(save(tmp_path / "m.onnx", nodes, [5, 16], **weights))
    assert how(plan, "m") == "offline"
    assert how(plan, "y") == "online"


def test_a_vector_and_batches_that_change_places_are_no_layers(tmp_path: Path) -> None:
    vector = save(
        tmp_path / "v.onnx",
        [node("MatMul", "x a", "h"), node("MatMul", "h b", "y")],
        [2, 5, 16],
        a=rand(16, 32),
        b=rand(32),
    )
    assert {s.name for s in decide(vector).sites} == {"h"}
    batches = save(
        tmp_path / "b.onnx",
        [node("MatMul", "x a", "h"), node("FusedMatMul", "h b", "y", MS, transBatchA=1, transA=1)],
        [5, 2, 16],
        a=rand(16, 32),
        b=rand(2, 5, 8),
    )
    assert {s.name for s in decide(batches).sites} == {"h"}
    assert [n.op_type for n in load(batches).graph] == ["MatMul", "FusedMatMul"]


def test_the_c_of_a_gemm(tmp_path: Path) -> None:
    """One row, rows, one number, one number a row: the first two are rotated, the third is spread, the last is not."""
    for shape, how_last in (((32,), "offline"), ((5, 32), "offline"), ((1,), "offline"), ((5, 1), "offline")):
        nodes = [node("Gemm", "x a c", "h"), node("Gemm", "h b", "y")]
        path = save(tmp_path / "m.onnx", nodes, [5, 16], a=rand(16, 32), b=rand(32, 8), c=rand(*shape))
        assert how(decide(path), "y") == how_last, shape


def test_experts_chosen_from_a_table_are_no_keys(tmp_path: Path) -> None:
    """The router beside them is rotated where queries and keys were not asked for (R3)."""
    nodes = [
        node("MatMul", "x a", "h"),
        node("MatMul", "h r", "scores"),
        node("ArgMax", "scores", "chosen", axis=-1, keepdims=0),
        node("Gather", "experts chosen", "e", axis=0),
        node("Unsqueeze", "h ax", "h1"),
        node("MatMul", "h1 e", "y1"),
        node("Squeeze", "y1 ax", "y"),
    ]
    weights = {"a": rand(16, 32), "r": rand(32, 4), "experts": rand(4, 32, 8), "ax": np.array([1])}
    plan = decide(save(tmp_path / "m.onnx", nodes, [5, 16], **weights))
    assert how(plan, "scores") == "offline"
    assert len(plan.online) == 1  # the input of the graph
