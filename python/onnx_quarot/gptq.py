"""GPTQ: integer weights whose rounding errors are made up for by the weights that are rounded after them.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323.
Input features are taken one by one; the error each makes in the layer's output is spread over those still open, by the
inverse of the Hessian X^T X of the layer's inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .clipping import fit_rows
from .errors import DataError
from .products import product
from .scheme import TensorSpec

Array = npt.NDArray[Any]

_LAZY = 64  # features whose errors reach the rest in one matrix product


def inverse_factor(hessian: Array, damping: float = 0.01) -> Array:
    """The upper Cholesky factor U of the damped inverse Hessian, U^T U = (H + d I)^-1, float64 [k, k].

    hessian: X^T X, [k, k]. damping: d as a share of the mean of its diagonal; raised tenfold, up to all of it, until
    the matrix can be factored. Features that were always zero count as independent of all others. DataError if no
    damping helps: the data holds nothing.
    """
    h = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", h)
    mean = float(diagonal.mean())
    if not np.isfinite(mean) or mean <= 0.0:
        raise DataError("calibration: a layer's inputs are zero or not finite throughout; gptq has nothing to go by")
    diagonal[diagonal == 0.0] = mean
    while damping <= 1.0:
        try:
            damped = h + np.eye(len(h)) * (damping * mean)
            # With J the reversal of order and J H J = L L^T, the factor is the inverse of J L J.
            reversed_factor = np.linalg.cholesky(damped[::-1, ::-1])
            upper: Array = _invert_lower(reversed_factor)[::-1, ::-1]
            return np.ascontiguousarray(upper)
        except np.linalg.LinAlgError:
            damping *= 10.0
    raise DataError("calibration: a layer's Hessian cannot be inverted; more, or more varied, data is needed for gptq")


def _invert_lower(lower: Array) -> Array:
    """The inverse of a lower triangular matrix, by halves: most of the work is matrix products."""
    size = len(lower)
    if size <= 64:
        inverse: Array = np.tril(np.linalg.inv(lower))
        return inverse
    half = size // 2
    result = np.zeros_like(lower)
    result[:half, :half] = _invert_lower(lower[:half, :half])
    result[half:, half:] = _invert_lower(lower[half:, half:])
    result[half:, :half] = -product(result[half:, half:], product(lower[half:, :half], result[:half, :half]))
    return result


def solve(
    weight: Array, hessian: Array, factor: Array, spec: TensorSpec, block: int | None = None
) -> tuple[Array, Array, Array]:
    """Integer codes of `weight` [depth, channels], their scales and zero points [groups, channels].

    hessian: X^T X of the layer's inputs, [depth, depth]; factor: its :func:`inverse_factor`. block: input features
    that share a scale, None for all. A group's range is found when its turn comes, on weights that already make up
    for earlier groups, by least squared error weighted by the Hessian's diagonal. Codes are int8, or uint8 for an
    unsigned type.
    """
    depth, channels = weight.shape
    size = depth if block is None else block
    groups = -(-depth // size)
    lazy = _LAZY if block is None else max(_LAZY, block)
    first, last = spec.bounds
    rest = weight.astype(np.float32)
    importance = np.maximum(np.einsum("ii->i", hessian), 0.0).astype(np.float32)
    importance /= max(float(importance.max()), np.finfo(np.float32).tiny)
    upper = factor.astype(np.float32)
    codes = np.empty((depth, channels), np.uint8 if first >= 0 else np.int8)
    scales, zeros = np.ones((groups, channels), np.float32), np.zeros((groups, channels), np.int32)
    for start in range(0, depth, lazy):
        stop = min(start + lazy, depth)
        errors = np.empty((stop - start, channels), np.float32)
        for row in range(start, stop):
            group = row // size
            if row % size == 0:
                end = min(row + size, depth)
                scales[group], zeros[group] = fit_rows(rest[row:end].T, spec, importance[row:end])
            code = np.clip(np.rint(rest[row] / scales[group]) + zeros[group], first, last)
            codes[row] = code
            error = (rest[row] - (code - zeros[group]) * scales[group]) / upper[row, row]
            errors[row - start] = error
            # Outer product over the rows of this piece only; the others get all of the piece's errors at once.
            rest[row + 1 : stop] -= upper[row, row + 1 : stop, None] * error
        rest[stop:] -= product(upper[start:stop, stop:].T, errors)
    return codes, scales, zeros
