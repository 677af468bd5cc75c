"""Faults known of AMD Quark's ONNX QuaRot: each has a graph here on which ours is right.

Faults that need a LayerNorm are tested with the other LayerNorm graphs; here are those of names, transposition, biases,
sharing and seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq

N, VOCAB, FFN = 16, 24, 20
CONFIG = {
    "R1_pairs": [
        {"prev_nodes": ["table"], "norm_node": "norm1", "next_nodes": ["up"]},
        {"prev_nodes": ["down"], "norm_node": "norm2", "next_nodes": ["head"]},
    ]
}


class Graph:
    """table -> norm1 -> up -> Relu -> down -> add -> norm2 -> head, on [batch, seq, 16], with hostile names."""

    def __init__(self, rank: int = 3) -> None:
        self.rng = np.random.default_rng(3)
        self.rank = rank
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, *shape: int) -> str:
        self.weights.append(numpy_helper.from_array(self.rng.standard_normal(shape).astype(np.float32), name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def norm(self, x: str, name: str) -> str:
        scale = self.constant(f"{name}.g", N)
        return self.node("SimplifiedLayerNormalization", [x, scale], name, epsilon=1e-5, axis=-1, stash_type=1)

    def save(self, path: Path, output: str) -> Path:
        dims = ["batch", "seq"][: self.rank - 1]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, dims)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path


def proven(source: Path, config: Any = None, **options: Any) -> oq.Report:
    """Rotate with the config and by discovery; both must be exact. Returns the report of the first."""
    folder = source.parent
    path = None
    if config is not None:
        path = folder / "rotation_config.json"
        path.write_text(json.dumps(config))
    report = oq.rotate(source, folder / "by_config.onnx", config=path, rotations=("R1",), **options)
    found = oq.rotate(source, folder / "discovered.onnx", rotations=("R1",), **options)
    ids = {"ids": np.random.default_rng(0).integers(0, VOCAB, (2, 5))}
    if len(oq.session(source).get_inputs()[0].shape) == 1:
        ids = {"ids": ids["ids"][0]}
    (expected,) = oq.session(source).run(None, ids)
    for name, done in (("by_config", report), ("discovered", found)):
        assert done.plan is not None
        assert "R1" in done.plan.kinds.values()
        (y,) = oq.session(folder / f"{name}.onnx").run(None, ids)
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    return report


@pytest.mark.parametrize("bias_first", [False, True])
def test_names_mean_nothing_and_separate_biases_are_rotated(tmp_path: Path, bias_first: bool) -> None:
    g = Graph()
    x = g.node("Gather", [g.constant("a", VOCAB, N), "ids"], "table")
    h = g.norm(x, "norm1")
    up = g.node("MatMul", [h, g.constant("not_a_w.bias", N, FFN)], "up")  # no "weight" in it
    act = g.node("Relu", [g.node("Add", [up, g.constant("weight", FFN)], "up_bias")], "relu")
    down = g.node("MatMul", [act, g.constant("weight.weight", FFN, N)], "down")
    bias = g.constant("b2", N)
    y = g.node("Add", [bias, down] if bias_first else [down, bias], "down_bias")
    x = g.node("Add", [x, y], "residual")
    out = g.node("MatMul", [g.norm(x, "norm2"), g.constant("h", N, VOCAB)], "head")
    source = g.save(tmp_path / "m.onnx", out)
    proven(source, CONFIG, seed=4)
    # A MatMul on [batch, seq, n] stays one: Gemm takes matrices only.
    written = [n.op_type for n in onnx.load(tmp_path / "by_config.onnx").graph.node]
    assert written.count("MatMul") == 3
    assert "Gemm" not in written


def test_the_names_a_config_uses_outlive_every_pass(tmp_path: Path) -> None:
    """What is written answers to the config that it was made with."""
    g = Graph()
    x = g.node("Gather", [g.constant("a", VOCAB, N), "ids"], "table")
    same = g.node("Identity", [g.norm(x, "norm1")], "same")  # what an optimizer takes out
    up = g.node("MatMul", [same, g.node("Identity", [g.constant("w1", N, FFN)], "view")], "up")
    down = g.node("MatMul", [g.node("Relu", [up], "relu"), g.constant("w2", FFN, N)], "down")
    x = g.node("Add", [x, down], "residual")
    out = g.node("MatMul", [g.norm(x, "norm2"), g.constant("h", N, VOCAB)], "head")
    proven(g.save(tmp_path / "m.onnx", out), CONFIG, seed=4)
    names = {n.name for n in onnx.load(tmp_path / "by_config.onnx").graph.node}
    assert {"table", "norm1", "up", "down", "norm2", "head"} <= names
    again = tmp_path / "again.onnx"
    (tmp_path / "by_config.onnx").rename(again)
    proven(again, CONFIG, seed=5)


@pytest.mark.parametrize("transpose", [0, 1])
def test_gemm_is_read_from_its_own_attributes(tmp_path: Path, transpose: int) -> None:
    """transB says how B lies, alpha and beta are factors and nothing else; their defaults are 0, 1 and 1."""

    def lies(rows: int, columns: int) -> tuple[int, int]:
        return (columns, rows) if transpose else (rows, columns)

    g = Graph(rank=2)
    attributes = {"transB": 1} if transpose else {}
    x = g.node("Gather", [g.constant("a", VOCAB, N), "ids"], "table")
    h = g.norm(x, "norm1")
    up = g.node("Gemm", [h, g.constant("w1", *lies(N, N)), g.constant("c1", N)], "up", beta=0.5, **attributes)
    down = g.node(
        "Gemm",
        [g.node("Relu", [up], "relu"), g.constant("w2", *lies(N, N)), g.constant("c2", N)],
        "down",
        alpha=2.0,
        beta=0.0 if transpose else 3.0,
        **attributes,
    )
    x = g.node("Add", [x, down], "residual")
    out = g.node("Gemm", [g.norm(x, "norm2"), g.constant("h", *lies(N, VOCAB))], "head", **attributes)
    proven(g.save(tmp_path / "m.onnx", out), CONFIG, seed=4)


def test_a_weight_used_twice_is_transformed_once(tmp_path: Path) -> None:
    """Two readers of one matrix, and a square matrix that reads in one place and writes in another."""
    g = Graph()
    x = g.node("Gather", [g.constant("a", VOCAB, N), "ids"], "table")
    h = g.norm(x, "norm1")
    shared = g.constant("shared", N, N)
    up = g.node("MatMul", [h, shared], "up")
    again = g.node("MatMul", [h, shared], "up2")
    act = g.node("Relu", [g.node("Add", [up, again], "sum")], "relu")
    down = g.node("MatMul", [act, shared], "down")
    x = g.node("Add", [x, down], "residual")
    out = g.node("MatMul", [g.norm(x, "norm2"), g.constant("h", N, VOCAB)], "head")
    config = json.loads(json.dumps(CONFIG))
    config["R1_pairs"][0]["next_nodes"].append("up2")
    proven(g.save(tmp_path / "m.onnx", out), config, seed=4)


def test_a_tied_embedding_stays_right(tmp_path: Path) -> None:
    g = Graph()
    head = g.constant("tied", N, VOCAB)
    x = g.node("Gather", [g.node("Transpose", [head], "turned", perm=[1, 0]), "ids"], "table")
    h = g.norm(x, "norm1")
    act = g.node("Relu", [g.node("MatMul", [h, g.constant("w1", N, FFN)], "up")], "relu")
    x = g.node("Add", [x, g.node("MatMul", [act, g.constant("w2", FFN, N)], "down")], "residual")
    out = g.node("MatMul", [g.norm(x, "norm2"), head], "head")
    proven(g.save(tmp_path / "m.onnx", out), CONFIG, seed=4)


def test_a_seed_reproduces_every_byte_and_another_does_not(tmp_path: Path) -> None:
    g = Graph()
    x = g.node("Gather", [g.constant("a", VOCAB, N), "ids"], "table")
    act = g.node("Relu", [g.node("MatMul", [g.norm(x, "norm1"), g.constant("w1", N, FFN)], "up")], "relu")
    x = g.node("Add", [x, g.node("MatMul", [act, g.constant("w2", FFN, N)], "down")], "residual")
    out = g.node("MatMul", [g.norm(x, "norm2"), g.constant("h", N, VOCAB)], "head")
    source = g.save(tmp_path / "m.onnx", out)
    results = []
    for number, seed in enumerate((7, 7, 8)):
        oq.rotate(source, tmp_path / f"{number}.onnx", seed=seed)
        results.append((tmp_path / f"{number}.onnx").read_bytes())
    assert results[0] == results[1]
    assert results[0] != results[2]
