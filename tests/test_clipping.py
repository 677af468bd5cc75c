from __future__ import annotations

import numpy as np
import pytest

from onnx_quarot.clipping import fit_rows
from onnx_quarot.scheme import TensorSpec

SPECS = [
    TensorSpec(bits=8, method="mse"),
    TensorSpec(bits=4, method="mse"),
    TensorSpec(bits=4, signed=False, symmetric=False, method="mse"),
    TensorSpec(bits=8, signed=False, symmetric=False, method="mse"),
]


def rounded(rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, spec: TensorSpec) -> np.ndarray:
    first, last = spec.bounds
    codes = np.clip(np.rint(rows / scale[:, None]) + zero[:, None], first, last)
    return (codes - zero[:, None]) * scale[:, None]


def plain(rows: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Rounding in the full range of each row."""
    first, last = spec.bounds
    low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    if spec.symmetric:
        high = np.maximum(-low, high)
        low = -high
    scale = (high - low) / (last - first)
    return rounded(rows, scale, np.rint(first - low / scale), spec)


@pytest.mark.parametrize("spec", SPECS)
def test_never_worse_than_the_full_range_and_better_at_four_bits(spec: TensorSpec) -> None:
    rows = np.random.default_rng(0).standard_t(4, (200, 64)).astype(np.float32)
    scale, zero = fit_rows(rows, spec)
    got = np.square(rounded(rows, scale, zero, spec) - rows).sum(1)
    before = np.square(plain(rows, spec) - rows).sum(1)
    assert (got <= before * (1 + 1e-5)).all()
    if spec.bits == 4:
        assert got.sum() < 0.95 * before.sum()


def test_importance_moves_the_range_to_what_counts() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    rows[:, 0] = 9
    spec, importance = SPECS[1], np.full(64, 1e-6, np.float32)
    importance[0] = 1
    only = rounded(rows, *fit_rows(rows, spec, importance), spec)
    without = rounded(rows, *fit_rows(rows, spec, 1 - importance), spec)
    np.testing.assert_allclose(only[:, 0], 9, rtol=1e-5)
    assert (without[:, 0] < 6).all()


@pytest.mark.parametrize("spec", SPECS)
def test_rows_of_zeros_and_of_one_sign(spec: TensorSpec) -> None:
    rows = np.stack([np.zeros(16), np.linspace(0.5, 1, 16), -np.linspace(0.5, 1, 16)]).astype(np.float32)
    scale, zero = fit_rows(rows, spec)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert not rounded(rows, scale, zero, spec)[0].any()
    assert np.abs(rounded(rows, scale, zero, spec) - rows).max() < 0.12


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((33, 8)).astype(np.float32)
    importance = np.random.default_rng(1).random((33, 8)).astype(np.float32)
    spec = SPECS[2]
    whole = fit_rows(rows, spec, importance)
    monkeypatch.setattr("onnx_quarot.clipping._CHUNK", 40)
    for a, b in zip(whole, fit_rows(rows, spec, importance), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_the_method_mse_searches() -> None:
    rows = np.random.default_rng(0).standard_t(4, (20, 64)).astype(np.float32)
    scale, zero = fit_rows(rows, TensorSpec(bits=4))
    np.testing.assert_allclose(scale, np.abs(rows).max(1) / 7, rtol=1e-6)
    assert not zero.any()
    np.testing.assert_allclose(
        rounded(rows, scale, zero, TensorSpec(bits=4)), plain(rows, TensorSpec(bits=4)), rtol=1e-5
    )
