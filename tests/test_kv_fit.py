from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnx_quarot as oq
import small_llama
from onnx_quarot.discovery.rope import unfuse_rope
from onnx_quarot.editing import GraphNames
from onnx_quarot.kv_cache import _caches, _centre
from onnx_quarot.kv_fit import CacheFit, Scores, WeightedSample, row_weights
from onnx_quarot.load import load

LLAMA = small_llama.Config(layers=2, vocab=160)


def test_centred_values_and_keys_leave_the_logits_alone(tmp_path: Path) -> None:
    """In float, nothing but rounding changes; the cache itself loses the offsets."""
    source = small_llama.save(tmp_path / "model.onnx", LLAMA)
    model, rng = load(source), np.random.default_rng(0)
    unfuse_rope(model)
    width = LLAMA.kv_heads * LLAMA.head_size
    names, one = GraphNames(model.graph), np.ones(1, np.float32)
    offsets = [rng.standard_normal(width).astype(np.float32) for _ in range(2)]
    for cache in _caches(model):
        _centre(model.graph, names, cache, [CacheFit(offset, one) for offset in offsets])
    ir.save(model, tmp_path / "centred.onnx")
    feeds = small_llama.decoder_feeds(LLAMA, rng, 12)
    outputs = ["logits", "present.0.key", "present.0.value"]
    before, after = (oq.session(p).run(outputs, feeds) for p in (source, tmp_path / "centred.onnx"))
    np.testing.assert_allclose(after[0], before[0], atol=2e-4)
    for offset, a, b in zip(offsets, before[1:], after[1:], strict=True):
        shift = offset.reshape(1, LLAMA.kv_heads, 1, -1)
        np.testing.assert_allclose(a - b, np.broadcast_to(shift, a.shape), atol=1e-5)


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    s = query @ key.T / key.shape[1] ** 0.5
    s[np.arange(len(key))[None, :] > np.arange(len(query))[:, None]] = -np.inf
    p = np.exp(s - s.max(axis=1, keepdims=True))
    out: np.ndarray = (p / p.sum(axis=1, keepdims=True)) @ value
    return out


def test_weights_predict_what_an_error_does_to_the_output() -> None:
    """One head: a small error in one token's value moves the outputs by as much as its weight says, squared."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((64, 8)) for _ in range(3))
    key[0] += 2 * query.mean(axis=0)
    _, of_values, _ = row_weights(query, key[:, None], value[:, None], Scores(1, 1))
    exact = np.zeros(64)
    for token in range(64):
        moved = value.copy()
        moved[token, 0] += 1e-3
        change = (attention(query, key, moved) - attention(query, key, value))[::4]
        exact[token] = (change**2).sum() / 1e-6
    np.testing.assert_allclose(of_values[:, 0], exact, rtol=1e-6, atol=1e-12)


def test_weights_of_keys() -> None:
    """A small error of a score moves the output by p |value - output|."""
    rng = np.random.default_rng(1)
    query, key, value = (rng.standard_normal((32, 8)) for _ in range(3))
    of_keys, _, _ = row_weights(query, key[:, None], value[:, None], Scores(1, 1))
    for token in (0, 5, 28):
        # Along a query, its own score changes by a known amount.
        change = 0.0
        for number in range(token - token % -4 if token % 4 else token, 32, 4):
            q = query[number]
            moved = key.copy()
            moved[token] += 1e-4 * q * 8**0.5 / (q @ q)
            a, b = (attention(query, k, value)[number] for k in (key, moved))
            change += ((b - a) ** 2).sum() / 1e-8
        assert of_keys[token, 0] == pytest.approx(change, rel=2e-3)


def test_scores_see_the_window_and_the_past() -> None:
    rng = np.random.default_rng(2)
    query, key, value = rng.standard_normal((4, 8)), rng.standard_normal((12, 1, 8)), rng.standard_normal((12, 1, 8))
    _, weights, _ = row_weights(query, key, value, Scores(1, 1, window=3))
    assert np.flatnonzero(weights[:, 0]).tolist() == [6, 7, 8]  # the first query, at position 8; the others are skipped


def test_queries_whose_keys_a_window_has_dropped_say_nothing() -> None:
    rng = np.random.default_rng(2)
    query, key, value = rng.standard_normal((32, 8)), rng.standard_normal((6, 1, 8)), rng.standard_normal((6, 1, 8))
    found = row_weights(query, key, value, Scores(1, 1, window=6))
    for dropped, left in zip(found, row_weights(query[-6:], key, value, Scores(1, 1, window=6)), strict=True):
        np.testing.assert_array_equal(dropped, left)
    assert np.isfinite(found[0]).all()


def test_a_sample_keeps_what_weighs_and_estimates_the_rest() -> None:
    rng = np.random.default_rng(3)
    sample = WeightedSample(1, 4)
    total, mean = 0.0, np.zeros(4)
    for _ in range(10):
        rows, weights = rng.standard_normal((600, 4)).astype(np.float32) + 3, rng.uniform(0, 1, (600, 1))
        rows[0], weights[0] = -5, 300.0
        sample.update(rows, weights)
        even = 0.02 * weights.mean()
        total, mean = total + (weights + even).sum(), mean + ((weights + even) * rows).sum(axis=0)
    assert (sample._rows[0, :, 0] == -5).sum() == 10
    assert sample._rows.shape == (1, 1024, 4)
    estimate = (sample._shares() * sample._rows[0]).sum(axis=0)
    np.testing.assert_allclose(estimate, mean / total, atol=0.3)


def test_covariances_are_those_of_all_rows_and_heads_draw_for_themselves() -> None:
    rng = np.random.default_rng(5)
    sample, seen, heavy = WeightedSample(2, 4), [], []
    for _ in range(6):
        rows, weights = rng.standard_normal((500, 8)).astype(np.float32) + 9, rng.uniform(0, 1, (500, 2)) ** 4
        sample.update(rows, weights)
        seen.append(rows.reshape(500, 2, 4))
        heavy.append(weights + 0.02 * weights.mean(axis=0))
    rows, weights = np.concatenate(seen), np.concatenate(heavy)
    for head in range(2):
        expected = np.cov(rows[:, head].T, aweights=weights[:, head], bias=True)
        np.testing.assert_allclose(sample.covariance()[head], expected, atol=1e-6)
        kept = sample._weights[head]
        assert kept.mean() > 1.5 * weights[:, head].mean()
        assert set(map(tuple, sample._rows[head])) <= set(map(tuple, rows[:, head]))


@pytest.mark.parametrize("per_channel", [True, False])
def test_an_offset_saves_most_of_the_error_of_channels_off_zero(per_channel: bool) -> None:
    rng = np.random.default_rng(4)
    rows = (rng.standard_normal((500, 8)) + 20 * rng.standard_normal(8)).astype(np.float32)
    sample = WeightedSample(2, 4)
    sample.update(rows, np.ones((500, 2)))

    def error(fit: CacheFit) -> float:
        q = np.clip(np.round((rows - fit.offset) / fit.scale), -8, 7)
        return float(((q * fit.scale + fit.offset - rows) ** 2).mean())

    plain, centred = (sample.fit(4, per_channel=per_channel, centred=c) for c in (False, True))
    assert not plain.offset.any()
    assert plain.scale.shape == centred.scale.shape == ((8,) if per_channel else (1,))
    assert error(centred) < 0.1
    assert error(centred) < 0.3 * error(plain)


def test_constant_channels_have_finite_scales() -> None:
    sample = WeightedSample(1, 4)
    sample.update(np.full((10, 4), 2.5, np.float32), np.zeros((10, 1)))
    fit = sample.fit(4, per_channel=True, centred=True)
    assert np.isfinite(fit.scale).all()
    assert (fit.scale > 0).all()
    q = np.clip(np.round((2.5 - fit.offset) / fit.scale), -8, 7)
    np.testing.assert_allclose(q * fit.scale + fit.offset, 2.5, rtol=1e-6)
