"""LayerNorms with their products multiplied out are put together again, and rotated like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_quarot.discovery.prepare import prepare
from onnx_quarot.load import load
from test_legality import Nodes, decide, how, node, rand, save

MEAN: Nodes = [node("ReduceMean", "h", "m", axes=[-1], keepdims=1)]
VARIANCE: Nodes = [
    node("Sub", "h m", "d"),
    node("Mul", "d d", "dd"),
    node("ReduceMean", "dd", "v", axes=[-1], keepdims=1),
]
SCALE: Nodes = [
    node("Add", "v epsilon", "e"),
    node("Sqrt", "e", "deviation"),
    node("Reciprocal", "deviation", "i"),
    node("Mul", "i g", "s"),
]
SUMS: dict[str, Nodes] = {
    "TensorFlow": [
        node("Mul", "h s", "hs"),
        node("Mul", "m s", "ms"),
        node("Sub", "b ms", "o"),
        node("Add", "hs o", "y"),
    ],
    "Keras": [
        node("Neg", "m", "n"),
        node("Mul", "n s", "ns"),
        node("Add", "ns b", "o"),
        node("Mul", "h s", "hs"),
        node("Add", "hs o", "y"),
    ],
    "without an offset": [node("Mul", "s h", "hs"), node("Mul", "s m", "ms"), node("Sub", "hs ms", "y")],
    "Flax": [node("Sub", "h m", "d2"), node("Mul", "d2 s", "ds"), node("Add", "ds b", "y")],
}
VARIANCES: dict[str, Nodes] = {
    "of differences": VARIANCE,
    "of differences the other way": [node("Sub", "m h", "d"), *VARIANCE[1:]],
    "of squares": [
        node("Mul", "h h", "hh"),
        node("ReduceMean", "hh", "q", axes=[-1], keepdims=1),
        node("Mul", "m m", "mm"),
        node("Sub", "q mm", "v0"),
        node("Relu", "v0", "v"),
    ],
}
OTHERS: dict[str, Nodes] = {
    "an offset that is subtracted": [
        node("Mul", "h s", "hs"),
        node("Mul", "m s", "ms"),
        node("Add", "ms b", "o"),
        node("Sub", "hs o", "y"),
    ],
    "the sum of both": [node("Mul", "h s", "hs"), node("Mul", "m s", "ms"), node("Add", "hs ms", "y")],
    "another scale": [
        node("Mul", "h s", "hs"),
        node("Mul", "m i", "mi"),
        node("Sub", "hs mi", "y"),
    ],
    "read elsewhere too": [
        node("Mul", "h s", "hs"),
        node("Mul", "m s", "ms"),
        node("Sub", "hs ms", "y0"),
        node("Add", "y0 ms", "y"),
    ],
}


def model(path: Path, middle: Nodes, x: list[int] | None = None, opset: int = 17) -> Path:
    nodes = [node("MatMul", "x a", "h"), *middle, node("MatMul", "y c", "p"), node("Add", "p k", "z")]
    weights = {"a": rand(16, 32), "c": rand(32, 8), "k": rand(8), "g": 1 + rand(32), "b": rand(32)}
    read = {name for n in nodes for name in n.input}
    used = {name: value for name, value in weights.items() if name in read}
    return save(path, nodes, x or [3, 16], "z", opset, epsilon=np.float32(1e-5), **used)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("form", SUMS)
def test_norms_are_put_together(form: str, variance: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", [*MEAN, *VARIANCES[variance], *SCALE, *SUMS[form]])
    assert how(decide(path), "p") == "offline"


def test_a_prepared_graph_stays_as_it_is(tmp_path: Path) -> None:
    for form, variance in zip(SUMS, [*VARIANCES, *VARIANCES], strict=False):
        found = load(model(tmp_path / "m.onnx", [*MEAN, *VARIANCES[variance], *SCALE, *SUMS[form]]))
        prepare(found)
        before = [(n.op_type, [v.name for v in n.inputs if v is not None]) for n in found.graph]
        prepare(found)
        assert [(n.op_type, [v.name for v in n.inputs if v is not None]) for n in found.graph] == before


def test_pools_of_rows_are_means(tmp_path: Path) -> None:
    """As tf2onnx has them: of three axes the pool takes the middle one for channels."""
    middle = [*MEAN, *VARIANCE, *SCALE, *SUMS["Keras"]]
    pooled = [node("GlobalAveragePool", n.input[0], n.output[0]) if n.op_type == "ReduceMean" else n for n in middle]
    for opset in (17, 21):
        assert how(decide(model(tmp_path / "m.onnx", pooled, [2, 3, 16], opset)), "p") == "offline"


def test_pools_of_pictures_stay(tmp_path: Path) -> None:
    nodes = [node("GlobalAveragePool", "x", "m"), node("Sub", "x m", "d"), node("Mul", "d d", "y")]
    found = load(save(tmp_path / "m.onnx", nodes, [2, 3, 4, 4]))
    prepare(found)
    assert [n.op_type for n in found.graph] == ["GlobalAveragePool", "Sub", "Mul"]


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_no_norm_is_left_alone(form: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", [*MEAN, *VARIANCE, *SCALE, *OTHERS[form]])
    plan = decide(path)
    assert how(plan, "p") == "online"


def test_a_mean_that_is_an_output_stays(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x a", "h"), *MEAN, *VARIANCE, *SCALE, *SUMS["TensorFlow"], node("MatMul", "y c", "z")]
    weights = {"a": rand(16, 32), "c": rand(32, 8), "g": 1 + rand(32), "b": rand(32)}
    plan = decide(save(tmp_path / "m.onnx", nodes, [3, 16], "z m", 17, epsilon=np.float32(1e-5), **weights))
    assert how(plan, "z") == "online"
