"""Bases for keys and values in which four bits cost least.

Whatever invertible matrix M a head's keys are multiplied by, its queries undo it: (q M^-T) . (k M) = q . k. The same
holds for values and the layer behind the attention. A rounding error costs the sum over features of the variance of
what is rounded there, times that of what reads it: with the two covariances A and B, sum of (M^T A M)_ii times
(M^-1 B M^-T)_ii. Scales a channel have no part in it, and it is least where both products are one matrix whose diagonal
is even: then it is (trace (A^1/2 B A^1/2)^1/2)^2 / n. A Hadamard matrix alone evens both diagonals, and leaves
(trace A) (trace B) / n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .load import unmap
from .sites import constant_array
from .transform import hadamard_matrix, largest_block

Array = npt.NDArray[Any]

_DAMPING = 1e-3  # of the mean variance, added to every direction


def balanced(rows: Array, readers: Array) -> Array:
    """M for the covariances of what is rounded and of what reads it, all float64 [n, n]."""
    size = len(rows)
    factors = [np.linalg.cholesky(c + (_DAMPING * np.trace(c) / size + 1e-30) * np.eye(size)) for c in (rows, readers)]
    u, s, _ = np.linalg.svd(factors[0].T @ factors[1])
    matrix = np.linalg.solve(factors[0].T, u) * np.sqrt(s)
    even: Array = matrix @ hadamard_matrix(size, block_size=largest_block(size))
    return even


def balanced_together(rows: Array, readers: Array) -> Array:
    """One M for several heads, [heads, n, n] each, all of which count alike."""
    traces = [np.trace(c, axis1=1, axis2=2)[:, None, None] + 1e-30 for c in (rows, readers)]
    ratio = np.sqrt(traces[1] / traces[0])
    return balanced((rows * ratio).sum(axis=0), (readers / ratio).sum(axis=0))


@dataclass(frozen=True)
class ValuePath:
    """The constants that make an attention's values, each with the first feature that is one, and the matrix that reads
    its output. Nothing else uses them, so that values can change basis for nothing.
    """

    writers: tuple[tuple[ir.Value, int], ...]
    reader: ir.Value
    kv_heads: int

    def readers(self, size: int) -> Array:
        """The covariance of what reads a key/value head, [kv_heads, size, size]."""
        assert self.reader.const_value is not None
        matrix = self.reader.const_value.numpy().astype(np.float64).reshape(self.kv_heads, -1, size, self._columns())
        unmap(self.reader.const_value)
        covariance: Array = np.einsum("khsc,khtc->kst", matrix, matrix, optimize=True)
        return covariance

    def layers(self) -> list[str]:
        """The results of the layers whose weights :meth:`fold` changes, by name."""
        nodes = [next(iter(value.uses())).node for value in (*(v for v, _ in self.writers), self.reader)]
        return [str(node.outputs[0].name) for node in nodes]

    def _columns(self) -> int:
        assert self.reader.const_value is not None
        return int(self.reader.const_value.shape.numpy()[1])

    def fold(self, bases: Array) -> None:
        """Multiply values by `bases` [kv_heads, size, size], and undo it behind the attention, in the weights."""
        kv_heads, size = bases.shape[:2]
        back, columns = np.linalg.inv(bases), self._columns()

        def make(x: Array, first: int) -> Array:
            part = x[..., first : first + kv_heads * size]
            heads = part.reshape(*part.shape[:-1], kv_heads, 1, size)
            part[...] = (heads @ bases).reshape(part.shape)
            return x

        def read(x: Array) -> Array:
            groups = x.reshape(kv_heads, -1, size, columns)
            return (back[:, None] @ groups).reshape(x.shape)

        for value, first in self.writers:
            _rewrite(value, partial(make, first=first))
        _rewrite(self.reader, read)


def _rewrite(value: ir.Value, change: Callable[[Array], Array]) -> None:
    tensor = value.const_value
    assert tensor is not None

    def evaluate() -> ir.TensorProtocol:
        array = change(tensor.numpy().astype(np.float64)).astype(tensor.dtype.numpy())
        unmap(tensor)
        return ir.tensor(array, tensor.dtype, name=value.name)

    value.const_value = ir.LazyTensor(evaluate, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=value.name)


def value_path(attention: ir.Node, size: int) -> ValuePath | None:
    """How values come into a GroupQueryAttention and where they go; None where something else is in between."""
    heads, kv_heads = (attention.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    writers, reader = _writers(attention.inputs[2]), _reader(attention.outputs[0])
    if writers is None or reader is None or reader.const_value is None:
        return None
    if len(reader.const_value.shape) != 2 or reader.const_value.shape[0] != heads * size:
        return None
    return ValuePath(writers, reader, kv_heads)


def _writers(value: ir.Value | None) -> tuple[tuple[ir.Value, int], ...] | None:
    """A matrix and perhaps biases, behind Split and Cast."""
    found: list[tuple[ir.Value, int]] = []
    while value is not None and _sole_use(value) is not None:
        node = value.producer()
        if node is None or node.domain != "":
            return None
        before = 0
        if node.op_type == "MatMul" and (weight := _own(node, 1)) is not None:
            return (*found, (weight, 0))
        if node.op_type == "Split":
            lengths = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
            if lengths is None:
                return None
            first = int(lengths[: node.outputs.index(value)].sum())
            rest = _writers(node.inputs[0])
            return None if rest is None else (*found, *((v, first + at) for v, at in rest))
        if node.op_type == "Add":
            constants = [i for i in (0, 1) if (own := _own(node, i)) is not None and len(own.shape or ()) == 1]
            if len(constants) != 1:
                return None
            bias = node.inputs[constants[0]]
            assert bias is not None
            found.append((bias, 0))
            before = 1 - constants[0]
        elif node.op_type != "Cast":
            return None
        value = node.inputs[before]
    return None


def _reader(value: ir.Value) -> ir.Value | None:
    while (use := _sole_use(value)) is not None:
        node, index = use
        if node.domain != "" or index != 0:
            return None
        if node.op_type == "MatMul":
            return _own(node, 1)
        if node.op_type != "Cast":
            return None
        value = node.outputs[0]
    return None


def _sole_use(value: ir.Value) -> tuple[ir.Node, int] | None:
    """What reads the elements of a value, if one thing does."""
    uses = [use for use in value.uses() if (use.node.domain, use.node.op_type) != ("", "Shape")]
    return (uses[0].node, uses[0].idx) if len(uses) == 1 and not value.is_graph_output() else None


def _own(node: ir.Node, index: int) -> ir.Value | None:
    """A constant of this node and no other."""
    value = node.inputs[index]
    if value is None or not value.is_initializer() or value.is_graph_input() or value.is_graph_output():
        return None
    return value if len(value.uses()) == 1 else None
