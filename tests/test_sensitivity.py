"""One layer quantized alone: the same as a model in which only that layer is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnx_quarot as oq
import small_llama
from exports import RUNTIME
from onnx_quarot.errors import ModelError
from onnx_quarot.judged import Divergence, squared_error
from onnx_quarot.load import load
from onnx_quarot.plan_options import KEY, PlanOptions, recorded_options
from onnx_quarot.sensitivity import measure_sensitivity
from onnx_quarot.sites import linear_sites

CONFIG = small_llama.Config(separate_qkv=True)
Feeds = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("sensitivity") / "m.onnx", CONFIG)


def feeds() -> Feeds:
    return small_llama.decoder_feeds(CONFIG, np.random.default_rng(0), length=24)


def distance(source: Path, candidate: Path) -> float:
    a, b = (oq.session(path).run(["logits"], feeds()) for path in (source, candidate))
    return squared_error(a, b)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("a8w8", {}),
        ("a8w8", {"rotations": ()}),
        ("a8w4", {}),
        ("a8w8-block", {"block": 32}),
        ("a8w4-dynamic", {"block": 32}),
        ("a8w8-dynamic-tensor", {}),
        ("a4w4", {"block": 16}),
    ],
    ids=str,
)
def test_alone_is_what_the_model_with_one_layer_quantized_shows(
    source: Path, tmp_path: Path, scheme: str, options: dict[str, Any]
) -> None:
    if scheme == "a8w4-dynamic" and RUNTIME < (1, 32):
        pytest.skip(f"GroupQueryAttention of ONNX Runtime {ort.__version__} takes a key of unknown shape for none")
    options = {"scheme": scheme, "op_types": ("MatMul",), **options}
    turned: dict[str, Any] = {"seed": 3, "rotations": options.pop("rotations", ("R1", "R2", "R4"))}
    oq.quantize(source, tmp_path / "q.onnx", [feeds()], **options, **turned, tied=False)
    oq.rotate(source, tmp_path / "rotated.onnx", **turned)  # quantizing one layer alone rotates for that one
    found = measure_sensitivity(source, tmp_path / "q.onnx", feeds())
    names = [site.node_name for site in linear_sites(load(source))]
    assert [name for layer in found.layers for name in layer.name.split(", ")] == names
    together = 1 if scheme == "a8w4-dynamic" else 0  # gate and up projection are one operator
    assert found.quantized == len(found.layers) == len(names) - together * CONFIG.layers
    assert found.measure == "relative squared error"
    assert found.all == pytest.approx(distance(source, tmp_path / "q.onnx"), rel=2e-2)
    for layer in (found.layers[4], found.layers[-1]):
        others = {name: None for name in names if name not in layer.name.split(", ")}
        oq.quantize(tmp_path / "rotated.onnx", tmp_path / "one.onnx", [feeds()], **options, rotations=(), layers=others)
        assert layer.error == pytest.approx(distance(source, tmp_path / "one.onnx"), rel=2e-2), layer.name


def test_divergence_of_predictions(source: Path, tmp_path: Path) -> None:
    oq.quantize(source, tmp_path / "q.onnx", [feeds()], op_types=("MatMul",))
    found = measure_sensitivity(source, tmp_path / "q.onnx", feeds(), logits="logits")
    assert found.measure == "KL divergence, nats"
    assert found.rows == 24
    a, b = (oq.session(path).run(["logits"], feeds())[0] for path in (source, tmp_path / "q.onnx"))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    expected = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
    assert Divergence(a, np.arange(24))(b) == pytest.approx(expected, rel=1e-3)
    assert found.all == pytest.approx(expected, rel=2e-2)
    assert all(0 < layer.error < found.all for layer in found.layers)


def test_without_the_time_for_all_layers_some_are_measured(source: Path, tmp_path: Path) -> None:
    oq.quantize(source, tmp_path / "q.onnx", [feeds()])
    found = measure_sensitivity(source, tmp_path / "q.onnx", feeds(), seconds=1e-9, first=["/lm_head/MatMul"])
    assert [layer.name for layer in found.layers] == ["/lm_head/MatMul"]
    assert found.quantized == len(linear_sites(load(source)))


def test_what_a_plan_was_made_with_is_recorded(source: Path, tmp_path: Path) -> None:
    oq.rotate(source, tmp_path / "r.onnx", seed=5, rotations=("R1", "R4"), block_size=16)
    assert recorded_options(load(tmp_path / "r.onnx")) == PlanOptions(("R1", "R4"), 16, 5)
    assert recorded_options(load(source)) is None
    model = load(tmp_path / "r.onnx")
    for text in ("{", "[]", '{"version": 2}', '{"version": 1, "pairs": 1}'):
        model.metadata_props[KEY] = text
        with pytest.raises(ModelError, match=KEY):
            recorded_options(model)


def test_models_that_do_not_belong_together(source: Path, tmp_path: Path) -> None:
    oq.quantize(source, tmp_path / "q.onnx", [feeds()], seed=1)
    wider = small_llama.save(tmp_path / "other.onnx", small_llama.Config(separate_qkv=True, ffn=64))
    with pytest.raises(ModelError, match="was made from another model"):
        measure_sensitivity(wider, tmp_path / "q.onnx", feeds())
    with pytest.raises(ModelError, match="has no quantized layer"):
        measure_sensitivity(source, source, feeds())
    model = ir.load(tmp_path / "q.onnx")
    del model.metadata_props[KEY]
    ir.save(model, tmp_path / "q.onnx")
    with pytest.raises(ModelError, match="does not say how it was rotated"):
        measure_sensitivity(source, tmp_path / "q.onnx", feeds())
