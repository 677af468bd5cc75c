"""Quantization schemes: what `a8w8` means, as a table.

A scheme is written `a<bits>w<bits>`, activation first; `w8a8` names the same scheme as `a8w8`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from .errors import ConfigError

METHODS = ("minmax", "percentile", "mse")

_STORAGE: dict[tuple[int, bool], tuple[ir.DataType, np.dtype]] = {
    (4, True): (ir.DataType.INT4, np.dtype(ml_dtypes.int4)),
    (4, False): (ir.DataType.UINT4, np.dtype(ml_dtypes.uint4)),
    (8, True): (ir.DataType.INT8, np.dtype(np.int8)),
    (8, False): (ir.DataType.UINT8, np.dtype(np.uint8)),
    (16, True): (ir.DataType.INT16, np.dtype(np.int16)),
    (16, False): (ir.DataType.UINT16, np.dtype(np.uint16)),
}


@dataclass(frozen=True)
class TensorSpec:
    """How one kind of tensor is quantized.

    bits: 4, 8 or 16. signed: integer type. symmetric: the range is made [-m, m]; a signed symmetric type then
    leaves out its lowest value (int8: -127..127). per_channel: one scale an output channel instead of one a
    tensor. method: how activations get their range, one of METHODS (weights always use their own extremes).
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    per_channel: bool = False
    method: str = "minmax"

    def __post_init__(self) -> None:
        if (self.bits, self.signed) not in _STORAGE:
            raise ConfigError(f"bits: {self.bits} is not supported; use 4, 8 or 16")
        if self.method not in METHODS:
            raise ConfigError(f"method: {self.method!r} is not supported; use one of {', '.join(METHODS)}")

    @property
    def dtype(self) -> ir.DataType:
        """The ONNX type of the quantized values."""
        return _STORAGE[self.bits, self.signed][0]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The numpy type of the quantized values (ml_dtypes for 4 bits)."""
        return _STORAGE[self.bits, self.signed][1]

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest integer that is used."""
        if not self.signed:
            return 0, 2**self.bits - 1
        high = 2 ** (self.bits - 1) - 1
        return (-high if self.symmetric else -high - 1), high


@dataclass(frozen=True)
class Scheme:
    """A named pair of specs: one for the activations that enter linear layers, one for their weights."""

    name: str
    activation: TensorSpec
    weight: TensorSpec

    def with_method(self, method: str | None) -> Scheme:
        """The same scheme with another range method for activations; None changes nothing."""
        return self if method is None else replace(self, activation=replace(self.activation, method=method))


# uint8 with a zero point costs the same as symmetric int8 in every kernel, and uses the whole of its 256
# levels where a distribution is skewed (what follows an activation function).
SCHEMES: dict[str, Scheme] = {
    "a8w8": Scheme(
        "a8w8",
        activation=TensorSpec(bits=8, signed=False, symmetric=False, method="mse"),
        weight=TensorSpec(bits=8, signed=True, symmetric=True, per_channel=True),
    ),
}


def parse_scheme(name: str | Scheme) -> Scheme:
    """The scheme called `name` (`a8w8` or `w8a8`, any case); ConfigError lists the supported ones."""
    if isinstance(name, Scheme):
        return name
    key = re.sub(r"^(w\d+)(a\d+)", r"\2\1", name.strip().lower())
    if key not in SCHEMES:
        raise ConfigError(f"scheme: {name!r} is not supported; use one of {', '.join(SCHEMES)}")
    return SCHEMES[key]
