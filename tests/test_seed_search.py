"""Trying seeds: the best is kept, the spread is told, and the result is that of the seed alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

import onnx_quarot as oq
import small_llama
from onnx_quarot.errors import ConfigError, DataError
from onnx_quarot.seed_search import SeedSearch, plain_seed, search_count
from small_llama import Config

CONFIG = Config(layers=1)


def test_the_best_of_the_seeds_is_kept(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "m.onnx", CONFIG)
    rng = np.random.default_rng(0)
    batches = [small_llama.decoder_feeds(CONFIG, rng, length=16) for _ in range(2)]
    report = oq.quantize(source, tmp_path / "best.onnx", iter(batches), seed="search:3")
    losses = []
    for seed in range(3):
        oq.quantize(source, tmp_path / f"{seed}.onnx", batches, seed=seed)
        losses.append(oq.evaluate(source, tmp_path / f"{seed}.onnx", batches).kl_divergence)
    best = int(np.argmin(losses))
    assert (tmp_path / "best.onnx").read_bytes() == (tmp_path / f"{best}.onnx").read_bytes()
    assert report.verification is not None
    (note,) = (n for n in report.notes if n.startswith("seed"))
    found = re.fullmatch(r"seed (\d) of 0 to 2: distance (\S+) .* \(median of all (\S+), worst (\S+)\)", note)
    assert found is not None, note
    assert int(found[1]) == best
    np.testing.assert_allclose([float(found[i]) for i in (2, 3, 4)], np.sort(losses), rtol=1e-3)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == ["0.onnx", "1.onnx", "2.onnx", "best.onnx", "m.onnx"]


def test_other_texts_and_other_places_are_refused(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "m.onnx", CONFIG)
    batches = [small_llama.decoder_feeds(CONFIG, np.random.default_rng(0))]
    for text in ("search", "search:0", "search:x", "12"):
        with pytest.raises(ConfigError, match="search:K"):
            oq.quantize(source, tmp_path / "q.onnx", batches, seed=text)
    with pytest.raises(ConfigError, match="needs rotations"):
        oq.quantize(source, tmp_path / "q.onnx", batches, seed="search:2", rotations=())
    with pytest.raises(ConfigError, match="calibration data"):
        oq.rotate(source, tmp_path / "q.onnx", seed="search:2")
    with pytest.raises(ConfigError, match="seed: is -1; give a number of at least 0"):
        oq.rotate(source, tmp_path / "q.onnx", seed=-1)
    filled = [small_llama.decoder_feeds(CONFIG, np.random.default_rng(0), past=3)]
    with pytest.raises(DataError, match=r"fills the cache 'past_key_values\.0\.key'"):
        oq.quantize(source, tmp_path / "q.onnx", filled, seed="search:2", kv_cache="int8")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_counts_and_seeds() -> None:
    assert search_count("search:16") == 16
    assert search_count(7) is None
    assert plain_seed(None) is None
    assert plain_seed(7) == 7
    search = SeedSearch((0.5, 0.25, 1.0))
    assert search.best == 1
    assert "0.25" in search.note()
    assert "0.5" in search.note()
