"""The three public functions from end to end on a small Llama."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import onnx_quarot as oq
import small_llama
from onnx_quarot import verify as verification
from onnx_quarot.load import load
from small_llama import Config

CONFIG = Config()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_llama.save(tmp_path / "model.onnx", CONFIG)


def batches(count: int = 3, config: Config = CONFIG) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [small_llama.decoder_feeds(config, rng) for _ in range(count)]


def logits(path: Path, feeds: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    result: np.ndarray = oq.session(path, **options).run(["logits"], feeds)[0]
    return result


def noise(reference: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(reference - x).mean() / np.square(reference).mean())


def test_discover_returns_a_plan_that_rotate_executes(model: Path, tmp_path: Path) -> None:
    plan = oq.discover(model)
    report = oq.rotate(model, tmp_path / "rotated.onnx", plan=oq.Plan.from_json(json.dumps(plan.to_json())))
    assert report.verification is not None
    assert report.verification.worst < 2e-5
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "rotated.onnx"]


@pytest.mark.parametrize("use_library", [True, False])
def test_quantize_keeps_the_function_with_and_without_the_library(
    model: Path, tmp_path: Path, use_library: bool
) -> None:
    report = oq.quantize(model, tmp_path / "q.onnx", batches())
    assert len(report.quantized) == 11
    assert report.bytes_out < report.bytes_in
    feeds = batches(4)[-1]
    reference = logits(model, feeds)
    assert noise(reference, logits(tmp_path / "q.onnx", feeds, use_library=use_library)) < 1e-2
    operators = [n.op_type for n in load(tmp_path / "q.onnx").graph]
    assert operators.count("Hadamard") == CONFIG.layers + 2  # two in front of the tied head
    assert operators.count("DequantizeLinear") >= 11


def test_rotation_lowers_the_quantization_noise_of_a_model_with_outliers(tmp_path: Path) -> None:
    proto = small_llama.build(CONFIG)
    # Two channels of the stream and of every down projection's input a hundred times the rest, as LLMs have them.
    from onnx import numpy_helper

    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if "layernorm.weight" in tensor.name:
            array[[3, 40]] *= 60
        elif "up_proj" in tensor.name:
            array[:, [5, 70]] *= 60
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    import onnx

    onnx.save(proto, tmp_path / "m.onnx")
    feeds = batches(5)[-1]
    reference = logits(tmp_path / "m.onnx", feeds)
    results = {}
    for name, rotations in (("plain", ()), ("rotated", ("R1", "R2", "R4"))):
        oq.quantize(tmp_path / "m.onnx", tmp_path / f"{name}.onnx", batches(), rotations=rotations)
        results[name] = noise(reference, _exactly(tmp_path / f"{name}.onnx", feeds))
    assert results["rotated"] < results["plain"] / 2


def _exactly(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Without fusions: what the quantized graph means, whatever integer kernels the CPU has."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return logits(path, feeds, session_options=options)


def test_same_seed_same_bytes(model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        oq.quantize(model, tmp_path / f"{name}.onnx", batches(), seed=seed)
    a, b, c = ((tmp_path / f"{n}.onnx").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_a_reader_and_an_iterable_are_the_same_data(model: Path, tmp_path: Path) -> None:
    oq.quantize(model, tmp_path / "a.onnx", small_llama.Reader(batches()))
    oq.quantize(model, tmp_path / "b.onnx", iter(batches()))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_report_speaks_json_and_to_people(model: Path, tmp_path: Path) -> None:
    from rich.console import Console

    report = oq.quantize(model, tmp_path / "q.onnx", batches())
    facts = json.loads(json.dumps(report.to_json()))
    assert facts["scheme"] == "a8w8"
    assert facts["plan"]["online_ops"] == 4
    assert facts["peak_memory"] > 1e7
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table())
    assert "11 linear layers" in console.export_text()


# ---------------------------------------------------------------------------------------------------------------------
# Nothing half written.


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """After the test the folder holds what it held before."""
    small_llama.save(tmp_path / "model.onnx", CONFIG)
    (tmp_path / "out.onnx").write_bytes(b"the old output")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    yield tmp_path
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_output_equal_to_input(folder: Path) -> None:
    with pytest.raises(oq.SaveError, match="is the input"):
        oq.quantize(folder / "model.onnx", folder / "model.onnx", batches())
    with pytest.raises(oq.SaveError, match="is the input"):
        oq.rotate(folder / "model.onnx", folder / "model.onnx")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda b: b.pop("attention_mask"), "attention_mask"),
        (lambda b: b.update(extra=np.zeros(3)), "extra"),
        (lambda b: b.update(input_ids=np.zeros((1, 9), np.float32)), "input_ids"),
        (lambda b: b.update(input_ids=np.zeros(9, np.int64)), "input_ids"),
    ],
)
def test_calibration_data_that_does_not_fit(folder: Path, change: Any, named: str) -> None:
    data = batches(1)
    change(data[0])
    with pytest.raises(oq.DataError, match=named):
        oq.quantize(folder / "model.onnx", folder / "out.onnx", data)


def test_no_calibration_data(folder: Path) -> None:
    with pytest.raises(oq.DataError):
        oq.quantize(folder / "model.onnx", folder / "out.onnx", [])


def test_data_that_goes_bad_half_way(folder: Path) -> None:
    data = batches(3)
    data[2]["input_ids"] = np.zeros((1, 1, 9), np.int64)
    with pytest.raises(oq.DataError, match="input_ids"):
        oq.quantize(folder / "model.onnx", folder / "out.onnx", data)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"scheme": "a3w8"}, oq.ConfigError, "a3w8"),
        ({"method": "guess"}, oq.ConfigError, "guess"),
        ({"rotations": ("R7",)}, oq.ConfigError, "R7"),
        ({"matrix_dim": 4096}, oq.ConfigError, "r_matrix_dim: is 4096, but .* 64"),
        ({"config": "nothing.json"}, oq.ConfigError, "nothing.json"),
        ({"exclude": ("no_such_node",)}, oq.ConfigError, "no_such_node"),
        ({"block_size": 5}, oq.ConfigError, "block_size"),
    ],
)
def test_impossible_options(folder: Path, options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        oq.quantize(folder / "model.onnx", folder / "out.onnx", batches(), **options)


def test_a_rewrite_that_is_not_exact_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verification._TOLERANCE, "float32", 1e-12)
    with pytest.raises(oq.VerificationError, match="nothing was written"):
        oq.rotate(folder / "model.onnx", folder / "out.onnx")


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir as ir

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(oq.SaveError, match="No space left"):
        oq.quantize(folder / "model.onnx", folder / "out.onnx", batches())
