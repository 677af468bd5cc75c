from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_quarot.observers import Range
from onnx_quarot.qparams import (
    QuantizedWeight,
    activation_parameters,
    bias_floor,
    bias_scale,
    quantize_symmetric,
    quantized_bias,
)
from onnx_quarot.scheme import TensorSpec

UINT8 = TensorSpec(signed=False, symmetric=False)
SPECS = [UINT8, TensorSpec(), TensorSpec(symmetric=False), TensorSpec(bits=16, signed=False, symmetric=False)]
positive = st.floats(0, 2.0**60, width=32)


@given(positive, positive, st.sampled_from(SPECS))
@settings(max_examples=300, deadline=None)
def test_the_same_numbers_as_onnxruntime(low: float, high: float, spec: TensorSpec) -> None:
    quant_utils = pytest.importorskip("onnxruntime.quantization.quant_utils")
    bounds = (np.array(bound, spec.numpy_dtype) for bound in spec.bounds)
    low32, high32 = np.array(-low, np.float32), np.array(high, np.float32)
    zero, scale = quant_utils.compute_scale_zp(low32, high32, *bounds, symmetric=spec.symmetric)
    ours, our_zero = activation_parameters(Range(-low, high), spec)
    # Before 1.28 theirs is rounded in another order.
    assert abs(float(ours) - float(scale)) <= 2 * np.spacing(np.float32(scale))
    assert abs(int(our_zero) - int(zero)) <= (0 if ours == scale else 1)


@given(st.integers(0, 10**6), st.sampled_from([None, 0, 1]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_weights_are_within_half_a_step(seed: int, axis: int | None, unsigned: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((5, 9)) * np.exp(3 * rng.standard_normal((5, 9)))).astype(np.float32)
    made = QuantizedWeight(
        "w", weight.shape, TensorSpec(per_channel=True), axis, lambda: weight, lambda: None, unsigned=unsigned
    )
    integers = made.tensor("q").numpy()
    scale = made.scale_tensor("s").numpy()
    assert integers.dtype == (np.uint8 if unsigned else np.int8)
    assert made.zero_point == (128 if unsigned else 0)
    steps = integers.astype(np.int64) - made.zero_point
    wide = scale[:, None] if axis == 0 else scale
    assert np.abs(steps).max() == 127
    assert (np.abs(steps * wide.astype(np.float64) - weight) <= wide * 0.5001).all()


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((37, 8)).astype(np.float32)
    scale = np.abs(weight).max(1) / 127
    whole = quantize_symmetric(weight, scale, 0, TensorSpec())
    monkeypatch.setattr("onnx_quarot.qparams._CHUNK_ELEMENTS", 24)
    np.testing.assert_array_equal(quantize_symmetric(weight, scale, 0, TensorSpec()), whole)


def test_each_order_of_reading_gives_the_same_and_lets_the_source_go() -> None:
    weight = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    log: list[str] = []

    def make() -> QuantizedWeight:
        def read() -> np.ndarray:  # type: ignore[type-arg]
            log.append("read")
            return weight

        return QuantizedWeight("w", (6, 4), TensorSpec(per_channel=True), 1, read, lambda: log.append("close"))

    first, second = make(), make()
    q1, s1 = first.tensor("q").numpy(), first.scale_tensor("s").numpy()
    assert log == ["read", "close"]
    log.clear()
    s2, q2 = second.scale_tensor("s").numpy(), second.tensor("q").numpy()
    assert log == ["read", "close", "read", "close"]
    np.testing.assert_array_equal(q1, q2)
    np.testing.assert_array_equal(s1, s2)


def test_a_bias_fits_an_int32_and_keeps_its_value() -> None:
    weight = np.full((4, 3), 1e-20, np.float32)
    weight[:, 1] = 1.0
    bias = np.array([5.0, -0.3, 1e6], np.float32)
    xs = np.float32(0.01)
    made = QuantizedWeight("w", (4, 3), TensorSpec(per_channel=True), 1, lambda: weight, lambda: None)
    made.raise_floor(bias_floor(bias, xs))
    unit, steps = bias_scale(xs, made)(), quantized_bias(bias, xs, made)()
    assert steps.dtype == np.int32
    assert np.abs(steps.astype(np.int64)).max() <= 2**30 * 1.001
    np.testing.assert_array_equal(unit, xs * made.scale())
    np.testing.assert_allclose(steps * unit.astype(np.float64), bias, rtol=1e-3)
    assert made.tensor("q").dtype == ir.DataType.INT8
