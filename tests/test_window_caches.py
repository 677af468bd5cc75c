"""Caches of attention that keep a window of the sequence alone, in buffers whose length the caller chooses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

import onnx_quarot as oq
from exports import runnable
from onnx_quarot.data import as_batches, input_specs
from onnx_quarot.errors import ConfigError
from onnx_quarot.verify import random_feeds

WINDOW = 16
CACHES = {"past_key_values.0.key": WINDOW, "past_key_values.0.value": WINDOW}


def tokenizer(vocabulary: int) -> SimpleNamespace:
    return SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[ord(letter) % vocabulary for letter in text]))


def text(length: int) -> str:
    letters = np.random.default_rng(0).integers(32, 126, length)
    return "".join(map(chr, letters)) + "\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model whose first layer has a window that is longer than what is fed to verify."""
    model = ir.load(runnable("genai_gptoss"))
    for node in model.graph:
        if node.attributes.get_int("sliding_window_cache", 0):
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", WINDOW)
    ir.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_text_and_random_inputs_give_them_room(path: Path) -> None:
    specs = input_specs(path)
    assert {s.name: s.window for s in specs if s.window is not None} == CACHES
    rows = next(spec.rows for spec in specs if spec.name == "input_ids")
    assert rows is not None
    batch = next(as_batches(text(200), specs, tokenizer=tokenizer(rows), window=40))
    feeds = random_feeds(specs)
    for spec in specs:
        if spec.name.startswith("past"):
            assert batch[spec.name].shape[2] == (spec.window or 0)
            assert not batch[spec.name].any()
            assert feeds[spec.name].shape[2] == (spec.window or WINDOW - feeds["input_ids"].shape[1])
    # What is behind the last token of a cache would be anything.
    assert feeds["attention_mask"].shape[1] == WINDOW


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-dynamic"])
def test_such_a_model_is_quantized_evaluated_and_decoded(path: Path, tmp_path: Path, scheme: str) -> None:
    rows = next(spec.rows for spec in input_specs(path) if spec.name == "input_ids")
    assert rows is not None
    target = tmp_path / "q.onnx"
    report = oq.quantize(path, target, text(1000), scheme=scheme, tokenizer=tokenizer(rows), window=30, windows=20)
    assert report.verification is not None
    assert report.verification.worst < 1e-5
    metrics = oq.evaluate(path, target, text(400), tokenizer=tokenizer(rows), window=30)
    assert metrics.kl_divergence is not None
    assert metrics.kl_divergence < 0.01
    assert metrics.candidate.decode_tokens_per_second is not None


@pytest.mark.parametrize("kv_cache", ["int8", "int8-tensor"])
def test_prompts_that_are_longer_than_the_window_fit_integers(path: Path, tmp_path: Path, kv_cache: str) -> None:
    rows = next(spec.rows for spec in input_specs(path) if spec.name == "input_ids")
    assert rows is not None
    options = {"scheme": "a16w8", "kv_cache": kv_cache, "rotations": ("R1", "R2", "R3")}
    oq.quantize(path, tmp_path / "q.onnx", text(1000), tokenizer=tokenizer(rows), window=30, **options)
    metrics = oq.evaluate(path, tmp_path / "q.onnx", text(400), tokenizer=tokenizer(rows), window=30)
    assert metrics.kl_divergence is not None
    assert metrics.kl_divergence < 0.01


def test_four_bits_in_a_window_need_heads_of_32(path: Path, tmp_path: Path) -> None:
    rows = next(spec.rows for spec in input_specs(path) if spec.name == "input_ids")
    assert rows is not None
    with pytest.raises(ConfigError, match=r"layers\.0.*heads of 16 features.*window 4 bits need a multiple of 32"):
        oq.quantize(path, tmp_path / "q.onnx", text(300), tokenizer=tokenizer(rows), window=30, kv_cache="int4")
