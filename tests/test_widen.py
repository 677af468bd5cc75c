"""Models in half precision are quantized as their float32 twins are, and keep the type of everything else."""

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
import small_llama
from exports import RUNTIME
from onnx_quarot.data import input_specs
from onnx_quarot.errors import ModelError
from onnx_quarot.evaluation import fitted
from onnx_quarot.load import load
from onnx_quarot.scheme import SCHEMES
from onnx_quarot.sensitivity import measure_sensitivity
from onnx_quarot.sites import linear_sites
from onnx_quarot.widen import KEY, widen_bfloat16, widen_layers, widened

CONFIG = small_llama.Config(separate_qkv=True)
Feeds = dict[str, np.ndarray[Any, Any]]


def write(folder: Path, dtype: Any) -> Path:
    class Builder(small_llama.Builder):
        pass

    Builder.dtype = np.dtype(dtype)
    path = folder / f"{np.dtype(dtype)}.onnx"
    onnx.save(Builder(CONFIG, 0).model(), path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("widen")
    return write(folder, np.float32), write(folder, np.float16)


def feeds(dtype: Any, length: int = 60) -> Feeds:
    found = small_llama.decoder_feeds(CONFIG, np.random.default_rng(0), length=length)
    return {name: array.astype(dtype) if array.dtype == np.float32 else array for name, array in found.items()}


def logits(path: Path, dtype: Any, **options: Any) -> np.ndarray[Any, Any]:
    batch = fitted(path, input_specs(path), feeds(dtype))
    found: np.ndarray[Any, Any] = oq.session(path, **options).run(["logits"], batch)[0]
    return found


def distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        *((scheme, {}) for scheme in SCHEMES),
        ("a8w8", {"rotations": ()}),
        ("a8w8", {"mixed": True}),
        ("a8w8", {"kv_cache": "int8"}),
        ("a8w8-block", {"kv_cache": "int4"}),
    ],
    ids=str,
)
def test_float16_is_quantized_as_float32_is(
    models: tuple[Path, Path], tmp_path: Path, scheme: str, options: dict[str, Any]
) -> None:
    if "kv_cache" in options and RUNTIME < (1, 32):
        pytest.skip("GroupQueryAttention of ONNX Runtime 1.27 takes float32 alone with a quantized cache")
    expected = logits(models[0], np.float32)
    options = {"scheme": scheme, "seed": 1, "block": 16 if scheme == "a4w4" else None, **options}
    losses = []
    for source, dtype in zip(models, (np.float32, np.float16), strict=True):
        target = tmp_path / source.name
        report = oq.quantize(source, target, [feeds(dtype)], **options)
        assert len(report.quantized) == 15
        losses.append(distance(logits(target, dtype), expected))
    assert losses[1] < 1.15 * losses[0] + 0.005
    half = tmp_path / models[1].name
    found = logits(half, np.float16)
    assert found.dtype == np.float16
    assert distance(logits(half, np.float16, use_library=False), found) < 0.05  # a step of a code, here or there
    if "kv_cache" not in options:
        given, made = (ir.load(path).graph for path in (models[1], half))
        assert [v.dtype for v in (*made.inputs, *made.outputs)] == [v.dtype for v in (*given.inputs, *given.outputs)]


def test_layers_that_are_left_out_stay_as_they_are(models: tuple[Path, Path], tmp_path: Path) -> None:
    oq.quantize(models[1], tmp_path / "q.onnx", [feeds(np.float16)], exclude=["*down_proj*"])
    sites = {site.node_name: site for site in linear_sites(load(tmp_path / "q.onnx"))}
    left = [site for name, site in sites.items() if "down_proj" in name]
    assert len(left) == CONFIG.layers
    assert {site.dtype for site in left} == {ir.DataType.FLOAT16}
    assert not any("down_proj" in name for name in widened(load(tmp_path / "q.onnx")))


def test_sensitivities_of_a_half_precision_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    oq.quantize(models[1], tmp_path / "q.onnx", [feeds(np.float16)], op_types=("MatMul",), seed=2)
    found = measure_sensitivity(models[1], tmp_path / "q.onnx", feeds(np.float16))
    assert len(found.layers) == 15
    actual = distance(logits(tmp_path / "q.onnx", np.float16), logits(models[1], np.float16).astype(np.float64))
    assert found.all**0.5 == pytest.approx(actual, rel=0.1)


def test_other_readers_of_a_widened_constant_see_the_old_type(tmp_path: Path) -> None:
    """One matrix as a layer's weight, as an operand of Add, and as a table; a bias behind Gemm; a float64 model."""
    rng = np.random.default_rng(0)
    for dtype, tolerance in ((np.float16, 5e-3), (np.float64, 1e-6)):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        weight = (rng.standard_normal((16, 16)) / 4).astype(dtype)
        bias = rng.standard_normal(16).astype(dtype)
        nodes = [
            helper.make_node("Gather", ["w", "ids"], ["rows"]),
            helper.make_node("Gemm", ["rows", "w", "b"], ["h"], name="gemm", transB=1, beta=0.5),
            helper.make_node("Add", ["h", "w"], ["sum"]),
            helper.make_node("MatMul", ["sum", "w"], ["y"], name="matmul"),
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, [16])],
            [helper.make_tensor_value_info("y", kind, [16, 16])],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
        )
        path = tmp_path / f"{np.dtype(dtype)}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        model = load(path)
        assert widen_layers(model, linear_sites(model))
        assert {site.dtype for site in linear_sites(model)} == {ir.DataType.FLOAT}
        assert widened(model) == ["gemm", "matmul"]
        ir.save(model, tmp_path / "wide.onnx")
        ids = {"ids": np.arange(16)[::-1].copy()}
        expected, found = (oq.session(p).run(None, ids)[0] for p in (path, tmp_path / "wide.onnx"))
        assert found.dtype == dtype
        assert distance(found, expected.astype(np.float64)) < tolerance


def test_float32_is_left_alone(models: tuple[Path, Path]) -> None:
    model = load(models[0])
    before = [(node.op_type, node.name) for node in model.graph]
    assert not widen_layers(model, linear_sites(model))
    assert [(node.op_type, node.name) for node in model.graph] == before
    assert KEY not in model.metadata_props
    model.metadata_props[KEY] = "{"
    with pytest.raises(ModelError, match=KEY):
        widened(model)


def in_float32(path: Path, folder: Path) -> Path:
    """The same model with all of its bfloat16 in float32, which ONNX Runtime's CPU can run."""
    model = ir.load(path)
    assert widen_bfloat16(model)
    ir.save(model, folder / f"wide.{path.name}")
    return folder / f"wide.{path.name}"


@pytest.mark.parametrize(
    ("scheme", "options"),
    [*((scheme, {}) for scheme in SCHEMES), ("a8w8", {"mixed": True}), ("a8w8-block", {"kv_cache": "int4"})],
    ids=str,
)
def test_bfloat16_is_quantized_as_float32_is(
    models: tuple[Path, Path], tmp_path: Path, scheme: str, options: dict[str, Any]
) -> None:
    source = write(tmp_path, ml_dtypes.bfloat16)
    options = {"scheme": scheme, "seed": 1, "block": 16 if scheme == "a4w4" else None, **options}
    report = oq.quantize(source, tmp_path / "q.onnx", [feeds(ml_dtypes.bfloat16)], **options)
    assert len(report.quantized) == 15
    caches = (ir.DataType.UINT8,) if "kv_cache" in options else (ir.DataType.BFLOAT16,)
    outputs = ir.load(tmp_path / "q.onnx").graph.outputs
    assert [v.dtype for v in outputs] == [ir.DataType.BFLOAT16, *caches * (2 * CONFIG.layers)]
    oq.quantize(models[0], tmp_path / "twin.onnx", [feeds(np.float32)], **options)
    exact = logits(models[0], np.float32)
    losses = [
        distance(logits(p, np.float32), exact)
        for p in (tmp_path / "twin.onnx", in_float32(tmp_path / "q.onnx", tmp_path))
    ]
    assert losses[1] < 1.15 * losses[0] + 0.02  # weights of bfloat16 are off by that much before


def test_bfloat16_cannot_be_evaluated_and_says_so(tmp_path: Path) -> None:
    source = write(tmp_path, ml_dtypes.bfloat16)
    with pytest.raises(ModelError, match="bfloat16"):
        oq.evaluate(source, source, [feeds(ml_dtypes.bfloat16)])
