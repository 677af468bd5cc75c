from __future__ import annotations

import onnx_ir as ir
import pytest

from onnx_quarot.errors import ConfigError
from onnx_quarot.scheme import SCHEMES, TensorSpec, parse_scheme


@pytest.mark.parametrize("name", ["a8w8", "w8a8", " A8W8 ", "W8a8"])
def test_both_orders_and_any_case_name_the_same_scheme(name: str) -> None:
    assert parse_scheme(name) is SCHEMES["a8w8"]
    assert parse_scheme(parse_scheme(name)) is SCHEMES["a8w8"]


def test_a8w8_is_uint8_per_tensor_and_int8_per_channel() -> None:
    scheme = parse_scheme("a8w8")
    assert (scheme.activation.dtype, scheme.activation.bounds) == (ir.DataType.UINT8, (0, 255))
    assert (scheme.weight.dtype, scheme.weight.bounds) == (ir.DataType.INT8, (-127, 127))
    assert scheme.weight.per_channel
    assert not scheme.activation.per_channel


def test_unknown_scheme_lists_the_supported_ones() -> None:
    with pytest.raises(ConfigError, match=r"'a3w8'.*a8w8"):
        parse_scheme("a3w8")


def test_with_method() -> None:
    scheme = parse_scheme("a8w8")
    assert scheme.with_method(None) is scheme
    assert scheme.with_method("percentile").activation.method == "percentile"
    with pytest.raises(ConfigError, match="median"):
        scheme.with_method("median")


@pytest.mark.parametrize(
    ("spec", "bounds"),
    [
        (TensorSpec(bits=8, symmetric=False), (-128, 127)),
        (TensorSpec(bits=4), (-7, 7)),
        (TensorSpec(bits=4, signed=False, symmetric=False), (0, 15)),
        (TensorSpec(bits=16, signed=False, symmetric=False), (0, 65535)),
    ],
)
def test_bounds(spec: TensorSpec, bounds: tuple[int, int]) -> None:
    assert spec.bounds == bounds
    assert spec.numpy_dtype == spec.dtype.numpy()


def test_unsupported_bits() -> None:
    with pytest.raises(ConfigError, match="bits: 5"):
        TensorSpec(bits=5)
