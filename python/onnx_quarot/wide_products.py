"""Products with large matrices of 16 bits, which ONNX Runtime's CPU provider would first widen as a whole.

Widened a few rows at a time they never leave the cache: reading the matrix once is most of the work.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_quarot import _core
from onnx_quarot.load import unmap

Array = npt.NDArray[Any]
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_LARGE = 1 << 20  # elements; below, a session of its own on either side costs more than widening
_SLICE = 1 << 19  # elements widened at a time, to float64: 4 MB
_THREADS = min(4, os.cpu_count() or 1)


def large_matrix(node: ir.Node) -> ir.TensorProtocol | None:
    """The matrix of a MatMul if it is a large constant of 16 bits; None for any other node."""
    if node.op_type != "MatMul" or node.domain != "" or node.inputs[0] is None or node.inputs[0].is_initializer():
        return None
    value = node.inputs[1]
    tensor = None if value is None or value.is_graph_input() else value.const_value
    if tensor is None or tensor.dtype not in HALVES or len(tensor.shape) != 2 or tensor.size < _LARGE:
        return None
    return tensor


def wide_product(x: Array, tensor: ir.TensorProtocol) -> Array:
    """``x @ tensor`` for x [..., k] and a matrix [k, n]; float64 inside, in x's type."""
    matrix = tensor.numpy()
    length, width = matrix.shape
    rows = np.ascontiguousarray(x.reshape(-1, length), np.float64)
    step = max(1, _SLICE // width)
    share = step * -(-length // (step * _THREADS))

    def part(first: int, matrix: Array = matrix) -> Array:
        total, wide = np.zeros((len(rows), width)), np.empty((step, width))
        for start in range(first, min(first + share, length), step):
            piece = matrix[start : start + step]
            _core.convert(piece, wide[: len(piece)])
            total += rows[:, start : start + step] @ wide[: len(piece)]
        return total

    with ThreadPoolExecutor(_THREADS) as pool:
        result = sum(pool.map(part, range(0, length, share)), np.zeros((len(rows), width)))
    del matrix, part  # views of the file
    unmap(tensor)
    return result.astype(x.dtype).reshape(*x.shape[:-1], width)
