"""Rows of very different lengths, where all share one range: each is divided by its length first.

At a few layers of most language models one token is hundreds of times longer than the others (massive activations, Sun
et al., arXiv:2402.17762). A rotation spreads it over its features and leaves it as long as it was, so a range for all
tokens gives up either that one, to which the others attend, or the precision of the others. A linear layer does not
mind:

    x W  =  |x| * (x / |x|) W

so rows of length 1 are quantized, by a range that fits them all, and the product is multiplied by their lengths: a few
operators in floating point, for those activations alone where it pays. (Operators that find a scale for each row as
they run do all of this inside.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .editing import GraphNames, insert_behind
from .nodes import AXES_INPUT_OPSET
from .observers import Array, MinMax, Range, TokenMSE, rows_and_lengths

NOTE = "rows divided by their lengths"  # of a layer's report

# Times as much error as rows of length 1 have, from which on they are worth their operators: twice as large on average.
_GAIN = 4.0
# Lengths that differ less than this cannot gain that much.
_SPREAD = 2.0


class EitherWay:
    """The range that loses least of rows as they are, or of rows of length 1 where these lose far less."""

    def __init__(self, bits: int = 8, symmetric: bool = False) -> None:
        self._plain, self._normalized = TokenMSE(bits, symmetric), TokenMSE(bits, symmetric)
        self._shortest, self._longest = np.inf, 0.0

    @property
    def extremes(self) -> MinMax:
        """Of the rows as they are."""
        return self._plain.extremes

    def update(self, values: Array) -> None:
        """As of :class:`TokenMSE`."""
        for rows, length in rows_and_lengths(values):
            self._plain.extremes.update(rows)
            rows, length = rows[length > 0], length[length > 0]
            if len(rows) == 0:
                continue
            self._plain.count(rows, 1.0 / length)
            self._shortest, self._longest = min(self._shortest, length.min()), max(self._longest, length.max())
            unit = (rows / length[:, None]).astype(np.float32)
            self._normalized.extremes.update(unit)
            # In the end an error of a row of length 1 is as many times larger, and counts as TokenMSE counts it.
            self._normalized.count(unit, length)

    def range(self) -> Range:
        """Whichever of the two loses less: ``normalized`` says which."""
        plain, loss = self._plain.best()
        if self._longest < _SPREAD * self._shortest:
            return plain
        found, least = self._normalized.best()
        return Range(found.low, found.high, normalized=True) if _GAIN * least < loss else plain


class UnitRows:
    """Puts rows of length 1 into a graph, once for each value."""

    def __init__(self, names: GraphNames) -> None:
        self._names = names
        self._made: dict[str, tuple[ir.Value, ir.Value]] = {}

    def of(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """`value`, float32 [..., k], with its rows divided by their lengths, and these, [..., 1]; zeros stay zeros."""
        name = str(value.name)
        if name not in self._made:
            nodes = self._nodes(value)
            insert_behind(self._names.graph, value, nodes)
            self._made[name] = nodes[-1].outputs[0], nodes[-2].outputs[0]
        return self._made[name]

    def _nodes(self, value: ir.Value) -> list[ir.Node]:
        names, name = self._names, value.name
        inputs, attributes = [value], [ir.AttrInt64("keepdims", 1)]
        if names.graph.opset_imports.get("", 0) < AXES_INPUT_OPSET:
            attributes.append(ir.AttrInt64s("axes", [-1]))
        else:
            inputs.append(names.initializer(ir.Tensor(np.array([-1])), f"{name}_length_axis"))
        tiny = names.initializer(ir.Tensor(np.array(np.finfo(np.float32).tiny)), f"{name}_least_length")
        norm = ir.Node("", "ReduceL2", inputs, attributes, name=names.unique(f"{name}_ReduceL2"))
        length = ir.Node("", "Max", [norm.outputs[0], tiny], name=names.unique(f"{name}_Max"))
        unit = ir.Node("", "Div", [value, length.outputs[0]], name=names.unique(f"{name}_Div"))
        nodes = [norm, length, unit]
        for node, role in zip(nodes, ("norm", "length", "normalized"), strict=True):
            made = node.outputs[0]
            made.name, made.type = names.unique(f"{name}_{role}"), ir.TensorType(ir.DataType.FLOAT)
        unit.outputs[0].shape = value.shape
        return nodes


def times_length(names: GraphNames, product: ir.Value, length: ir.Value, name: str) -> ir.Node:
    """What rows of length 1 were multiplied to, times the lengths they had."""
    node = ir.Node("", "Mul", [product, length], name=names.unique(f"{name}_times_length"))
    made = node.outputs[0]
    made.name, made.type = names.unique(f"{name}_times_length_output"), ir.TensorType(ir.DataType.FLOAT)
    return node
