"""Transforms that quantize their results, on every instruction set, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnx_quarot import _core
from onnx_quarot.errors import OrderError
from onnx_quarot.transform import hadamard, hadamard_dynamic_quantize, hadamard_quantize

ISAS = _core.isas()
QUANTIZED: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (64, {}),
    (512, {}),
    (1024, {"scale": -0.05}),
    (8192, {}),
    (576, {"transpose": True}),
    (96, {"block_size": 12}),
    (128, {"block_size": 64}),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "options"), QUANTIZED)
def test_quantized(n: int, options: dict[str, Any], isa: str) -> None:
    rng = np.random.default_rng(n)
    x = (rng.standard_normal((3, 17, n)) * np.exp(rng.standard_normal((3, 17, 1)))).astype(np.float32)
    x[1, 2] = 0
    for signs in (None, rng.choice([-1.0, 1.0], options.get("block_size", n)).astype(np.float32)):
        exact = hadamard(x.astype(np.float64), signs=signs, **options)
        for dtype, zero_point in ((np.int8, 0), (np.int8, -100), (np.uint8, 130)):
            info, q = np.iinfo(dtype), np.empty(x.shape, dtype)
            _core.hadamard_quantize(x, q, 0.02, zero_point, signs=signs, isa=isa, **options)
            wanted = np.clip(exact / 0.02 + zero_point, info.min, info.max)
            np.testing.assert_array_less(np.abs(q - wanted), 0.501)
            assert 0 < np.mean((q == info.min) | (q == info.max)) < 0.5
            if isa == ISAS[0]:
                np.testing.assert_array_equal(
                    hadamard_quantize(x, 0.02, zero_point, dtype=dtype, signs=signs, **options), q
                )
        q, scales = np.empty(x.shape, np.int8), np.empty((3, 17, 1), np.float32)
        _core.hadamard_dynamic_quantize(x, q, scales, signs=signs, isa=isa, **options)
        most = np.abs(exact).max(axis=-1, keepdims=True)
        np.testing.assert_allclose(scales, np.where(most == 0, 1, most / 127), rtol=3e-6)
        np.testing.assert_array_less(np.abs(q - exact / scales), 0.501)
        assert (np.abs(q).max(axis=-1) == np.where(most[..., 0] == 0, 0, 127)).all()
        if isa == ISAS[0]:
            again = hadamard_dynamic_quantize(x, signs=signs, **options)
            np.testing.assert_array_equal(again[0], q)
            np.testing.assert_array_equal(again[1], scales)


@pytest.mark.parametrize("n", [64, 1024, 12])
def test_what_is_not_finite_shows_when_quantized(n: int) -> None:
    results = []
    for isa in ISAS:
        x = np.ones((4, n), np.float32)
        x[0, 3], x[1, 3], x[2] = np.inf, np.nan, 3e38
        q, scales = np.empty(x.shape, np.int8), np.empty((4, 1), np.float32)
        _core.hadamard_dynamic_quantize(x, q, scales, isa=isa)
        assert not np.isfinite(scales[:3]).any()
        np.testing.assert_allclose(scales[3, 0], np.abs(hadamard(x[3])).max() / 127, rtol=1e-6)
        results.append((q, scales))
    for q, scales in results:
        np.testing.assert_array_equal(q[3], results[0][0][3])
        np.testing.assert_array_equal(scales, results[0][1])


def test_quantized_arguments() -> None:
    x = np.ones((2, 64), np.float32)
    assert hadamard_quantize(x[:0], 1.0).shape == (0, 64)
    assert hadamard_dynamic_quantize(x[:0])[1].shape == (0, 1)
    np.testing.assert_array_equal(hadamard_quantize(x[:, ::2], 1.0), hadamard_quantize(x[:, :32].copy(), 1.0))
    with pytest.raises(TypeError, match="float32"):
        hadamard_quantize(x.astype(np.float64), 1.0)
    with pytest.raises(TypeError, match="list"):
        hadamard_dynamic_quantize([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int16"):
        hadamard_quantize(x, 1.0, dtype=np.int16)
    with pytest.raises(ValueError, match="no axis"):
        hadamard_quantize(x[0, 0:1].reshape(()), 1.0)
    with pytest.raises(ValueError, match="zero_point is 128"):
        hadamard_quantize(x, 1.0, 128)
    for y_scale in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="y_scale is"):
            hadamard_quantize(x, y_scale)
    with pytest.raises(ValueError, match="signs"):
        hadamard_quantize(x, 1.0, signs=np.zeros(64))
    with pytest.raises(ValueError, match="signs has length 3"):
        hadamard_dynamic_quantize(x, signs=np.ones(3))
    with pytest.raises(ValueError, match="block_size"):
        hadamard_quantize(x, 1.0, block_size=48)
    with pytest.raises(OrderError):
        hadamard_quantize(np.ones((1, 7), np.float32), 1.0)
    with pytest.raises(ValueError, match="out"):
        _core.hadamard_quantize(x, np.empty((2, 32), np.int8), 1.0)
    with pytest.raises(ValueError, match="scales"):
        _core.hadamard_dynamic_quantize(x, np.empty((2, 64), np.int8), np.empty((2, 2), np.float32))
    with pytest.raises(TypeError):
        _core.hadamard_quantize(x, np.empty((2, 64), np.int16), 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _core.hadamard_quantize(x[:, ::2], np.empty((2, 32), np.int8), 1.0)
