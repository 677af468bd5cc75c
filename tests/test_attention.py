"""Attention in one operator: values keep their basis up to the output, queries and keys share one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import onnx_quarot as oq
from onnx_quarot.errors import ModelError
from onnx_quarot.plan import ROTATIONS, Plan
from test_legality import MS, Nodes, how, node, rand, save

HEADS, SIZE = 2, 8
WIDTH = HEADS * SIZE
ONNX = pytest.mark.skipif(onnx.defs.onnx_opset_version() < 23, reason="this onnx does not know Attention")


def build(path: Path, middle: Nodes, x: list[Any] | None = None, outputs: str = "y", **weights: np.ndarray) -> Path:
    """x [batch, length, width] -> q, k, v -> middle -> a -> y."""
    projections = [node("MatMul", f"x w{n}", n) for n in "qkv"]
    nodes = [*projections, *middle, node("MatMul", "a wo", "y")]
    read = {name for n in nodes for name in n.input}
    matrices = {f"w{n}": rand(WIDTH, WIDTH) for n in "qkvo" if f"w{n}" in read}
    kept = [n for n in nodes if n.output[0] in read or n.output[0] == "y"]
    return save(path, kept, x or [2, 5, WIDTH], outputs, 23, **matrices, **weights)


def decide(path: Path, *rotations: str) -> Plan:
    report = oq.rotate(path, path.with_suffix(".rotated.onnx"), rotations=rotations or ("R1", "R2", "R4"))
    assert report.plan is not None
    assert report.verification is not None
    assert report.verification.worst < 1e-4
    return report.plan


def multi_head(inputs: str = "q k v", **attributes: Any) -> Nodes:
    return [node("MultiHeadAttention", inputs, "a", MS, num_heads=HEADS, **attributes)]


def packed(inputs: str = "x wqkv bqkv", **attributes: Any) -> Nodes:
    return [node("Attention", inputs, "a", MS, num_heads=HEADS, **attributes)]


PACKED = {"wqkv": rand(WIDTH, 3 * WIDTH), "bqkv": rand(3 * WIDTH)}
SPLIT = [
    *[node("Reshape", f"{n} heads", f"{n}4") for n in "qkv"],
    *[node("Transpose", f"{n}4", f"{n}h", perm=[0, 2, 1, 3]) for n in "qkv"],
    node("Attention", "qh kh vh", "ah"),
    node("Transpose", "ah", "a4", perm=[0, 2, 1, 3]),
    node("Reshape", "a4 flat", "a"),
]
NO_BIAS = "Attention with its weights, no bias"
WHOLE = "Attention with its weights, and a mask that it alone takes"
SHAPES = {"heads": np.array([0, 0, HEADS, SIZE]), "flat": np.array([0, 0, -1])}
CASES: dict[str, tuple[Nodes, dict[str, np.ndarray]]] = {
    "MultiHeadAttention": (multi_head(), {}),
    "MultiHeadAttention with a bias": (multi_head("q k v b"), {"b": rand(3 * WIDTH)}),
    "Attention with its weights": (packed(), PACKED),
    NO_BIAS: (packed("x wqkv"), {"wqkv": PACKED["wqkv"]}),
    WHOLE: (packed("x wqkv bqkv ends"), {**PACKED, "ends": np.array([5, 4, 0, 1], np.int32)}),
}
ONNX_CASES: dict[str, tuple[Nodes, dict[str, np.ndarray]]] = {
    "Attention of three dimensions": (
        [node("Attention", "q k v", "a", q_num_heads=HEADS, kv_num_heads=HEADS)],
        {},
    ),
    "Attention of four dimensions": (SPLIT, SHAPES),
}


EVERY = [*CASES, *(pytest.param(case, marks=ONNX) for case in ONNX_CASES)]


def one(case: str, path: Path) -> Path:
    middle, weights = {**CASES, **ONNX_CASES}[case]
    return build(path, middle, **weights)


def runnable(case: str, path: Path) -> Path:
    """The model of a case; skipped where ONNX Runtime dies of it."""
    made = one(case, path)
    try:
        oq.session(made)
    except ModelError as error:
        if case != NO_BIAS or ort.__version__ not in str(error):
            raise
        pytest.skip(str(error))
    return made


@pytest.mark.parametrize("case", EVERY)
def test_values_are_rotated_for_free(case: str, tmp_path: Path) -> None:
    plan = decide(runnable(case, tmp_path / "m.onnx"))
    assert how(plan, "y") == "offline"
    assert list(plan.kinds.values()).count("R2") == 1
    assert len(plan.online) == 1  # the graph's input
    assert "R3" not in plan.kinds.values()


@pytest.mark.parametrize("case", EVERY)
def test_keys_and_queries_share_a_rotation(case: str, tmp_path: Path) -> None:
    plan = decide(runnable(case, tmp_path / "m.onnx"), *ROTATIONS)
    # Keys that are made inside the operator reach no cache and no quantizer: nothing is won by rotating them.
    assert list(plan.kinds.values()).count("R3") == (0 if case == WHOLE else 1)
    assert len(plan.online) == 1


def test_packed_queries_keys_and_values_are_left_alone(tmp_path: Path) -> None:
    """No CPU kernel takes them, so that there is nothing to run."""
    middle = [node("MatMul", "x p", "packed"), node("MultiHeadAttention", "packed", "a", MS, num_heads=HEADS)]
    plan = oq.discover(build(tmp_path / "m.onnx", middle, p=rand(WIDTH, 3 * WIDTH)))
    assert not {"R2", "R3"} & set(plan.kinds.values())


def test_constant_expressions_are_computed(tmp_path: Path) -> None:
    """A norm scale of the form 1 + w, as Gemma's exports have it, folds like any other."""
    scale = [node("Add", "g one", "g1"), node("SimplifiedLayerNormalization", "h g1", "m", axis=-1, epsilon=1e-5)]
    nodes = [node("MatMul", "x w1", "h"), *scale, node("MatMul", "m w2", "y")]
    weights = {"w1": rand(16, 32), "w2": rand(32, 8), "g": rand(32), "one": np.float32(1)}
    plan = decide(save(tmp_path / "m.onnx", nodes, [2, 3, 16], **weights))
    assert how(plan, "y") == "offline"


def test_a_skip_norm_that_is_read_elsewhere_is_taken_apart(tmp_path: Path) -> None:
    """The norm's output cannot be rotated, the sum it makes can."""
    skip = helper.make_node(
        "SkipSimplifiedLayerNormalization", ["h", "k", "g"], ["n", "", "", "s"], domain=MS, epsilon=1e-5
    )
    last = [node("Tanh", "n", "t"), node("MatMul", "t w3", "u"), node("MatMul", "s w2", "y")]
    nodes = [node("MatMul", "x w1", "h"), node("MatMul", "x w4", "k"), skip, *last]
    weights = {"w1": rand(16, 32), "w4": rand(16, 32), "w2": rand(32, 8), "w3": rand(32, 8), "g": rand(32)}
    plan = decide(save(tmp_path / "m.onnx", nodes, [2, 3, 16], "y u", **weights))
    assert how(plan, "y") in ("offline", "online")
