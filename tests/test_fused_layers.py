"""Layers inside ONNX Runtime's fused operators: found, rotated and quantized like those outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from exports import RUNTIME
from onnx_quarot.data import input_specs
from onnx_quarot.layers import compare_layers
from onnx_quarot.sensitivity import measure_sensitivity
from test_legality import MS, Nodes, node

HEADS, SIZE = 2, 16
WIDTH = HEADS * SIZE
RNG = np.random.default_rng(0)
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32
Inputs = dict[str, tuple[int, list[Any], np.ndarray]]


def rand(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)


def attention(inputs: str, outputs: str = "a", **attributes: Any) -> Nodes:
    return [node("Attention", inputs, outputs, MS, num_heads=HEADS, **attributes)]


X: Inputs = {"x": (FLOAT, ["batch", "length", WIDTH], RNG.standard_normal((2, 5, WIDTH)).astype(np.float32))}
PAST: Inputs = {
    "past": (FLOAT, [2, "batch", HEADS, "past", SIZE], RNG.standard_normal((2, 2, HEADS, 3, SIZE)).astype(np.float32))
}
MANY: Inputs = {"past": (FLOAT, [2, "batch", 4, "past", SIZE], RNG.standard_normal((2, 2, 4, 3, SIZE)).astype("f4"))}
MASK: Inputs = {"m": (INT32, ["batch", "total"], np.array([[1, 1, 1, 1, 0], [1] * 5], np.int32))}
WHOLE: Inputs = {"m": (INT32, ["batch", "total"], np.ones((2, 8), np.int32))}
ENDS: Inputs = {"m": (INT32, ["batch"], np.array([4, 5], np.int32))}
WEIGHTS = {"w": rand(WIDTH, 3 * WIDTH), "b": rand(3 * WIDTH), "wo": rand(WIDTH, 8)}
WIDE = {"w": rand(WIDTH, 3 * 4 * SIZE), "b": rand(3 * 4 * SIZE), "wo": rand(4 * SIZE, 8)}
NARROW = {**WEIGHTS, "w": rand(WIDTH, 2 * WIDTH + 2 * 8), "b": rand(2 * WIDTH + 2 * 8), "wo": rand(16, 8)}
# Each case: nodes from x to "a", inputs besides x, constants, outputs besides y.
Case = tuple[Nodes, Inputs, dict[str, np.ndarray], str]
CASES: dict[str, Case] = {
    "attention": (attention("x w b"), {}, WEIGHTS, ""),
    "attention without a bias": (attention("x w"), {}, WEIGHTS, ""),
    "a mask": (attention("x w b m", mask_filter_value=-100.0), MASK, WEIGHTS, ""),
    "lengths": (attention("x w b m"), ENDS, WEIGHTS, ""),
    "causal": (attention("x w b m", unidirectional=1, scale=0.3), MASK, WEIGHTS, ""),
    "narrow values": (attention("x w b", qkv_hidden_sizes=[WIDTH, WIDTH, 16]), {}, NARROW, ""),
    "a cache": (attention("x w b m past", "a p", unidirectional=1), {**WHOLE, **PAST}, WEIGHTS, "p"),
    "a cache of many heads": ([node("Attention", "x w b _ past", "a p", MS, num_heads=4)], MANY, WIDE, "p"),
    "a cache that begins": (attention("x w b", "a p", unidirectional=1), {}, WEIGHTS, "p"),
    "a product with a factor": (
        [node("FusedMatMul", "x e", "a", MS, transB=1, alpha=0.5)],
        {}, {"e": rand(WIDTH, WIDTH), "wo": rand(WIDTH, 8)}, ""
    ),
    "an activation": (
        [
            node("Reshape", "x flat", "r"),
            node("FusedGemm", "r e f", "g", MS, transB=1, activation="LeakyRelu", activation_alpha=0.2),
            node("Reshape", "g back", "a"),
        ],
        {}, {"e": rand(WIDTH, WIDTH), "f": rand(WIDTH), "wo": rand(WIDTH, 8), "flat": np.array([-1, WIDTH]),
             "back": np.array([-1, 1, WIDTH])}, ""
    ),
}  # fmt: skip


def build(path: Path, case: str, opset: int, dtype: type = np.float32) -> tuple[Path, dict[str, np.ndarray]]:
    nodes, others, weights, more = CASES[case]
    inputs = {**X, **others}
    nodes = [*nodes, node("MatMul", "a wo", "y")]
    read = {name for n in nodes for name in n.input}
    kind = {FLOAT: helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}
    held = {k: w.astype(dtype) if w.dtype == np.float32 else w for k, w in weights.items() if k in read}
    graph = helper.make_graph(
        nodes,
        "fused",
        [helper.make_tensor_value_info(k, kind.get(t, t), shape) for k, (t, shape, _) in inputs.items()],
        [helper.make_tensor_value_info(k, kind[FLOAT], None) for k in ["y", *more.split()]],
        [numpy_helper.from_array(w, k) for k, w in held.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path, {k: x.astype(dtype) if t == FLOAT else x for k, (t, _, x) in inputs.items()}


def results(path: Path, feeds: dict[str, np.ndarray], *, plain: bool = False) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options) if plain else oq.session(path)
    return [x.astype(np.float32) for x in session.run(None, feeds)]


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("case", CASES)
def test_they_are_rotated_and_quantized(case: str, opset: int, tmp_path: Path) -> None:
    if case == "attention without a bias" and RUNTIME < (1, 32):
        pytest.skip("this ONNX Runtime dies of Attention without a bias, and is refused (test_runtime_faults)")
    source, feeds = build(tmp_path / "m.onnx", case, opset)
    expected = results(source, feeds)
    report = oq.rotate(source, tmp_path / "r.onnx")
    assert report.plan is not None
    assert {s.how for s in report.plan.sites} <= {"offline", "online"}
    assert len(report.plan.sites) == 2
    for a, b in zip(expected, results(tmp_path / "r.onnx", feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for scheme in ("a8w8", "a8w8-dynamic", "a8w4-block"):
        report = oq.quantize(source, tmp_path / "q.onnx", [feeds], scheme=scheme)
        assert len(report.quantized) == 2
        for plain in (False, True):
            for a, b in zip(expected, results(tmp_path / "q.onnx", feeds, plain=plain), strict=True):
                assert np.linalg.norm(a - b) <= (0.2 if "w4" in scheme else 0.03) * np.linalg.norm(a)


@pytest.mark.parametrize("case", ["a mask", "a cache"])
def test_in_half_precision_too(case: str, tmp_path: Path) -> None:
    source, feeds = build(tmp_path / "m.onnx", case, 17, np.float16)
    expected = results(source, feeds)
    assert len(oq.quantize(source, tmp_path / "q.onnx", [feeds]).quantized) == 2
    for a, b in zip(expected, results(tmp_path / "q.onnx", feeds), strict=True):
        assert np.linalg.norm(a - b) <= 0.03 * np.linalg.norm(a)


def test_what_is_quantized_can_be_compared_with_what_it_was_made_from(tmp_path: Path) -> None:
    source, feeds = build(tmp_path / "m.onnx", "a mask", 17)
    oq.quantize(source, tmp_path / "q.onnx", [feeds])
    found = measure_sensitivity(source, tmp_path / "q.onnx", feeds)
    assert len(found.layers) == 2
    assert len(compare_layers(source, tmp_path / "q.onnx", (feeds, feeds))) >= 1


ROWS = 2048  # of a table that is large enough to be quantized


def embedded(path: Path, opset: int, *, places: bool, segments: bool, counted: bool = False) -> Path:
    """Tokens -> embedding, norm -> two layers, beside the sum that the norm read -> norm -> y. counted: lengths of a
    mask are read as well.
    """
    inputs = "ids " + ("which " if segments else "_ ") + "words positions " + ("kinds " if segments else "_ ") + "g b"
    inputs += " m" if counted else " _"
    nodes = [
        node("EmbedLayerNormalization", inputs + (" places" if places else ""), "n lengths s", MS, epsilon=1e-5),
        node("MatMul", "n first", "h"), node("Relu", "h", "r"), node("MatMul", "r second", "k"),
        node("SkipLayerNormalization", "s k g b", "t", MS), node("MatMul", "t wo", "y"),
    ]  # fmt: skip
    read = {name for n in nodes for name in n.input}
    weights = {
        "words": RNG.standard_normal((ROWS, WIDTH)).astype(np.float32), "positions": rand(16, WIDTH),
        "kinds": rand(2, WIDTH), "g": 1 + 0.2 * rand(WIDTH), "b": rand(WIDTH), "first": rand(WIDTH, 64),
        "second": rand(64, WIDTH), "wo": rand(WIDTH, 8),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "embedded",
        [helper.make_tensor_value_info(n, INT32, ["b", "l"]) for n in ("ids", "which", "m", "places") if n in read],
        [helper.make_tensor_value_info("y", FLOAT, None)]
        + [helper.make_tensor_value_info("lengths", INT32, None)] * counted,
        [numpy_helper.from_array(w.astype(np.float32), k) for k, w in weights.items() if k in read],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize(("places", "segments"), [(False, True), (True, False), (False, False)])
def test_embeddings_and_their_norm_come_apart(opset: int, places: bool, segments: bool, tmp_path: Path) -> None:
    source = embedded(tmp_path / "m.onnx", opset, places=places, segments=segments)
    report = oq.rotate(source, tmp_path / "r.onnx")
    assert report.plan is not None
    assert [site.how for site in report.plan.sites] == ["offline", "online", "offline"]
    rng = np.random.default_rng(1)
    feeds = {"ids": rng.integers(0, ROWS, (2, 7)).astype(np.int32)}
    feeds |= {"which": rng.integers(0, 2, (2, 7)).astype(np.int32)} if segments else {}
    feeds |= {"places": rng.integers(0, 16, (2, 7)).astype(np.int32)} if places else {}
    (expected,) = results(source, feeds)
    np.testing.assert_allclose(results(tmp_path / "r.onnx", feeds)[0], expected, atol=1e-4)
    report = oq.quantize(source, tmp_path / "q.onnx", [feeds])
    assert len(report.quantized) == 3
    assert [table.rows for table in report.tables] == [ROWS]
    (found,) = results(tmp_path / "q.onnx", feeds)
    assert np.linalg.norm(found - expected) <= 0.03 * np.linalg.norm(expected)


def test_embeddings_that_count_a_mask_stay_whole(tmp_path: Path) -> None:
    source = embedded(tmp_path / "m.onnx", 17, places=False, segments=False, counted=True)
    report = oq.rotate(source, tmp_path / "r.onnx")
    assert report.plan is not None
    assert {site.how for site in report.plan.sites} == {"online"}


def test_what_they_look_up_is_fed_whole_tables(tmp_path: Path) -> None:
    specs = {s.name: s.rows for s in input_specs(embedded(tmp_path / "m.onnx", 17, places=True, segments=True))}
    assert specs == {"ids": ROWS, "which": 2, "places": 16}


def test_a_cache_is_not_transformed_where_a_row_a_token_would_do(tmp_path: Path) -> None:
    """The cache grows with every token; what attention makes of its values is one row."""
    plan = oq.discover(build(tmp_path / "m.onnx", "a cache of many heads", 17)[0])
    assert [online.value for online in plan.online] == ["x", "a"]
