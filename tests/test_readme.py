"""The README's Python runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_quarot as oq
import small_llama
from onnx_quarot.load import load
from onnx_quarot.rotation_config import write_rotation_config

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
WIDE = small_llama.Config(layers=1, heads=64, kv_heads=2, head_size=64, ffn=96, vocab=64, tied=False)


def block(having: str) -> str:
    (found,) = (b for b in BLOCKS if having in b)
    return found


def batches(config: small_llama.Config) -> list[dict[str, np.ndarray]]:
    return [small_llama.decoder_feeds(config, np.random.default_rng(0))]


def test_the_native_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_llama.save(tmp_path / "model.onnx")
    names: dict[str, Any] = {"calibration": batches(small_llama.Config())}
    exec(block('scheme="a8w8"'), names)
    assert names["plan"].summary()["declined"] == 0
    assert names["report"].verification.worst < 1e-4
    assert "logits" in [o.name for o in names["session"].get_outputs()]


@pytest.mark.parametrize("with_config", [True, False])
def test_the_face_of_amd_quark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_config: bool) -> None:
    """4096 features, as the snippet says; with the rotation config that discovery writes, and without one."""
    monkeypatch.chdir(tmp_path)
    source = small_llama.save(tmp_path / "model.onnx", WIDE, external=True)
    code = block("quantizer.quantize_model")
    if with_config:
        pairs = write_rotation_config(load(source), oq.discover(source))
        assert len(pairs["R1_pairs"]) == 3
        (tmp_path / "rotation_config.json").write_text(json.dumps(pairs))
    else:
        code = code.replace(', r_config_path="rotation_config.json"', "")
    names: dict[str, Any] = {
        "input_model_path": str(source),
        "quantized_model_path": str(tmp_path / "out.onnx"),
        "calib_data_reader": small_llama.Reader(batches(WIDE)),
    }
    exec(code, names)
    feeds = batches(WIDE)[0]
    reference, result = (oq.session(p).run(["logits"], feeds)[0] for p in (source, tmp_path / "out.onnx"))
    assert np.square(reference - result).mean() < 1e-2 * np.square(reference).mean()


def test_the_transform_alone() -> None:
    exec(block("oq.hadamard(x)"), {})


def test_no_block_is_left_out() -> None:
    assert len(BLOCKS) == 3
