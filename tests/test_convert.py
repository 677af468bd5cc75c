"""The compiled copy between storage types and float64: exact one way, rounded once the other, whatever the strides."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnx_quarot import _core

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def layouts(array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """The same matrix: straight, turned, with gaps, backwards."""
    rows, columns = array.shape
    gaps = np.zeros((rows, 2 * columns), array.dtype)
    gaps[:, ::2] = array
    backwards = np.ascontiguousarray(array[::-1, ::-1])
    return [array, np.asfortranarray(array), gaps[:, ::2], backwards[::-1, ::-1]]


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (65, 129), (0, 4), (4, 0)])
def test_any_strides_both_ways(dtype: Any, shape: tuple[int, int], isa: str) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    for source in layouts(values):
        for target in layouts(np.zeros(shape)):
            _core.convert(source, target, isa=isa)
            np.testing.assert_array_equal(target, values.astype(np.float64))
    for source in layouts(values.astype(np.float64)):
        for target in layouts(np.zeros(shape, dtype)):
            _core.convert(source, target, isa=isa)
            np.testing.assert_array_equal(target, values)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_every_value_and_every_tie(dtype: Any, isa: str) -> None:
    every = np.arange(65536, dtype=np.uint16).view(dtype)
    wide = np.empty((1, every.size))
    with np.errstate(invalid="ignore"):
        expected = every.astype(np.float64)
    _core.convert(every[None], wide, isa=isa)
    np.testing.assert_array_equal(wide[0], expected)

    finite = np.sort(expected[np.isfinite(expected)])
    low, high = finite[:-1], finite[1:]
    middle = (low + high) / 2
    apart = middle != low  # the two zeros
    low, high, middle = low[apart], high[apart], middle[apart]

    def narrowed(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        out = np.empty((1, x.size), dtype)
        _core.convert(x[None], out, isa=isa)
        return out[0]

    # A hair off the middle decides, even one that float32 does not see; the middle itself goes to the even neighbour.
    np.testing.assert_array_equal(narrowed(np.nextafter(middle, np.inf)).astype(np.float64), high)
    np.testing.assert_array_equal(narrowed(np.nextafter(middle, -np.inf)).astype(np.float64), low)
    ties = narrowed(middle)
    assert not (ties.view(np.uint16) & 1).any()
    assert ((ties.astype(np.float64) == low) | (ties.astype(np.float64) == high)).all()

    beyond = finite[-1] + (finite[-1] - finite[-2]) / 2  # the tie with infinity, whose significand is even
    extreme = np.array([beyond, np.nextafter(beyond, 0), -beyond, np.inf, -np.inf, np.nan, 1e300, -1e-300, 0.0, -0.0])
    found = narrowed(extreme).astype(np.float64)
    np.testing.assert_array_equal(
        found, [np.inf, finite[-1], -np.inf, np.inf, -np.inf, np.nan, np.inf, -0.0, 0.0, -0.0]
    )
    assert np.signbit(found[[7, 9]]).all()
    assert not np.signbit(found[8])


def test_what_does_not_fit_is_refused() -> None:
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"target has shape \(3, 2\)"):
        _core.convert(x, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="two-dimensional"):
        _core.convert(x[0], np.zeros(3))
    with pytest.raises(ValueError, match="one of the two matrices must be float64"):
        _core.convert(x, x.copy())
    with pytest.raises(TypeError, match="int32"):
        _core.convert(np.zeros((2, 3), np.int32), np.zeros((2, 3)))
    frozen = np.zeros((2, 3))
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _core.convert(x, frozen)
