"""Damaged or malicious input: one line of error, or an answer. `fuzz/fuzz.py` goes on for longer."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
import small_llama
from onnx_quarot.load import blamed_on
from onnx_quarot.rotation_config import read_rotation_config

FUZZ = Path(__file__).parent.parent / "fuzz"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("target", ["config", "gguf", "operator", "model"])
def test_a_few_random_cases(target: str) -> None:
    seconds = os.environ.get("ONNX_QUAROT_FUZZ_SECONDS", "4")
    done = subprocess.run([sys.executable, FUZZ / "fuzz.py", target, seconds], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def two_matmuls(path: Path, **changes: object) -> Path:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).tobytes(), raw=True)
    for key, value in changes.items():
        if key == "dims":
            del weight.dims[:]
            weight.dims.extend(value)  # type: ignore[arg-type]
        else:
            setattr(weight, key, value)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 4]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    path.write_bytes(helper.make_model(graph, ir_version=10).SerializeToString())
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"dims": [1 << 40, 1 << 40]},  # 2**82 bytes announced, 64 there
        {"dims": [-4, 4]},
        {"dims": [4, 4, 1 << 62]},
        {"raw_data": b""},
        {"raw_data": b"123"},
        {"data_type": 99},
        {"data_type": 0},
        {"data_location": TensorProto.EXTERNAL},
    ],
    ids=str,
)
def test_an_initializer_that_lies_about_itself(tmp_path: Path, changes: dict[str, object]) -> None:
    path = two_matmuls(tmp_path / "m.onnx", **changes)
    (tmp_path / "out").mkdir()
    with pytest.raises(oq.OnnxQuarotError) as caught:
        oq.rotate(path, tmp_path / "out" / "r.onnx")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_nodes_in_a_circle(tmp_path: Path) -> None:
    path = two_matmuls(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[0].input[0] = "y"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(oq.OnnxQuarotError) as caught:
        oq.rotate(path, tmp_path / "r.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r.onnx").exists()


def test_a_shape_that_overflows(tmp_path: Path) -> None:
    path = small_llama.save(tmp_path / "m.onnx")
    model = onnx.load(path)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = 2**62
    path.write_bytes(model.SerializeToString())
    with contextlib.suppress(oq.OnnxQuarotError):
        oq.discover(path)


DISCOVER = """
import sys, onnx_quarot as oq
from onnx_quarot.resources import peak_memory
print(len(oq.discover(sys.argv[1]).sites), peak_memory())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no count of memory")
@pytest.mark.parametrize("op_type", ["ConstantOfShape", "Expand", "Tile", "Range", "Mul"])
def test_a_few_numbers_that_ask_for_gigabytes(tmp_path: Path, op_type: str) -> None:
    many = 1 << 29
    inputs = {
        "ConstantOfShape": [np.array([many])],
        "Expand": [np.array([7]), np.array([many])],
        "Tile": [np.array([7, 8]), np.array([many // 2])],
        "Range": [np.array(0), np.array(many), np.array(1)],
        "Mul": [np.full((1 << 15, 1), 0.5, np.float32), np.full((1, 1 << 15), 0.5, np.float32)],
    }[op_type]
    path = two_matmuls(tmp_path / "m.onnx")
    model = onnx.load(path)
    names = [f"i{number}" for number in range(len(inputs))]
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip(inputs, names, strict=True))
    made = [
        helper.make_node(op_type, names, ["bomb"]),
        helper.make_node("Cast", ["bomb"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["float"], ["most"], keepdims=0),
        helper.make_node("Add", ["h", "most"], ["sum"]),
    ]
    model.graph.node[1].input[0] = "sum"
    for number, node in enumerate(made):
        model.graph.node.insert(1 + number, node)
    path.write_bytes(model.SerializeToString())
    done = subprocess.run([sys.executable, "-c", DISCOVER, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sites, peak = map(int, done.stdout.split())
    assert sites == 2
    assert peak < 1 << 30


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"R1_pairs":' * 50_000, b"9" * 10_000, b"\xff\xfe{}", b"NaN"])
def test_json_that_means_harm(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(oq.ConfigError):
        read_rotation_config(tmp_path / "c.json")


def test_an_unexpected_exception_is_told_in_one_line_with_what_the_checker_says(tmp_path: Path) -> None:
    sound = two_matmuls(tmp_path / "sound.onnx")
    with pytest.raises(oq.ModelError, match=r"is not understood \(IndexError: no such") as caught, blamed_on(sound):
        raise IndexError("no such\nthing")
    assert isinstance(caught.value.__cause__, IndexError)
    broken = two_matmuls(tmp_path / "broken.onnx", dims=[4, 4, 7])
    with pytest.raises(oq.ModelError, match="is not a valid ONNX model") as caught, blamed_on(broken):
        raise IndexError
    assert "\n" not in str(caught.value)
    with pytest.raises(oq.ConfigError, match="as it is"), blamed_on(sound):
        raise oq.ConfigError("as it is")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.graph.node[1].input.pop(), "MatMul '' lacks its input 1"),
        (lambda m: setattr(m, "ir_version", 2**40), f"the IR version is {2**40}"),
        (lambda m: setattr(m.opset_import[0], "version", -1), "the opset '' version is -1"),
        (lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(60)), "holds 60 bytes; it needs 64 bytes"),
        (lambda m: place(m, "w\0"), "no name of a file"),
        (lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].CopyFrom(dim(5)), "shapes disagree|cannot be"),
    ],
    ids=["inputs", "ir version", "opset", "bytes", "location", "shapes"],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[onnx.ModelProto], object], message: str) -> None:
    path = two_matmuls(tmp_path / "m.onnx")
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(oq.OnnxQuarotError, match=message) as caught:
        oq.rotate(path, tmp_path / "r.onnx")
    assert caught.value.__cause__ is None or "\n" not in str(caught.value)
    assert not (tmp_path / "r.onnx").exists()


def dim(length: int) -> onnx.TensorShapeProto.Dimension:
    return onnx.TensorShapeProto.Dimension(dim_value=length)


def place(model: onnx.ModelProto, location: str) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def test_a_model_that_does_not_run_is_not_rotated(tmp_path: Path) -> None:
    """Shapes that agree as far as they are known, and not when it runs."""
    path = two_matmuls(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node.insert(0, helper.make_node("Reshape", ["x", "wrong"], ["z"]))
    model.graph.node[1].input[0] = "z"
    model.graph.initializer.append(helper.make_tensor("wrong", TensorProto.INT64, [2], [7, 4]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(oq.OnnxQuarotError, match="cannot be run on random inputs") as caught:
        oq.rotate(path, tmp_path / "r.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r.onnx").exists()


def test_onnxruntimes_operators_in_onnxs_domain_are_no_fault_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(small_llama.build(small_llama.Config()).SerializeToString())
    with pytest.raises(oq.ModelError, match="is not understood"), blamed_on(path):
        raise IndexError


def test_a_weight_that_is_not_finite_in_external_data(tmp_path: Path) -> None:
    """What the error holds is still mapped when the file is let go."""
    config = small_llama.Config(layers=1)
    source = small_llama.save(tmp_path / "a.onnx", config, external=True)
    data = tmp_path / "a.onnx.data"
    weights = np.fromfile(data, np.float32)
    weights[len(weights) // 2] = np.nan
    weights.tofile(data)
    feeds = small_llama.decoder_feeds(config, np.random.default_rng(0))
    with pytest.raises(oq.ModelError, match="holds a value that is not finite"):
        oq.quantize(source, tmp_path / "b.onnx", [feeds], scheme="a8w8-dynamic", rotations=(), verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
