"""Constants as the rewriter sees them: an initializer, perhaps behind a few view operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import onnx_ir as ir

from onnx_quarot.load import unmap

_VIEWS = frozenset({"Identity", "Transpose", "Cast"})
_SMALL = 1 << 16  # scalars, norm scales and biases are read while deciding; weights are not


@dataclass(frozen=True)
class Constant:
    """``root`` transposed by ``permutation``: axis ``i`` of the constant is axis ``permutation[i]`` of the root."""

    root: ir.Value
    permutation: tuple[int, ...]
    dtype: ir.DataType

    @property
    def shape(self) -> tuple[int, ...]:
        root = tensor_shape(root_tensor(self.root))
        return tuple(root[axis] for axis in self.permutation)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_view(self) -> bool:
        return self.permutation != tuple(range(len(self.permutation)))

    def numpy(self) -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = root_tensor(self.root).numpy().transpose(self.permutation)
        return array

    def small(self) -> np.ndarray[Any, Any] | None:
        """The values in float64 if there are few enough to look at, else None."""
        return self.float64() if self.size <= _SMALL else None

    def float64(self) -> np.ndarray[Any, Any]:
        """A copy. The file is let go of: every tensor maps the whole of it, and address space can be limited."""
        array = self.numpy().astype(np.float64)
        unmap(root_tensor(self.root))
        return array


def root_tensor(root: ir.Value) -> ir.TensorProtocol:
    tensor = root.const_value
    if tensor is None:
        raise AssertionError(f"{root.name!r} is not an initializer")
    return tensor


def tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a constant, which is never symbolic."""
    return tuple(tensor.shape.numpy())


def constant(value: ir.Value | None) -> Constant | None:
    """The constant behind ``value``, seen through Identity, Transpose and Cast; None for an activation."""
    if value is None:
        return None
    if value.const_value is not None and value.is_initializer() and not value.is_graph_input():
        rank = len(value.const_value.shape)
        return Constant(value, tuple(range(rank)), value.const_value.dtype)
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in _VIEWS:
        return None
    inner = constant(node.inputs[0])
    if inner is None:
        return None
    if node.op_type == "Cast":
        return Constant(inner.root, inner.permutation, ir.DataType(node.attributes.get_int("to")))
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", list(range(len(inner.permutation)))[::-1])
        return Constant(inner.root, tuple(inner.permutation[p] for p in perm), inner.dtype)
    return inner


def read_once(value: ir.Value | None) -> bool:
    """Whether a constant, or what it is a view of, is read in one place only."""
    while value is not None and not value.is_graph_output() and len(value.uses()) == 1:
        node = value.producer()
        if node is None:
            return True
        value = node.inputs[0]
    return False


def uniform(value: Constant) -> bool:
    """All elements equal (and few enough to check)."""
    array = value.small()
    return array is not None and array.size > 0 and bool((array == array.flat[0]).all())
