"""The transform beside what it competes with: ``pytest benchmarks/bench_fwht.py --benchmark-group-by=param:n``.

memcpy is the bound no transform can beat, numpy's ``x @ H`` what one writes without a kernel, and fht-cpu (if it is
installed) the best public CPU code, unscaled and for powers of two only. Compare columns within a group: ratios travel
between machines, times do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnx_quarot import _core
from onnx_quarot.transform import hadamard, hadamard_matrix

ROWS = 64
SIZES = [64, 256, 1024, 4096, 576, 1536, 8960]


@pytest.fixture(params=SIZES)
def x(request: pytest.FixtureRequest) -> Any:
    return np.random.default_rng(0).standard_normal((ROWS, request.param)).astype(np.float32)


@pytest.mark.parametrize("isa", _core.isas())
def test_hadamard(benchmark: Any, x: Any, isa: str) -> None:
    out = np.empty_like(x)
    benchmark.group = f"n={x.shape[-1]}"
    benchmark(_core.hadamard, x, out, isa=isa)
    np.testing.assert_allclose(out[:2], x[:2] @ hadamard_matrix(x.shape[-1]), atol=1e-4)


def test_numpy_matmul(benchmark: Any, x: Any) -> None:
    matrix = hadamard_matrix(x.shape[-1]).astype(np.float32)
    benchmark.group = f"n={x.shape[-1]}"
    y = benchmark(np.matmul, x, matrix)
    np.testing.assert_allclose(y, hadamard(x), atol=1e-4)


def test_memcpy(benchmark: Any, x: Any) -> None:
    out = np.empty_like(x)
    benchmark.group = f"n={x.shape[-1]}"
    benchmark(np.copyto, out, x)
    np.testing.assert_array_equal(out, x)


def test_fht_cpu(benchmark: Any, x: Any) -> None:
    fht_cpu = pytest.importorskip("fht_cpu")
    n = x.shape[-1]
    if n & (n - 1) != 0:
        pytest.skip("fht-cpu takes powers of two")
    benchmark.group = f"n={n}"
    # Repeated in place and unscaled, values would grow without bound: zeros stay zeros and cost the same.
    benchmark(fht_cpu.fht_2d_f32_rows, np.zeros_like(x), 1)
    once = x.copy()
    fht_cpu.fht_2d_f32_rows(once, 1)
    np.testing.assert_allclose(once, hadamard(x, scale=1.0), atol=1e-2)


@pytest.mark.parametrize("n", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["transform alone", "static scale", "scale a row"])
def test_quantize(benchmark: Any, n: int, kind: str) -> None:
    """Rows in first-level cache, transformed and made int8: compare with the transform alone."""
    x = np.random.default_rng(0).standard_normal((4096 // n, n)).astype(np.float32)
    y, out, scales = np.empty_like(x), np.empty(x.shape, np.int8), np.empty((len(x), 1), np.float32)
    benchmark.group = f"quantize, n={n}"
    expected = hadamard(x)
    if kind == "transform alone":
        benchmark(_core.hadamard, x, y)
        np.testing.assert_array_equal(y, expected)
    elif kind == "static scale":
        benchmark(_core.hadamard_quantize, x, out, 0.03)
        assert np.abs(out - np.clip(expected / 0.03, -128, 127)).max() < 0.501
    else:
        benchmark(_core.hadamard_dynamic_quantize, x, out, scales)
        assert np.abs(out - expected / scales).max() < 0.501


@pytest.mark.parametrize("n", [64, 1536])
def test_call_overhead(benchmark: Any, n: int) -> None:
    """One short row: what the Python call costs."""
    row = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    out = np.empty_like(row)
    benchmark.group = f"one row of {n}"
    benchmark(hadamard, row, out=out)
    np.testing.assert_allclose(out, row @ hadamard_matrix(n), atol=1e-4)
