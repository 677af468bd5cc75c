"""Data and models that cannot give a good result: refused, or remarked on, by name and with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
import small_llama
from onnx_quarot.cli import cli
from onnx_quarot.errors import ConfigError, DataError
from onnx_quarot.scheme import SCHEMES

WIDTH = 64
Batch = dict[str, np.ndarray[Any, Any]]
STATIC = ("a8w8", "a16w8", "a8w4")
GPTQ = ("a8w4", "a4w4", "a8w4-dynamic", "a8w4-block")


def mlp(path: Path, opset: int = 21, width: int = WIDTH) -> Path:
    rng = np.random.default_rng(0)
    weights = [(rng.standard_normal((width, width)) / 8).astype(np.float32) for _ in range(2)]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"], name="second"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", width]) for name in "xy"]
    constants = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def batch(rows: int = 200, width: int = WIDTH) -> Batch:
    return {"x": np.random.default_rng(1).standard_normal((1, rows, width)).astype(np.float32)}


def remarks(source: Path, data: list[Batch], **options: Any) -> str:
    report = oq.quantize(source, source.parent / "q.onnx", data, **options)
    return "\n".join(report.notes)


# Too little


@pytest.mark.parametrize("scheme", STATIC[:2])
def test_few_tokens_are_remarked_on(tmp_path: Path, scheme: str) -> None:
    source = mlp(tmp_path / "m.onnx")
    assert "saw only 7 tokens (rows of activations) in 1 batch" in remarks(source, [batch(7)], scheme=scheme)
    assert "saw only 1 token " in remarks(source, [batch(1)], scheme=scheme)
    assert "saw only" not in remarks(source, [batch(64), batch(64)], scheme=scheme)


@pytest.mark.parametrize("scheme", GPTQ)
def test_few_tokens_for_gptq(tmp_path: Path, scheme: str) -> None:
    source = mlp(tmp_path / "m.onnx")
    assert "gptq saw only 40 tokens (rows of activations) at layers of 64" in remarks(
        source, [batch(40)], scheme=scheme
    )
    assert "gptq saw" not in remarks(source, [batch(64)], scheme=scheme)
    with pytest.raises(DataError, match=r"1 rows reach 'first', which has 64 .* needs at least 7, .*weights='rtn'"):
        remarks(source, [batch(1)], scheme=scheme)


@pytest.mark.parametrize("scheme", [*STATIC, *GPTQ[1:]])
def test_constant_data_is_remarked_on(tmp_path: Path, scheme: str) -> None:
    source = mlp(tmp_path / "m.onnx")
    found = remarks(source, [{"x": np.ones((1, 200, WIDTH), np.float32)}], scheme=scheme, rotations=())
    assert "the same values in all 200 rows of the calibration data (x is the first)" in found
    assert "the same values" not in remarks(source, [batch()], scheme=scheme)


@pytest.mark.parametrize("scheme", STATIC)
def test_zeros_are_refused(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(DataError, match="all 2 activations are zero throughout the data"):
        remarks(mlp(tmp_path / "m.onnx"), [{"x": np.zeros((1, 200, WIDTH), np.float32)}], scheme=scheme)


@pytest.mark.parametrize("scheme", [*STATIC, *GPTQ[2:]])
@pytest.mark.parametrize(("bad", "name"), [(np.inf, "Inf"), (np.nan, "NaN")])
def test_what_is_not_finite_is_named(tmp_path: Path, scheme: str, bad: float, name: str) -> None:
    data = batch()
    data["x"][0, 3, 3] = bad
    with pytest.raises(DataError, match=f"tensor 'x', the input of 'first', holds {name}.*in batch 1"):
        remarks(mlp(tmp_path / "m.onnx"), [batch(), data], scheme=scheme, rotations=())


# Of another form


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        (batch(), "is one dict; give a list of dicts"),
        ([{"x": np.zeros((1, 0, WIDTH), np.float32)}], r"batch 0 holds nothing: input 'x' has shape \[1, 0, 64\]"),
        ([{"x": np.zeros((1, 3, WIDTH))}], "'x' has element type float64; the model takes float32"),
        ([{"x": np.zeros((1, 3, 65), np.float32)}], r"shape \[1, 3, 65\]; the model takes \[b, s, 64\]"),
        ([{"x": np.zeros((3, WIDTH), np.float32)}], r"shape \[3, 64\]; the model takes \[b, s, 64\]"),
        ([{"z": np.zeros((1, 3, WIDTH), np.float32)}], r"has 'z', no input of the model \(inputs: x\)"),
        ([{}], "batch 0 lacks input 'x'"),
        (["a"], "batch 0 is a str; each batch must be a dict"),
        (None, "a NoneType is not understood; give a CalibrationDataReader"),
        ("missing.txt", "missing.txt cannot be read"),
    ],
    ids=str,
)
def test_data_of_another_form(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        oq.quantize(mlp(tmp_path / "m.onnx"), tmp_path / "q.onnx", data)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("windows", [0, -1])
def test_no_windows(tmp_path: Path, windows: int) -> None:
    with pytest.raises(DataError, match=f"windows: {windows} batches asked for; use at least 1"):
        remarks(mlp(tmp_path / "m.onnx"), [batch()], windows=windows)


@pytest.mark.parametrize("token", [120, -121])
@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-block"])
def test_tokens_outside_the_vocabulary(tmp_path: Path, token: int, scheme: str) -> None:
    source = small_llama.save(tmp_path / "m.onnx")
    feeds = small_llama.decoder_feeds(small_llama.Config(), np.random.default_rng(0))
    feeds["input_ids"][0, 3] = token
    message = f"batch 0, input 'input_ids' holds {token}; the model's table has rows 0 to 119: do tokenizer and model"
    with pytest.raises(DataError, match=message):
        remarks(source, [feeds], scheme=scheme)
    with pytest.raises(DataError, match=message):
        oq.evaluate(source, source, [feeds])


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    source = mlp(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.zeros((1, 3, 65), np.float32))
    run = ["quantize", str(source), str(tmp_path / "q.onnx"), "--calibration", str(tmp_path / "d.npz")]
    done = CliRunner().invoke(cli, run)
    assert done.exit_code == 1
    assert "the model takes [b, s, 64]" in done.output
    assert "Traceback" not in done.output
    np.savez(tmp_path / "d.npz", x=batch(7)["x"])
    done = CliRunner().invoke(cli, run)
    assert done.exit_code == 0
    assert "calibration saw only 7 tokens" in " ".join(done.output.split())


# Models that cannot carry a scheme


@pytest.mark.parametrize("opset", [11, 13, 17, 21, 23])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_at_every_opset(tmp_path: Path, opset: int, scheme: str) -> None:
    source = mlp(tmp_path / "m.onnx", opset)
    needed = SCHEMES[scheme].min_opset
    converted = f"converted from opset {opset} to {needed}, which {scheme} needs"
    assert (converted in remarks(source, [batch()], scheme=scheme)) == (opset < needed)
    fits(source, WIDTH, scheme)


@pytest.mark.parametrize("width", [33, 36, 40, 100])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_at_sizes_that_no_block_divides(tmp_path: Path, width: int, scheme: str) -> None:
    source = mlp(tmp_path / "m.onnx", width=width)
    if scheme == "a4w4":
        with pytest.raises(ConfigError, match=f"does not divide the {width} input features of 'first'; no block does"):
            remarks(source, [batch(width=width)], scheme=scheme)
        return
    remarks(source, [batch(width=width)], scheme=scheme)
    fits(source, width, scheme)


def test_a_block_that_fits_is_proposed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block: 32 does not divide the 48 input features of 'first'; use block=16"):
        remarks(mlp(tmp_path / "m.onnx", width=48), [batch(width=48)], scheme="a4w4")


def fits(source: Path, width: int, scheme: str) -> None:
    """The quantized model is close to the float one, with the compiled operators and without."""
    data = batch(width=width)
    expected = oq.session(source).run(None, data)[0]
    bound = 0.15 if SCHEMES[scheme].weight.bits == 4 else 0.03
    for library in (True, False):
        found = oq.session(source.parent / "q.onnx", use_library=library).run(None, data)[0]
        assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)
