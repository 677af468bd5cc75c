"""A model run piece by piece gives what it gives whole."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_quarot as oq
import small_llama
from onnx_quarot import segments
from onnx_quarot.errors import ModelError
from onnx_quarot.load import load

CONFIG = small_llama.Config(layers=3)


def whole(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = oq.session(path)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.parametrize(("limit", "external"), [(1, False), (20_000, True), (1 << 30, True)])
def test_pieces_of_any_size_agree_with_the_whole(tmp_path: Path, limit: int, external: bool) -> None:
    source = small_llama.save(tmp_path / "a.onnx", CONFIG, external=external)
    target = tmp_path / "b.onnx"
    oq.rotate(source, target)
    feeds = small_llama.decoder_feeds(CONFIG, np.random.default_rng(0))
    for path in (source, target):
        expected = whole(path, feeds)
        found = segments.run_in_segments(path, feeds, list(expected), segment_bytes=limit)
        for (name, a), b in zip(expected.items(), found, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max(), err_msg=name)
    assert len(list(segments._segments(load(target), 20_000))) > 3


def test_bfloat16_models_are_run_in_float32(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((8, 8)).astype(ml_dtypes.bfloat16)
    two = helper.make_tensor("", onnx.TensorProto.BFLOAT16, (1,), [2])
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["h"], to=onnx.TensorProto.BFLOAT16),
            helper.make_node("MatMul", ["h", "w"], ["k"], "product"),
            helper.make_node("Shape", ["k"], ["s"]),
            helper.make_node("ConstantOfShape", ["s"], ["two"], value=two),
            helper.make_node("Add", ["k", "two"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, ["n", 8])],
        [helper.make_tensor("w", onnx.TensorProto.BFLOAT16, (8, 8), weight.tobytes(), raw=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    x = rng.standard_normal((3, 8)).astype(np.float32)
    (y,) = segments.run_in_segments(tmp_path / "m.onnx", {"x": x}, ["y"])
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x @ weight.astype(np.float32) + 2, rtol=1e-5, atol=1e-5)


def test_what_a_subgraph_reads_is_kept_for_it(tmp_path: Path) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["a", "b"], [f"{name}_out"])], name, [], [result])

    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("MatMul", ["a", "w"], ["b"]),
            helper.make_node("If", ["c"], ["y"], then_branch=branch("yes", "Add"), else_branch=branch("no", "Sub")),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32) * 2, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    x = np.ones((2, 4), np.float32)
    for condition, expected in ((True, 6 * x), (False, -2 * x)):
        feeds = {"x": x, "c": np.array(condition)}
        (y,) = segments.run_in_segments(tmp_path / "m.onnx", feeds, ["y"], segment_bytes=1)
        np.testing.assert_array_equal(y, expected)


def test_a_piece_that_cannot_run_is_named(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "a.onnx", CONFIG)
    feeds = small_llama.decoder_feeds(CONFIG, np.random.default_rng(0))
    feeds["input_ids"] = feeds["input_ids"].astype(np.float32)
    with pytest.raises(ModelError, match="part from node '/model/embed_tokens"):
        segments.run_in_segments(source, feeds, ["logits"], segment_bytes=1)


def test_what_a_piece_fails_of_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # ONNX Runtime logs what its kernels return, and verification may try several inputs.
    source = small_llama.save(tmp_path / "a.onnx", CONFIG)
    feeds = small_llama.decoder_feeds(CONFIG, np.random.default_rng(0))
    feeds["input_ids"][:] = CONFIG.vocab
    with pytest.raises(ModelError, match="out of data bounds"):
        segments.run_in_segments(source, feeds, ["logits"], segment_bytes=1)
    assert not capfd.readouterr().err


def test_an_output_that_no_node_makes_is_named(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "a.onnx", CONFIG, external=False)
    feeds = small_llama.decoder_feeds(CONFIG, np.random.default_rng(0))
    with pytest.raises(ModelError, match="no node makes 'nothing'"):
        segments.run_in_segments(source, feeds, ["logits", "nothing"])
