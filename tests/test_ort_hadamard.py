"""The compiled operator alone: nodes as any tool might have written them, without a function body."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from exports import RUNTIME
from onnx_quarot.custom_op import DOMAIN, custom_op_library, register
from onnx_quarot.transform import hadamard_matrix


def raw_session(
    attributes: dict[str, Any] | None = None,
    *,
    shape: Sequence[int | str] | None = ("b", "n"),
    signs: np.ndarray | None = None,
    signs_input: bool = False,
    element: int = TensorProto.FLOAT,
    input_names: Sequence[str] | None = None,
) -> ort.InferenceSession:
    names = input_names or (["x", "s"] if signs is not None or signs_input else ["x"])
    node = helper.make_node("Hadamard", names, ["y"], domain=DOMAIN, name="had", **(attributes or {}))
    inputs = [helper.make_tensor_value_info("x", element, shape)]
    if signs_input:
        inputs.append(helper.make_tensor_value_info("s", TensorProto.INT8, ["k"]))
    graph = helper.make_graph(
        [node],
        "raw",
        inputs,
        [helper.make_tensor_value_info("y", element, None)],
        [] if signs is None else [numpy_helper.from_array(signs, "s")],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    register(options)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_shape_inference() -> None:
    outputs = raw_session({"block_size": 32}, shape=("b", 96)).get_outputs()
    assert outputs[0].type == "tensor(float)"
    assert outputs[0].shape == ["b", 96]
    # An unknown rank stays unknown; it does not turn into a scalar.
    assert raw_session(shape=None).run(None, {"x": np.ones((2, 64), np.float32)})[0].shape == (2, 64)


@pytest.mark.parametrize(
    ("attributes", "shape", "message"),
    [
        ({"block_size": 64}, ("b", 96), "block_size is 64: it must divide the last axis, of length 96"),
        ({"block_size": 0}, ("b", 96), "block_size is 0: it must be at least 1"),
        ({"block_size": -8}, ("b", "n"), "block_size is -8: it must be at least 1"),
        ({"block_size": 6}, ("b", "n"), "size 6 = 3 * 2^1 has no Hadamard matrix"),
        ({}, ("b", 6), "size 6 = 3 * 2^1 has no Hadamard matrix"),
        ({"block_size": 32.0}, ("b", 96), "attribute block_size has another type: it must be an int"),
        ({"block_size": "32"}, ("b", 96), "attribute block_size has another type: it must be an int"),
        ({"block_size": [32]}, ("b", 96), "attribute block_size has another type: it must be an int"),
        ({"transpose": 2}, ("b", 96), "transpose is 2: it must be 0 or 1"),
        ({"scale": 2}, ("b", 96), "attribute scale has another type: it must be a float"),
        ({"scale": float("inf")}, ("b", 96), "scale is inf: it must be finite"),
    ],
)
def test_bad_attributes_are_refused_with_the_session(
    attributes: dict[str, Any], shape: tuple[int | str, ...], message: str
) -> None:
    with pytest.raises(Exception, match="Hadamard node 'had'") as caught:
        raw_session(attributes, shape=shape)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("x", "signs", "attributes", "message"),
    [
        ((), None, {}, "X has rank 0: it must have a last axis"),
        ((2, 96), None, {"block_size": 64}, "block_size is 64: it must divide the last axis, of length 96"),
        ((0, 96), None, {"block_size": 64}, "block_size is 64: it must divide the last axis, of length 96"),
        ((2, 6), None, {}, "size 6 = 3 * 2^1 has no Hadamard matrix"),
        (
            (2, 96),
            np.ones(95),
            {},
            "signs has length 95: it must be the block size (96) or the last axis (96)",
        ),
        ((2, 96), np.ones(48), {"block_size": 32}, "signs has length 48: it must be the block size (32)"),
        ((2, 96), np.zeros(96), {}, "signs[0] is 0: it must be 1 or -1"),
        ((2, 96), np.ones(0), {}, "signs has length 0: it must be the block size or the last axis"),
    ],
)
def test_bad_inputs_are_invalid_arguments_of_the_run(
    x: tuple[int, ...], signs: np.ndarray | None, attributes: dict[str, Any], message: str
) -> None:
    feeds = {"x": np.ones(x, np.float32)}
    if signs is not None:
        feeds["s"] = signs.astype(np.int8)
    made = raw_session(attributes, shape=None, signs_input=signs is not None)
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        made.run(None, feeds)
    assert message in str(caught.value)
    assert "Name:'had'" in str(caught.value)


def test_constant_signs_are_checked_with_the_session() -> None:
    for signs, message in (
        (np.ones(95, np.int8), "signs has length 95"),
        (np.full(96, 2, np.int8), r"signs\[0\] is 2: it must be 1 or -1"),
        (np.ones((1, 96), np.int8), "signs has rank 2: it must be 1"),
        (np.ones(96, np.float32), "Type 'tensor\\(float\\)' of input parameter \\(s\\)"),
    ):
        with pytest.raises(Exception, match=message):
            raw_session(shape=("b", 96), signs=signs)


def test_signs_as_an_input() -> None:
    x = np.random.default_rng(7).standard_normal((3, 96)).astype(np.float32)
    signs = np.random.default_rng(5).choice(np.array([-1, 1], np.int8), 96)
    (got,) = raw_session(signs_input=True).run(None, {"x": x, "s": signs})
    assert_close(got, x @ hadamard_matrix(96, signs=signs))


OLD = RUNTIME < (1, 24)


@pytest.mark.skipif(
    OLD, reason="ONNX Runtime before 1.24 crashes at an optional input that is left out by an empty name"
)
def test_signs_left_out_by_an_empty_name() -> None:
    x = np.random.default_rng(7).standard_normal((3, 96)).astype(np.float32)
    (got,) = raw_session(input_names=["x", ""]).run(None, {"x": x})
    assert_close(got, x @ hadamard_matrix(96))


def test_no_features() -> None:
    (got,) = raw_session().run(None, {"x": np.ones((3, 0), np.float32)})
    assert got.shape == (3, 0)


def test_other_element_types_are_refused() -> None:
    with pytest.raises(Exception, match="Type 'tensor\\(int32\\)' of input parameter"):
        raw_session(element=TensorProto.INT32)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm on Linux")
def test_library_exports_one_symbol() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", custom_op_library()], check=True, capture_output=True, text=True
    ).stdout
    assert [line.split()[-1].split("@")[0] for line in listed.splitlines()] == ["RegisterCustomOps"]
