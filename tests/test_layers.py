"""Layers beside their originals, in the bases the rotated model recorded; and the page that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnx_quarot as oq
import small_llama
from onnx_quarot.discovery import discover_model
from onnx_quarot.errors import ModelError
from onnx_quarot.evaluation_page import evaluation_page, render
from onnx_quarot.layers import compare_layers
from onnx_quarot.load import load
from onnx_quarot.op_times import op_times
from onnx_quarot.provenance import KEY, recorded
from small_llama import Config

CONFIG = Config()
Feeds = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Feeds]:
    """The float model, the rotated one, the quantized rotated one, and a batch."""
    folder = tmp_path_factory.mktemp("layers")
    source = small_llama.save(folder / "m.onnx", CONFIG)
    feeds = small_llama.decoder_feeds(CONFIG, np.random.default_rng(0), length=24)
    oq.rotate(source, folder / "r.onnx", seed=3)
    oq.quantize(source, folder / "q.onnx", [feeds], seed=3)
    return source, folder / "r.onnx", folder / "q.onnx", feeds


def test_a_rotated_model_records_its_bases(models: tuple[Path, Path, Path, Feeds]) -> None:
    source, rotated, _, _ = models
    plan = discover_model(load(source), rotations=("R1", "R2", "R4"), seed=3)
    bases = recorded(load(rotated))
    assert bases.values == plan.bases
    assert bases.rotations == plan.rotations
    assert recorded(load(source)).values == {}


def test_a_broken_record_is_told(models: tuple[Path, Path, Path, Feeds]) -> None:
    model = load(models[1])
    for text in ("{", "[]", json.dumps({"version": 2})):
        model.metadata_props[KEY] = text
        with pytest.raises(ModelError, match=KEY):
            recorded(model)


def test_rotation_alone_changes_no_layer(models: tuple[Path, Path, Path, Feeds]) -> None:
    source, rotated, _, feeds = models
    layers = compare_layers(source, rotated, (feeds, feeds))
    assert len(layers) == 4 * 2 + 2 + 1
    for layer in layers:
        assert layer.input_sqnr is None
        assert layer.output_sqnr is not None
        assert layer.output_sqnr > 90, layer.name  # float32 rounding


def test_quantization_noise_is_seen_where_it_arises(models: tuple[Path, Path, Path, Feeds]) -> None:
    source, _, quantized, feeds = models
    layers = compare_layers(source, quantized, (feeds, feeds))
    for layer in layers:
        assert layer.input_sqnr is not None
        assert 20 < layer.input_sqnr < 60, layer.name
        assert layer.output_sqnr is not None
        assert 5 < layer.output_sqnr < 60, layer.name  # the noise of the layers before it adds up
        assert layer.peaks[0].shape == layer.peaks[1].shape
    before, after = np.median([layer.outlier_ratios() for layer in layers], axis=0)
    assert after < before


def test_layers_of_one_operator_are_found_in_it(tmp_path: Path) -> None:
    """QLinear holds norms, rotations and several layers: what enters is what it multiplies."""
    config = Config(layers=1, separate_qkv=True)
    source = small_llama.save(tmp_path / "m.onnx", config)
    feeds = small_llama.decoder_feeds(config, np.random.default_rng(0), length=24)
    oq.quantize(source, tmp_path / "q.onnx", [feeds], scheme="a8w8-dynamic", seed=3)
    oq.rotate(source, tmp_path / "r.onnx", seed=3)
    found, rotated = (
        {layer.name.split("/")[-2]: layer for layer in compare_layers(source, tmp_path / name, (feeds, feeds))}
        for name in ("q.onnx", "r.onnx")
    )
    # Of the gate and what it multiplies, one operator is left, named like the gate.
    assert list(found) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
    for name, layer in found.items():
        if name != "lm_head":  # tied to a table of integers, it is rotated in another way
            np.testing.assert_allclose(layer.peaks[1], rotated[name].peaks[1], rtol=0.1, atol=0.1, err_msg=name)
        assert (layer.output_sqnr is None) == (name == "gate_proj")
        assert layer.output_sqnr is None or 20 < layer.output_sqnr < 60


def test_models_without_a_common_layer(models: tuple[Path, Path, Path, Feeds], tmp_path: Path) -> None:
    source, _, _, feeds = models
    model = load(source)
    for node in model.graph:
        node.name = f"other{node.name}"
    ir.save(model, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="no linear layer in common"):
        compare_layers(source, tmp_path / "other.onnx", (feeds, feeds))


def test_times_by_operator(models: tuple[Path, Path, Path, Feeds]) -> None:
    times = op_times(models[1], models[3])
    assert list(times.values()) == sorted(times.values(), reverse=True)
    assert {"MatMul", "GroupQueryAttention", "Hadamard"} <= times.keys()
    assert all(ms >= 0 for ms in times.values())


def test_the_page_shows_every_layer_and_loads_nothing(models: tuple[Path, Path, Path, Feeds]) -> None:
    source, _, quantized, feeds = models
    metrics = oq.evaluate(source, quantized, [feeds])
    html = evaluation_page(source, quantized, metrics, [feeds])
    assert html.count("/model/layers.0/mlp/down_proj/MatMul: input") == 1
    assert html.count("<circle") == (3 * 2 + 1) * (4 * 2 + 2 + 1)
    assert "KL divergence, nats, over 24 tokens" in html
    assert "src=" not in html
    assert "href=" not in html
    assert f"{metrics.perplexity_ratio:.4f}" in html
    light, dark = (set(re.findall(r"--(\w+):", rules)) for rules in html.split("prefers-color-scheme: dark"))
    assert set(re.findall(r"var\(--(\w+)\)", html)) == light == dark


def test_the_page_says_why_there_are_no_sensitivities(models: tuple[Path, Path, Path, Feeds]) -> None:
    source, rotated, _, feeds = models
    metrics = oq.evaluate(source, rotated, [feeds])
    assert "Not measured: model: " in evaluation_page(source, rotated, metrics, [feeds])
    assert "Not measured, as asked" in evaluation_page(source, rotated, metrics, [feeds], sensitivity=0)


def test_figures_that_are_missing_leave_no_hole(models: tuple[Path, Path, Path, Feeds]) -> None:
    source, rotated, _, feeds = models
    metrics = oq.evaluate(source, rotated, [feeds])
    html = render(
        metrics, compare_layers(source, rotated, (feeds, feeds)), [{"MatMul": 1.0}, {}], "Not measured, as asked."
    )
    assert "Not measured, as asked." in html
    assert "None" not in html.replace("None of the layers", "")
    assert "nan" not in html
