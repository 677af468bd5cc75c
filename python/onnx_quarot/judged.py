"""What the outputs of a model are judged by when something inside it is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .comparison import log_softmax
from .discovery.shapes import FLOATS
from .errors import ModelError

Array = npt.NDArray[Any]


def keep_judged_outputs(model: ir.Model) -> list[str]:
    """Leave the graph the floating-point outputs that are results; a cache handed on to the next call is none.

    Their names; ModelError if there is none.
    """
    tensors = [value for value in model.graph.outputs if isinstance(value.type, ir.TensorType)]  # no sequences
    kept = [value for value in tensors if value.dtype in FLOATS and not _is_cache(value)]
    if not kept:
        raise ModelError("model: has no floating-point output to measure sensitivity by")
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    return [value.name or "" for value in kept]


def _is_cache(value: ir.Value) -> bool:
    """Whether the node that makes an output of rank 4 or more reads a graph input of the same rank: past, present."""
    node = value.producer()
    if node is None or value.shape is None or len(value.shape) < 4:
        return False
    rank = len(value.shape)
    return any(
        x is not None and x.is_graph_input() and x.shape is not None and len(x.shape) == rank for x in node.inputs
    )


def squared_error(expected: Sequence[Array], found: Sequence[Array]) -> float:
    """Squared error of rows (last axis) over their squared length, mean over the rows of an output and over outputs."""
    return float(np.mean([_row_error(a, b) for a, b in zip(expected, found, strict=True)]))


def _row_error(expected: Array, found: Array) -> float:
    width = expected.shape[-1] if expected.ndim else 1
    a, b = expected.reshape(-1, width).astype(np.float32), found.reshape(-1, width).astype(np.float32)
    size = np.einsum("ij,ij->i", a, a)
    b -= a
    return float(np.mean(np.divide(np.einsum("ij,ij->i", b, b), size, out=np.zeros_like(size), where=size > 0)))


class Divergence:
    """Mean KL divergence of next-token distributions from expected ones, in nats.

    expected: logits [.., vocabulary]. rows: which of their rows count. Memory: the expected probabilities of these.
    """

    def __init__(self, expected: Array, rows: Array) -> None:
        self._rows = rows
        flat = expected.reshape(-1, expected.shape[-1])
        self._expected = [(part, p, np.exp(p)) for part, p in log_softmax(flat, rows)]

    def __call__(self, found: Array) -> float:
        flat = found.reshape(-1, found.shape[-1])
        others = log_softmax(flat, self._rows)
        total = 0.0
        for (_, p, share), (_, q) in zip(self._expected, others, strict=True):
            total += float(np.sum(share * (p - q), dtype=np.float64))
        return total / len(self._rows)
