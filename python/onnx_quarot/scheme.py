"""Quantization schemes: what `a8w8` means, as a table.

A scheme is written `a<bits>w<bits>`, activation first, with the form that carries it after a dash; `w8a8` names the
same scheme as `a8w8`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from .errors import ConfigError

METHODS = ("minmax", "percentile", "mse", "entropy")
BLOCK_FORMS = ("block", "nbits")  # MatMulNBits
FUSED_BLOCKS = (32, 64, 128)  # of QLinear
FORMS = ("qdq", *BLOCK_FORMS, "dynamic", "fused", "token")
WEIGHT_METHODS = ("rtn", "gptq")

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

    bits: 4, 8 or 16. signed: integer type. symmetric: the range is made [-m, m]; a signed symmetric type then leaves
    out its lowest value (int8: -127..127). per_channel: one scale an output channel instead of one a tensor. method:
    how activations get their range, one of METHODS; of weights minmax (their extremes) or mse (the range of least
    squared error).
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
    """How linear layers are quantized: the activations that enter them, their weights, and the form in the graph.

    form: one of FORMS.
      qdq: QuantizeLinear and DequantizeLinear with static ranges, per tensor.
      block: MatMulNBits with accuracy level 4, which makes activations int8 per row and block while it runs; 4 bits in
        a model that uses the library anyway: onnx_quarot::QLinear, whose function is that operator.
      nbits: MatMulNBits in any model.
      dynamic: DynamicQuantizeMatMul, which finds one range a tensor while it runs.
      fused: onnx_quarot::QLinear, which finds one range a token while it runs.
      token: QuantizeLinear and DequantizeLinear whose scales are computed in the graph, per token and block.
    block: features along the input axis that share a scale, of weights (and, in the form token, of activations);
    None: all of them. weights: how the integers are chosen; rtn rounds to the nearest in a range of least squared
    error, gptq makes up for each column's error in the next ones (Frantar et al., arXiv:2210.17323). head_bits: bits
    of the weights of the layer that makes an output of the graph (a language model's head), None for those of all
    others; more of them make that layer a8w8 in the form token, and in the forms block and nbits a8w8-dynamic-tensor,
    as QLinear where the other layers are. damping: of gptq's Hessians, as a share of their mean diagonal. normalize:
    in the forms qdq and dynamic, rows of activations whose lengths differ too much for one range are divided by them
    (see :mod:`onnx_quarot.normalize`): with 8 bits and less, and the method mse, which tells.
    """

    name: str
    activation: TensorSpec
    weight: TensorSpec
    form: str = "qdq"
    block: int | None = None
    weights: str = "rtn"
    head_bits: int | None = None
    damping: float = 0.01
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"form: {self.form!r} is not supported; use one of {', '.join(FORMS)}")
        if self.weights not in WEIGHT_METHODS:
            raise ConfigError(f"weights: {self.weights!r} is not supported; use one of {', '.join(WEIGHT_METHODS)}")
        if self.block is not None:
            if self.form in ("qdq", "dynamic") or (self.form == "fused" and self.weight.per_channel):
                raise ConfigError(
                    f"block: {self.name} has one scale a channel; a block size is for a8w8-block, a4w4 and a8w4-*"
                )
            if self.block < 16 or self.block & (self.block - 1):
                raise ConfigError(f"block: {self.block} is not supported; use a power of two of at least 16")
        if self.form == "token" and (self.activation.bits, self.weight.bits) != (4, 4):
            raise ConfigError(f"bits: {self.name} has scales for each token, which take 4 bits on both sides")
        if self.form == "fused" and self.block not in (None, *FUSED_BLOCKS):
            known = ", ".join(map(str, FUSED_BLOCKS))
            raise ConfigError(f"block: {self.block} is not supported by {self.name}; use one of {known}")
        if self.form in BLOCK_FORMS and self.weight.bits not in (4, 8):
            raise ConfigError(f"weight: {self.weight.bits} bits in blocks are not supported; use 4 or 8")

    def with_method(self, method: str | None) -> Scheme:
        """The same scheme with another range method for activations; None changes nothing."""
        if method is None:
            return self
        if self.form != "qdq":
            raise ConfigError(f"method: {self.name} finds activation ranges while the model runs; leave it out")
        return replace(self, activation=replace(self.activation, method=method))

    def with_options(
        self, *, block: int | None = None, weights: str | None = None, normalize: bool | None = None
    ) -> Scheme:
        """The same scheme with another block size, way of choosing integers, or of making ranges; None: as it is."""
        if normalize and not self.normalizes:
            raise ConfigError(
                f"normalize: {self.name} has no activations of 4 or 8 bits with one range a tensor, of the method mse"
            )
        changed = self if weights is None else replace(self, weights=weights)
        changed = changed if normalize is None else replace(changed, normalize=normalize)
        return changed if block is None else replace(changed, block=block)

    @property
    def normalizes(self) -> bool:
        """Whether rows of activations may be divided by their lengths."""
        narrow = self.activation.bits <= 8 and self.activation.method == "mse"
        return self.form in ("qdq", "dynamic") and narrow and self.normalize

    @property
    def calibrates(self) -> bool:
        """Whether calibration data says something about activations."""
        return self.static_ranges or self.normalizes

    @property
    def static_ranges(self) -> bool:
        """Whether activations get their ranges from calibration data."""
        return self.form == "qdq"

    @property
    def min_opset(self) -> int:
        """The oldest opset of ONNX's own operators that can carry the scheme."""
        if self.form in (*BLOCK_FORMS, "dynamic", "fused"):
            return 13
        narrow = {self.activation.bits, self.weight.bits} != {8}
        return 21 if narrow or self.form == "token" else 13


# uint8 with a zero point costs the same as symmetric int8 in every kernel, and uses the whole of its 256
# levels where a distribution is skewed (what follows an activation function).
_UINT8 = TensorSpec(bits=8, signed=False, symmetric=False, method="mse")
_UINT4 = TensorSpec(bits=4, signed=False, symmetric=False, method="mse")
_INT8 = TensorSpec(method="mse")
_INT8_CHANNEL = TensorSpec(bits=8, signed=True, symmetric=True, per_channel=True, method="mse")
_INT4_CHANNEL = TensorSpec(bits=4, signed=True, symmetric=True, per_channel=True, method="mse")

_SCHEMES = (
    Scheme("a8w8", _UINT8, _INT8_CHANNEL),
    # 16 bits have levels to spare: nothing is gained by clipping.
    Scheme("a16w8", TensorSpec(bits=16, signed=False, symmetric=False), _INT8_CHANNEL),
    Scheme("a8w4", _UINT8, _INT4_CHANNEL, weights="gptq", head_bits=8),
    Scheme("a4w4", _UINT4, _UINT4, form="token", block=32, weights="gptq", head_bits=8),
    Scheme("a8w8-dynamic", TensorSpec(), _INT8_CHANNEL, form="fused"),
    Scheme("a8w4-dynamic", TensorSpec(), _UINT4, form="fused", block=64, weights="gptq", head_bits=8),
    # With one operator of ONNX Runtime's own, and one range a tensor.
    Scheme("a8w8-dynamic-tensor", _UINT8, _INT8_CHANNEL, form="dynamic"),
    Scheme("a8w8-block", _INT8, _INT8, form="block", block=128),
    Scheme("a8w4-block", _INT8, _UINT4, form="block", block=64, weights="gptq", head_bits=8),
    # The same in one operator of ONNX Runtime's own, whether the model uses the library or not.
    Scheme("a8w4-matmulnbits", _INT8, _UINT4, form="nbits", block=64, weights="gptq", head_bits=8),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _SCHEMES}


def parse_scheme(name: str | Scheme) -> Scheme:
    """The scheme called `name` (`a8w4-block` or `w4a8-block`, any case); ConfigError lists the supported ones."""
    if isinstance(name, Scheme):
        return name
    key = re.sub(r"^(w\d+)(a\d+)", r"\2\1", name.strip().lower())
    if key not in SCHEMES:
        raise ConfigError(f"scheme: {name!r} is not supported; use one of {', '.join(SCHEMES)}")
    return SCHEMES[key]
