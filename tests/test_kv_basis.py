"""Bases of keys and values: exact in the graph, and better than a Hadamard matrix by what is promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import onnx_quarot as oq
import small_llama
from onnx_quarot.discovery.rope import unfuse_rope
from onnx_quarot.editing import GraphNames
from onnx_quarot.errors import ModelError
from onnx_quarot.kv_basis import balanced, balanced_together, value_path
from onnx_quarot.kv_cache import _caches, _turn_keys
from onnx_quarot.layers import compare_layers
from onnx_quarot.load import load
from onnx_quarot.provenance import fitted
from onnx_quarot.sensitivity import measure_sensitivity
from onnx_quarot.transform import hadamard_matrix

Array = np.ndarray[Any, Any]
LLAMA = small_llama.Config(layers=2, vocab=160)


def covariance(rng: np.random.Generator, size: int) -> Array:
    x = rng.standard_normal((4 * size, size)) * rng.lognormal(0, 1.5, size) @ rng.standard_normal((size, size))
    return x.T @ x


def cost(matrix: Array, rows: Array, readers: Array) -> float:
    back = np.linalg.inv(matrix)
    return float((np.diag(matrix.T @ rows @ matrix) * np.diag(back @ readers @ back.T)).sum())


@pytest.mark.parametrize("size", [8, 12, 64])
def test_the_cost_is_the_least_there_is(size: int) -> None:
    rng = np.random.default_rng(size)
    rows, readers = covariance(rng, size), covariance(rng, size)
    matrix = balanced(rows, readers)
    eigenvalues = np.maximum(np.linalg.eigvals(rows @ readers).real, 0)
    least = np.sqrt(eigenvalues).sum() ** 2 / size
    found = cost(matrix, rows, readers)
    assert least * (1 - 1e-6) < found < 1.2 * least  # but for the damping
    assert found < 0.7 * cost(hadamard_matrix(size), rows, readers)
    assert found < 0.7 * cost(np.eye(size), rows, readers)
    for _ in range(3):
        moved = matrix @ (np.eye(size) + 0.05 * rng.standard_normal((size, size)))
        assert cost(moved, rows, readers) > 0.99 * found


def test_a_head_that_is_loud_does_not_decide_for_all() -> None:
    rng = np.random.default_rng(0)
    rows, readers = (np.stack([covariance(rng, 8) for _ in range(2)]) for _ in range(2))
    louder = rows * np.array([1.0, 1e6])[:, None, None]
    quieter = readers * np.array([1.0, 1e-6])[:, None, None]
    np.testing.assert_allclose(
        balanced_together(louder, quieter), balanced_together(rows, readers), rtol=1e-6, atol=1e-9
    )


def test_features_that_are_always_zero() -> None:
    rows = np.zeros((8, 8))
    rows[0, 0] = 1.0
    for pair in ((rows, np.eye(8)), (np.zeros((8, 8)), np.eye(8)), (rows, np.zeros((8, 8)))):
        matrix = balanced(*pair)
        assert np.isfinite(matrix).all()
        np.testing.assert_allclose(matrix @ np.linalg.inv(matrix), np.eye(8), atol=1e-6)


def with_biases(path: Path) -> None:
    """A bias behind every matrix of queries, keys and values."""
    model = onnx.load(path)
    rng = np.random.default_rng(1)
    for node in [
        n for n in model.graph.node if n.name.endswith(("qkv_proj/MatMul", "_proj/MatMul")) and "attn" in n.name
    ]:
        if "o_proj" in node.name:
            continue
        weight = next(w for w in model.graph.initializer if w.name == node.input[1])
        bias = numpy_helper.from_array(rng.standard_normal(weight.dims[1]).astype(np.float32), f"{node.name}.bias")
        model.graph.initializer.append(bias)
        out = node.output[0]
        node.output[0] = f"{out}.plain"
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at + 1, helper.make_node("Add", [f"{out}.plain", bias.name], [out], f"{node.name}/Add"))
    onnx.save(model, path)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_keys_and_values_in_other_bases_leave_the_logits_alone(tmp_path: Path, separate: bool, biases: bool) -> None:
    config = small_llama.Config(layers=2, vocab=160, separate_qkv=separate)
    source = small_llama.save(tmp_path / "model.onnx", config)
    if biases:
        with_biases(source)
    model, rng, size = load(source), np.random.default_rng(0), LLAMA.head_size
    unfuse_rope(model)
    keys = rng.standard_normal((size, size))
    values = rng.standard_normal((LLAMA.kv_heads, size, size))
    names = GraphNames(model.graph)
    for cache in _caches(model):
        path = value_path(cache.node, size)
        assert path is not None
        assert len(path.writers) == 1 + biases
        path.fold(values)
        _turn_keys(model.graph, names, cache, keys)
    ir.save(model, tmp_path / "turned.onnx")
    feeds = small_llama.decoder_feeds(LLAMA, rng, 12)
    outputs = ["logits", "present.0.key", "present.0.value"]
    before, after = (oq.session(p).run(outputs, feeds) for p in (source, tmp_path / "turned.onnx"))
    np.testing.assert_allclose(after[0], before[0], atol=2e-3 * np.abs(before[0]).max())
    np.testing.assert_allclose(after[1], before[1] @ keys, atol=1e-3)
    np.testing.assert_allclose(after[2], before[2] @ values, atol=1e-3)


def test_what_reads_values() -> None:
    """Errors of a value head meet the rows of the matrix behind the attention that its group of heads has."""
    model = ir.from_proto(small_llama.build(LLAMA))
    unfuse_rope(model)
    attention = next(n for n in model.graph if n.op_type == "GroupQueryAttention")
    path = value_path(attention, LLAMA.head_size)
    assert path is not None
    matrix = model.graph.initializers["model.layers.0.attn.o_proj.MatMul.weight"].const_value.numpy()
    error = np.random.default_rng(0).standard_normal(LLAMA.head_size)
    parts = matrix.reshape(LLAMA.heads, LLAMA.head_size, -1)
    expected = sum(float(((error @ parts[h]) ** 2).sum()) for h in (2, 3))
    assert float(error @ path.readers(LLAMA.head_size)[1] @ error) == pytest.approx(expected, rel=1e-5)


def test_values_that_are_used_elsewhere_keep_their_basis(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "m.onnx", small_llama.Config(layers=2, vocab=160, separate_qkv=True))
    model = onnx.load(source)
    attentions = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    for node, seen in zip(attentions, (attentions[0].input[2], attentions[1].output[0]), strict=True):
        model.graph.output.append(onnx.ValueInfoProto(name=seen))
        assert seen in (*node.input, *node.output)
    onnx.save(model, source)
    loaded = load(source)
    unfuse_rope(loaded)
    assert [value_path(cache.node, LLAMA.head_size) for cache in _caches(loaded)] == [None, None]


@pytest.mark.parametrize("rotations", [None, ("R1", "R2"), ("R3",), ()], ids=str)
def test_rotations_say_what_may_be_fitted(tmp_path: Path, rotations: tuple[str, ...] | None) -> None:
    source = small_llama.save(tmp_path / "m.onnx", LLAMA)
    batches = [small_llama.decoder_feeds(LLAMA, np.random.default_rng(seed), 24) for seed in range(2)]
    oq.quantize(source, tmp_path / "q.onnx", batches, scheme="a8w8-block", kv_cache="int4", rotations=rotations)
    model = ir.load(tmp_path / "q.onnx")
    wanted = ("R1", "R2", "R3", "R4") if rotations is None else rotations
    turned = [n for n in model.graph if n.op_type == "MatMul" and str(n.name).endswith(".turned")]
    assert len(turned) == (2 * LLAMA.layers if "R3" in wanted else 0)
    layers = {f"/model/layers.{i}/attn/{n}/output_0" for i in range(2) for n in ("qkv_proj/MatMul", "o_proj/MatMul")}
    assert fitted(model) == (layers if "R2" in wanted else set())


def test_evaluation_leaves_layers_around_such_caches_apart(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "m.onnx", LLAMA)
    feeds = small_llama.decoder_feeds(LLAMA, np.random.default_rng(0), 24)
    oq.quantize(source, tmp_path / "q.onnx", [feeds], scheme="a8w8", kv_cache="int4", op_types=("MatMul",))
    found = measure_sensitivity(source, tmp_path / "q.onnx", feeds)
    assert not any("attn" in layer.name for layer in found.layers)
    assert len(found.layers) == 3 * LLAMA.layers + 1
    empty = np.zeros((1, LLAMA.kv_heads, 0, LLAMA.head_size // 2), np.uint8)
    packed = {name: empty if name.startswith("past") else value for name, value in feeds.items()}
    figures = {f.name: f for f in compare_layers(source, tmp_path / "q.onnx", (feeds, packed))}
    assert {name for name, f in figures.items() if f.output_sqnr is None} == {n for n in figures if "attn" in n}
    model = ir.load(tmp_path / "q.onnx")
    model.metadata_props["onnx_quarot.fitted"] = "{"
    with pytest.raises(ModelError, match=r"onnx_quarot\.fitted"):
        fitted(model)
