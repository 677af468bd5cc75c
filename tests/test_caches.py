"""Caches of decoders: who begins them decides whether they may change basis; how they are laid out does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from test_legality import how, node

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE


def heads(value: str, name: str) -> list[onnx.NodeProto]:
    return [node("Reshape", f"{value} split", f"{name}_r"), node("Transpose", f"{name}_r", name, perm=[0, 2, 1, 3])]


def attend(query: str, key: str, value: str, name: str) -> list[onnx.NodeProto]:
    """Queries, keys and values of heads to rows of all heads."""
    return [
        node("Transpose", key, f"{name}_kt", perm=[0, 1, 3, 2]), node("MatMul", f"{query} {name}_kt", f"{name}_s"),
        node("Softmax", f"{name}_s", f"{name}_p", axis=-1), node("MatMul", f"{name}_p {value}", f"{name}_v"),
        node("Transpose", f"{name}_v", f"{name}_t", perm=[0, 2, 1, 3]), node("Reshape", f"{name}_t join", f"{name}_o"),
    ]  # fmt: skip


def decoder(path: Path, *, cross: bool = False, packed: bool = False, mask: bool = False) -> Path:
    """One layer of attention behind a cache. cross: another one, to keys and values that come ready made. packed: keys
    and values are one cache. mask: a number a row of keys, as long as cache and tokens, is an input as well.
    """
    rng = np.random.default_rng(0)
    tensors = {w: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for w in ("wq", "wk", "wv", "wo", "wc", "wl")}
    tensors |= {"split": np.array([0, 0, HEADS, SIZE]), "join": np.array([0, 0, WIDTH])}
    tensors |= {"zero": np.array(0), "one": np.array(1), "first": np.array([0]), "rows": np.array([1, 2])}
    nodes = [n for w in "qkv" for n in (node("MatMul", f"x w{w}", f"{w}_x"), *heads(f"{w}_x", w))]
    shapes: dict[str, list[int | str]] = {"x": ["batch", "sequence", WIDTH]}
    if packed:
        shapes["past"] = [2, "rows", HEADS, "past", SIZE]
        nodes += [node("Gather", "past zero", "past.key"), node("Gather", "past one", "past.value")]
    else:
        shapes |= {f"past.{w}": ["batch", HEADS, "past", SIZE] for w in ("key", "value")}
    nodes += [
        node("Concat", "past.key k", "present.key", axis=2),
        node("Concat", "past.value v", "present.value", axis=2),
    ]
    score = attend("q", "present.key", "present.value", "self")
    if mask:
        shapes["mask"] = ["batch", "total"]
        nodes.append(node("Unsqueeze", "mask rows", "mask4"))
        score = [*score[:2], node("Add", "self_s mask4", "masked"), node("Softmax", "masked", "self_p"), *score[3:]]
    nodes += [*score, node("MatMul", "self_o wo", "y")]
    if cross:
        shapes |= {f"encoder.{w}": ["batch", HEADS, "encoded", SIZE] for w in ("key", "value")}
        nodes += [
            node("MatMul", "y wc", "c"), *heads("c", "ch"), *attend("ch", "encoder.key", "encoder.value", "other"),
            node("MatMul", "other_o wl", "z"),
        ]  # fmt: skip
    outputs = ["y", "z"][cross : cross + 1]
    if packed:
        nodes += [
            *(node("Unsqueeze", f"present.{w} first", f"made.{w}") for w in ("key", "value")),
            node("Concat", "made.key made.value", "present", axis=0),
        ]
        outputs.append("present")
    else:
        outputs += ["present.key", "present.value"]
    read = {name for n in nodes for name in n.input}
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in tensors.items() if name in read],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_cache_of_its_own_changes_basis_and_the_plan_says_so(tmp_path: Path) -> None:
    report = oq.rotate(decoder(tmp_path / "m.onnx"), tmp_path / "r.onnx")
    assert report.plan is not None
    assert [state.past for state in report.plan.states] == ["past.value"]
    assert any("'past.value' is in a new basis" in note for note in report.notes)


def test_caches_that_another_model_may_begin_keep_their_basis(tmp_path: Path) -> None:
    """The decoder of further tokens, of a pair: the first token's decoder writes the encoder's keys and values, and
    begins the other caches. Both are rotated, and follow each other as before.
    """
    source = decoder(tmp_path / "m.onnx", cross=True)
    report = oq.rotate(source, tmp_path / "r.onnx")
    assert report.plan is not None
    assert not report.plan.states
    assert {site.how for site in report.plan.sites} <= {"offline", "online"}
    assert any("'encoder.key' holds keys or values that this model never writes" in note for note in report.notes)
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((1, 1, WIDTH)).astype(np.float32)}
    for name, length in (("past.key", 5), ("past.value", 5), ("encoder.key", 7), ("encoder.value", 7)):
        feeds[name] = rng.standard_normal((1, HEADS, length, SIZE)).astype(np.float32)
    expected, found = (oq.session(path).run(None, feeds) for path in (source, tmp_path / "r.onnx"))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("mask", [False, True])
def test_a_cache_that_holds_keys_and_values_hides_no_width(mask: bool, tmp_path: Path) -> None:
    """As GPT-2 of ONNX Runtime's tools has it; the batch has a name of its own there, and so has the mask's length."""
    plan = oq.rotate(decoder(tmp_path / "m.onnx", packed=True, mask=mask), tmp_path / "r.onnx").plan
    assert plan is not None
    assert how(plan, "y") in ("offline", "online")
    assert len(plan.declined) == 0
