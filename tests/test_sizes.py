"""Every size up to 2^16 on every instruction set, and values at the edges of float32."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnx_quarot import _core

ISAS = _core.isas()
LIMIT = 2**16
# Sizes that are no multiple of 4 have no Hadamard matrix, but for 1 and 2.
SIZES = [n for n in (1, 2, *range(4, LIMIT + 1, 4)) if _core.has_order(n)]
ORDERS = sorted({_core.factorize(n)[0] for n in SIZES})
Float64 = npt.NDArray[np.float64]


@cache
def factor_matrix(order: int) -> Float64:
    return _core.order_matrix(order).astype(np.float64)


def kronecker_transform(x: Float64, transpose: bool) -> Float64:
    """``x @ H`` in float64, one Kronecker factor after the other: orders by their matrices, the twos by butterflies."""
    rows, n = x.shape
    order, power = _core.factorize(n)
    done, rest = 1, n
    for factor in [*_core.order_factors(order), *[2] * power]:
        rest //= factor
        y = x.reshape(rows * done, factor, rest)
        if factor == 2:
            x = np.stack((y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]), axis=1)
        else:
            h = factor_matrix(factor)
            x = np.matmul(h if transpose else h.T, y)
        done *= factor
    return x.reshape(rows, n) / n**0.5


def test_reference_is_the_product_with_the_matrix() -> None:
    for n in (8, 12, 24, 560):
        order, power = _core.factorize(n)
        h = _core.order_matrix(order).astype(np.float64)
        for _ in range(power):
            h = np.kron(h, [[1.0, 1.0], [1.0, -1.0]])
        x = np.random.default_rng(n).standard_normal((3, n))
        np.testing.assert_allclose(kronecker_transform(x, False), x @ h / n**0.5, atol=1e-12)
        np.testing.assert_allclose(kronecker_transform(x, True), x @ h.T / n**0.5, atol=1e-12)


def test_sizes_are_all_there() -> None:
    assert {2**power for power in range(17)} <= set(SIZES)
    assert {1, 12, 20, 28, 36, 44, 60, 76, 140, 172, 188} <= set(ORDERS)
    # A size never loses its matrix by another factor of two.
    assert all(2 * n in set(SIZES) for n in SIZES if 2 * n <= LIMIT)


@pytest.mark.parametrize("order", ORDERS)
def test_every_size_of_an_order(order: int) -> None:
    for n in (n for n in SIZES if _core.factorize(n)[0] == order):
        x = np.random.default_rng(n).standard_normal((2, n)).astype(np.float32)
        for transpose in (False, True):
            expected = kronecker_transform(x.astype(np.float64), transpose)
            results = [_core.hadamard(x, isa=isa, transpose=transpose) for isa in ISAS]
            error = np.abs(results[0] - expected).max() / np.abs(expected).max()
            assert error < 2e-6, f"n = {n}, transpose {transpose}: off by {error:.1e} of the largest value"
            for isa, result in zip(ISAS[1:], results[1:], strict=True):
                # As integers: -0.0 is not 0.0.
                same = np.array_equal(result.view(np.uint32), results[0].view(np.uint32))
                assert same, f"n = {n}, transpose {transpose}: {isa} differs from {ISAS[0]}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [4, 64, 4096, 12, 20, 576, 8960])
def test_denormals_are_not_flushed(isa: str, n: int) -> None:
    smallest = np.float32(2.0**-149)
    count = np.random.default_rng(n).integers(-40, 40, (3, n)).astype(np.float64)
    x = (count * float(smallest)).astype(np.float32)
    assert np.count_nonzero(x) == np.count_nonzero(count)
    sums = np.rint(kronecker_transform(count, False) * n**0.5)
    # Sums of multiples of the smallest number are exact.
    np.testing.assert_array_equal(_core.hadamard(x, isa=isa, scale=1.0), (sums * float(smallest)).astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 2, 8, 32, 128, 1024, 2**14, 12, 20, 144, 172, 576, 5632, 8960])
def test_nan_reaches_all_of_its_row_and_no_other(isa: str, n: int) -> None:
    clean = np.random.default_rng(n).standard_normal((5, n)).astype(np.float32)
    expected = _core.hadamard(clean, isa=isa)
    for value in (np.nan, np.inf, -np.inf):
        for position in sorted({0, n // 3, n - 1}):
            x = clean.copy()
            x[2, position] = value
            y = _core.hadamard(x, isa=isa)
            assert np.isnan(y[2]).all() if np.isnan(value) else not np.isfinite(y[2]).any(), f"{value} at {position}"
            others = [0, 1, 3, 4]
            np.testing.assert_array_equal(y[others], expected[others])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_no_rows_and_rows_of_zeros(isa: str, dtype: Any) -> None:
    for n in (4, 64, 576, 8960):
        assert _core.hadamard(np.empty((0, n), dtype), isa=isa).shape == (0, n)
        assert not _core.hadamard(np.zeros((3, n), dtype), isa=isa).any()
