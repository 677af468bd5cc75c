"""Scales, zero points and integer weights.

r = scale * (q - zero_point), with the same rounding as onnxruntime.quantization, so that equal ranges give
equal numbers there and here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .clipping import fit_rows
from .errors import ModelError
from .observers import Range
from .scheme import TensorSpec

Array = npt.NDArray[Any]

_TINY = float(np.finfo(np.float32).tiny)
_CHUNK_ELEMENTS = 2**20
_INT32_MAX = 2**31 - 1
_BIAS_MAX = 2**30  # leaves the other half of an int32 accumulator to the products


def activation_parameters(bounds: Range, spec: TensorSpec) -> tuple[np.float32, int]:
    """Scale and zero point of a per-tensor activation with the given range (an empty range gets scale 1)."""
    low, high = np.float32(min(bounds.low, 0.0)), np.float32(max(bounds.high, 0.0))
    if spec.symmetric:
        high = max(-low, high)
        low = -high
    first, last = spec.bounds
    scale = (float(high) - float(low)) / (last - first)
    if scale < _TINY:
        return np.float32(1.0), 0
    zero = round((first + last) / 2) if spec.symmetric else round(first - float(low) / scale)
    return np.float32(scale), zero


def bias_floor(bias: Array, activation_scale: np.float32) -> Array:
    """The least weight scales that keep `bias` below 2**30 steps of activation scale * weight scale."""
    floor = np.abs(bias.astype(np.float64)) / (float(activation_scale) * _BIAS_MAX)
    return floor.astype(np.float32)


@dataclass(frozen=True)
class SolvedWeight:
    """Integer weights found in advance.

    codes: a file of them, .npy, [depth, channels]. scale, zero: [groups, channels], one group for each block of the
    depth; zero in the codes' own numbers.
    """

    codes: Path
    scale: Array
    zero: Array

    def read(self) -> Array:
        """The codes, mapped."""
        array: Array = np.load(self.codes, mmap_mode="r")
        return array


class QuantizedWeight:
    """A weight matrix in integers with symmetric scales, evaluated when it is written.

    read: returns the float operand, rank 2; it may be a view of mapped or lazily computed memory, which
    `close` then lets go. axis: which axis counts output channels (None: one scale for all). unsigned: store q
    + 128 (for 8 bits) as an unsigned type. The scales (and what is derived from them) are kept once known;
    the integers are not, so that memory holds one weight at a time whatever the order of writing. Written
    integers first, each weight is read once. Scales are those of least squared error (see clipping). solved: take
    these integers and scales (one group) instead.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        spec: TensorSpec,
        axis: int | None,
        read: Callable[[], Array],
        close: Callable[[], None],
        unsigned: bool = False,
        solved: SolvedWeight | None = None,
    ) -> None:
        self.name, self.shape, self.spec, self.axis = name, tuple(shape), spec, axis
        self._read, self._close = read, close
        self.dtype = replace(spec, signed=not unsigned).dtype
        self.zero_point = 2 ** (spec.bits - 1) if unsigned else 0
        self._floor: Array | None = None
        self._solved = solved
        self._scale: Array | None = None if solved is None else solved.scale[0].astype(np.float32)
        self._lock = threading.Lock()

    def raise_floor(self, floor: Array) -> None:
        """Ask for scales no smaller than `floor` (one a channel); before anything was evaluated."""
        if self._solved is not None:
            if bool((self._solved.scale[0] < floor).any()):
                raise ModelError(
                    f"weight {self.name!r}: its bias is too large for the scales gptq found; use rtn weights"
                )
            return
        assert self._scale is None
        self._floor = floor if self._floor is None else np.maximum(self._floor, floor)

    def tensor(self, name: str) -> ir.LazyTensor:
        """The integers."""
        return lazy(self._integers, self.dtype, self.shape, name)

    def scale_tensor(self, name: str) -> ir.LazyTensor:
        """The scales: one a channel, or a scalar."""
        return lazy(self.scale, ir.DataType.FLOAT, self.scale_shape, name)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return () if self.axis is None else (self.shape[self.axis],)

    def scale(self) -> Array:
        """The scales, float32."""
        with self._lock:
            if self._scale is None:
                try:
                    self._scale = self._compute_scale(self._read())
                finally:
                    self._close()
            return self._scale

    def _integers(self) -> Array:
        if self._solved is not None:
            codes = self._solved.read()
            shifted = (codes if self.axis == 1 else codes.T).astype(np.int16) + self.zero_point
            return shifted.astype(self.dtype.numpy())
        with self._lock:
            try:
                weight = self._read()
                if self._scale is None:
                    self._scale = self._compute_scale(weight)
                return quantize_symmetric(weight, self._scale, self.axis, self.spec, self.zero_point)
            finally:
                weight = np.empty(0)
                self._close()

    def _compute_scale(self, weight: Array) -> Array:
        other = None if self.axis is None else 1 - self.axis
        # Two reductions and no temporary of the matrix's size, as abs would make.
        peak = np.maximum(weight.max(axis=other, initial=0.0), -weight.min(axis=other, initial=0.0))
        if not np.isfinite(peak).all():
            raise ModelError(f"weight {self.name!r} holds a value that is not finite")
        if self.axis is None:
            first, last = self.spec.bounds
            scale = 2.0 * peak.astype(np.float64) / (last - first)
        else:
            scale = np.where(peak > 0, _fitted(weight, self.axis, self.spec), 0.0)
        if self._floor is not None:
            scale = np.maximum(scale, self._floor)
        # A channel of zeros may have any scale.
        return np.where(scale < _TINY, 1.0, scale).astype(np.float32)


def _fitted(weight: Array, axis: int, spec: TensorSpec) -> Array:
    """The scales of each channel, some channels at a time so that no second matrix is made."""
    channels = weight.shape[axis]
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1 - axis]))
    scale = np.empty(channels, np.float64)
    for start in range(0, channels, step):
        part = slice(start, start + step)
        scale[part] = fit_rows(weight[part] if axis == 0 else weight[:, part].T, spec)[0]
    return scale


def quantize_symmetric(weight: Array, scale: Array, axis: int | None, spec: TensorSpec, zero_point: int = 0) -> Array:
    """round(weight / scale) within the spec's bounds, a block of rows at a time; weight has rank 2.

    With a zero point the result is shifted by it and unsigned.
    """
    first, last = spec.bounds
    result = np.empty(weight.shape, replace(spec, signed=zero_point == 0).numpy_dtype)
    rows = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        divisor = scale if axis is None else scale[block, None] if axis == 0 else scale[None, :]
        steps = weight[block].astype(np.float32) / divisor
        np.rint(steps, out=steps)
        np.clip(steps, first, last, out=steps)
        steps += zero_point
        result[block] = steps
    return result


def quantized_bias(bias: Array, activation_scale: np.float32, weight: QuantizedWeight) -> Callable[[], Array]:
    """A bias in int32 steps of activation scale * weight scale, the unit integer kernels accumulate in."""

    def evaluate() -> Array:
        unit = bias_scale(activation_scale, weight)().astype(np.float64)
        # A weight channel of zeros and a tiny activation scale could make the unit underflow to nothing.
        steps = np.rint(bias.astype(np.float64) / np.where(unit == 0.0, math.inf, unit))
        return np.clip(steps, -_INT32_MAX - 1, _INT32_MAX).astype(np.int32)

    return evaluate


def bias_scale(activation_scale: np.float32, weight: QuantizedWeight) -> Callable[[], Array]:
    """The unit of `quantized_bias`, one a channel."""

    def evaluate() -> Array:
        unit = activation_scale * weight.scale()
        return np.broadcast_to(unit, (weight.shape[weight.axis if weight.axis is not None else 1],)).astype(np.float32)

    return evaluate


def reshaped(tensor: ir.LazyTensor, shape: Sequence[int]) -> ir.LazyTensor:
    """The same values in another shape, evaluated when they are read."""
    return lazy(lambda: tensor.numpy().reshape(shape), tensor.dtype, shape, "")


def lazy(function: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int], name: str) -> ir.LazyTensor:
    """A tensor evaluated when it is read."""
    return ir.LazyTensor(lambda: ir.Tensor(function(), dtype=dtype, name=name), dtype, ir.Shape(shape), name=name)
