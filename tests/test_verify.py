"""Verification in every weight type, and what it says of models that cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
import onnx_quarot.verify as verify_module
import small_llama
from onnx_quarot.data import InputSpec
from onnx_quarot.differences import relative_error
from onnx_quarot.rewrite import rotate_model
from small_llama import Config


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-4), (np.float16, 2e-2), (ml_dtypes.bfloat16, 0.15)], ids=str
)
def test_weights_of_every_type_are_rotated_and_verified(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    class Builder(small_llama.Builder):
        pass

    Builder.dtype = np.dtype(dtype)
    onnx.save(Builder(Config(), 0).model(), tmp_path / "m.onnx")
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert report.verification is not None
    assert report.verification.tolerance == tolerance
    assert report.verification.worst < tolerance / 5
    kinds = {t.data_type for t in onnx.load(tmp_path / "r.onnx").graph.initializer if len(t.dims) == 2}
    assert kinds == {ir.DataType.from_numpy(np.dtype(dtype)).value}


def half_model(path: Path) -> Path:
    class Builder(small_llama.Builder):
        dtype = np.dtype(np.float16)

    onnx.save(Builder(Config(), 0).model(), path)
    return path


def test_rounding_that_a_model_makes_much_of_is_told_from_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off by more than allowed, but right in float32: nothing but the rounding of its weights is to blame."""
    monkeypatch.setitem(verify_module._TOLERANCE, "float16", 2e-5)
    report = oq.rotate(half_model(tmp_path / "m.onnx"), tmp_path / "r.onnx")
    proof = report.verification
    assert proof is not None
    assert proof.unrounded is not None
    assert proof.unrounded < 1e-5 < 2e-5 < proof.worst < 2e-2
    assert proof.tolerance == 0.15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "r.onnx"]
    kinds = {t.data_type for t in onnx.load(tmp_path / "r.onnx").graph.initializer if len(t.dims) == 2}
    assert kinds == {TensorProto.FLOAT16}


def test_an_error_is_not_taken_for_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify_module._TOLERANCE, "float16", 2e-5)
    source, plan = half_model(tmp_path / "m.onnx"), oq.discover(tmp_path / "m.onnx")

    def off(name: str, factor: float) -> Path:
        model = ir.load(source)
        rotate_model(model, plan, unrounded=True)
        weight = next(v for v in model.graph.initializers.values() if v.shape is not None and len(v.shape) == 2)
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name=weight.name)
        ir.save(model, tmp_path / name)
        return tmp_path / name

    candidate = off("c.onnx", 1.005)
    with pytest.raises(oq.VerificationError, match=r"allowed 1e-04.*first difference at"):
        verify_module.verify(source, candidate, plan, unrounded=lambda: off("u.onnx", 1.005))
    proof = verify_module.verify(source, candidate, plan, unrounded=lambda: off("u.onnx", 1.0))
    assert proof.unrounded is not None
    with pytest.raises(oq.VerificationError, match="differs by"):  # rounding never does that much
        verify_module.verify(source, off("far.onnx", 3.0), plan, unrounded=lambda: pytest.fail("not asked for"))


def two_layers(path: Path, weight: np.ndarray[Any, Any]) -> Path:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], "second"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 16]) for n in "xy")
    first = rng.standard_normal((16, 16)).astype(np.float32)
    weights = [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(weight, "w2")]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_float16_behind_casts_is_judged_as_float16(tmp_path: Path) -> None:
    """The outputs are float32, but no weight is better than float16."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["a", "w1"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 64]) for n in "xy")
    weights = [numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float16), n) for n in ("w1", "w2")]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert report.verification is not None
    assert 1e-5 < report.verification.worst < report.verification.tolerance == 2e-2


def test_a_model_that_makes_no_numbers_is_told_apart_from_an_inexact_rewrite(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    weight[3, 4] = np.nan
    with pytest.raises(oq.VerificationError, match="weight that is not finite"):
        oq.rotate(two_layers(tmp_path / "m.onnx", weight), tmp_path / "r.onnx")
    assert not (tmp_path / "r.onnx").exists()


def test_a_cache_whose_dimensions_have_no_telling_names(tmp_path: Path) -> None:
    """As torch names them: the mask has to be as long as the cache and the tokens together."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["k"]),
        helper.make_node("Reshape", ["k", "heads"], ["k4"]),
        helper.make_node("Transpose", ["k4"], ["kt"], perm=[0, 2, 1, 3]),
        helper.make_node("Concat", ["past", "kt"], ["present"], axis=2),
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "axes"], ["m4"]),
        helper.make_node("Mul", ["present", "m4"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "length"], ["y"], keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["s0", "s1"]),
        helper.make_tensor_value_info("mask", TensorProto.INT64, ["s0", "s2"]),
        helper.make_tensor_value_info("past", TensorProto.FLOAT, ["s0", 2, "s3", 8]),
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "present")]
    rng = np.random.default_rng(0)
    constants = {
        "table": rng.standard_normal((20, 16)).astype(np.float32),
        "w": rng.standard_normal((16, 16)).astype(np.float32),
        "heads": np.array([0, 0, 2, 8]),
        "axes": np.array([1, 3]),
        "length": np.array([2]),
    }
    weights = [numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert report.verification is not None
    assert report.verification.worst < 1e-4


def test_a_trace_of_one_length_is_verified_on_the_calibration_data(tmp_path: Path) -> None:
    """Its inputs say that any number of rows will do, its graph that there are three."""
    weight = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
    model = onnx.load(two_layers(tmp_path / "m.onnx", weight))
    model.graph.node.insert(0, helper.make_node("Reshape", ["x", "traced"], ["z"]))
    model.graph.node[1].input[0] = "z"
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, 16]), "traced"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(oq.VerificationError, match="if it takes certain sizes only, its inputs should say so"):
        oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    data = [{"x": np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)}]
    report = oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", data, scheme="a8w8")
    assert report.verification is not None
    assert report.verification.worst < 1e-4


def test_inputs_of_unknown_rank_are_verified_on_the_calibration_data(tmp_path: Path) -> None:
    model = onnx.load(two_layers(tmp_path / "m.onnx", np.random.default_rng(1).standard_normal((16, 16)).astype("f")))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(oq.VerificationError, match=r"'x' has no shape.*give it one in the file, or quantize"):
        oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert not (tmp_path / "r.onnx").exists()
    data = [{"x": np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)}]
    report = oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", data, scheme="a8w8")
    assert report.verification is not None
    assert report.verification.worst < 1e-4


def test_masks_of_infinity_do_not_hide_the_rest() -> None:
    a = np.array([1.0, -np.inf, 2.0])
    assert relative_error(a, np.array([1.0, -np.inf, 2.0 + 2e-7])) < 1e-6
    assert relative_error(a, np.array([1.0, -np.inf, 2.5])) == 0.25
    assert relative_error(a, np.array([1.0, 5.0, 2.0])) == np.inf
    assert relative_error(np.ones(3), np.array([1.0, np.nan, 1.0])) == np.inf


def test_an_input_of_absurd_size_is_named() -> None:
    spec = InputSpec(name="x", dtype=np.dtype(np.float32), shape=(1 << 40, 1 << 30))
    with pytest.raises(oq.VerificationError, match=r"input 'x' has shape \[1099511627776, 1073741824\]"):
        verify_module.random_feeds([spec])


def test_a_model_that_takes_no_short_inputs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An image that is halved and doubled again meets itself only if its sides can be halved; a sound has to be as long
    as its padding. What was tried in vain says nothing.
    """
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["k"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("MaxPool", ["k"], ["p"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Resize", ["p", "", "scales"], ["q"], mode="nearest"),
        helper.make_node("Add", ["k", "q"], ["s"]),
        helper.make_node("Transpose", ["s"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["t", "c"], ["y"]),
    ]
    constants = {
        "a": rng.standard_normal((32, 3, 3, 3)),
        "c": rng.standard_normal((32, 8)),
        "scales": np.array([1, 1, 16, 16]),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "height", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert report.plan is not None
    assert [site.how for site in report.plan.sites] != ["none", "none"]
    assert report.verification is not None
    assert "onnxruntime" not in capfd.readouterr().err


def test_outputs_without_a_number_prove_nothing(tmp_path: Path) -> None:
    """A square root of what is positive in use, and of random numbers' sum now and then: one in a row makes the row."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((32, 32)), "c": rng.standard_normal((32, 8))}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("ReduceMin", ["x"], ["least"], keepdims=1),
        helper.make_node("Sqrt", ["least"], ["root"]),
        helper.make_node("Add", ["h", "root"], ["s"]),
        helper.make_node("MatMul", ["s", "c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(oq.VerificationError, match=r"output 'y' .* so that they prove nothing"):
        oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert not (tmp_path / "r.onnx").exists()
    data = [{"x": rng.uniform(0, 1, (64, 32)).astype(np.float32)}]
    report = oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", data)
    assert report.verification is not None
    assert 0.0 < report.verification.worst < 1e-4
