"""A LayerNorm whose products are multiplied out, x s - mean(x) s + b with s = g / deviation, is put together again:
(x - mean(x)) / deviation g + b.

Keras and TensorFlow's ``batch_normalization`` write the former, Flax multiplies g and 1 / deviation first and has the
variance from mean(x^2) - mean(x)^2. In these forms features are multiplied by activations, which no rotation survives.
tf2onnx makes means of rows a GlobalAveragePool, as if rows were channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.shapes import Shapes
from onnx_quarot.editing import GraphNames, take_over
from onnx_quarot.nodes import feature_mean


def gather_norms(model: ir.Model) -> None:
    """Equalities of numbers alone are used: they hold whatever axes a mean is over."""
    _reduce_pools(model)
    names: GraphNames | None = None
    for node in list(model.graph):
        x, mean = (node.inputs[0], node.outputs[0]) if _is(node, "ReduceMean") else (None, None)
        if x is None or mean is None or node.attributes.get_int("keepdims", 1) != 1 or mean.is_graph_output():
            continue
        if any(_is(reader, "Mul", "Neg", "Pow") or use == 0 for reader, use in mean.uses()) or _scaled(x, mean):
            names = names or GraphNames(model.graph)
            _Norm(names, node, x, mean).gather()


def _reduce_pools(model: ir.Model) -> None:
    """Pools over the last of three axes that are a norm's mean or variance become means."""

    def in_norm(node: ir.Node) -> bool:
        x = node.inputs[0]
        squares = x is not None and (made := x.producer()) is not None and _square_of(made, made.inputs[0])
        return squares or any(_is(reader, "Sub", "Neg") for reader, _ in node.outputs[0].uses())

    pools = [node for node in model.graph if _is(node, "GlobalAveragePool") and in_norm(node)]
    if not pools:
        return
    shapes = Shapes(model)
    for node in pools:
        x, y = node.inputs[0], node.outputs[0]
        if x is not None and shapes.known(x) and len(shapes.shape[x]) == 3:
            mean = feature_mean(model.graph, x)
            model.graph.insert_before(node, mean)
            mean.name = node.name
            take_over(y, mean.outputs[0])
            model.graph.remove(node, safe=True)


def _is(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and node.domain == "" and node.op_type in op_types


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand; None if there is only this one."""
    left, right = node.inputs
    return right if left is value else left if right is value else None


def _square_of(node: ir.Node | None, value: ir.Value | None) -> bool:
    if value is None or node is None or node.domain != "":
        return False
    if node.op_type == "Mul":
        return node.inputs[0] is value and node.inputs[1] is value
    exponent = constant(node.inputs[1]) if node.op_type == "Pow" and node.inputs[0] is value else None
    return exponent is not None and exponent.size == 1 and float(exponent.numpy().flat[0]) == 2.0


def _only_squared(value: ir.Value) -> bool:
    """The same then as its negative."""
    return bool(value.uses()) and not value.is_graph_output() and all(_square_of(r, value) for r, _ in value.uses())


def _parts(scale: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """1 / deviation and the constant of a product of both."""
    node = scale.producer()
    if node is None or not _is(node, "Mul"):
        return None
    for value in node.inputs:
        other = None if value is None else _other(node, value)
        if value is not None and other is not None and constant(value) is not None and constant(other) is None:
            return other, value
    return None


def _scaled(x: ir.Value, mean: ir.Value) -> list[tuple[ir.Node, ir.Value]]:
    """Products of x - mean(x) and a scale that has the constant in it, with that scale."""
    found = []
    for reader, _ in x.uses():
        if _is(reader, "Sub") and reader.inputs[0] is x and reader.inputs[1] is mean:
            for product, _ in reader.outputs[0].uses():
                scale = _other(product, reader.outputs[0]) if _is(product, "Mul") else None
                if scale is not None and scale is not reader.outputs[0] and _parts(scale) is not None:
                    found.append((product, scale))
    return found


@dataclass(frozen=True)
class _Term:
    value: ir.Value
    sign: int


def _terms(value: ir.Value, sign: int = 1, *, top: bool = True) -> Iterator[_Term]:
    """What a sum is made of, seen through sums that nothing else reads."""
    node = value.producer()
    inner = top or (len(value.uses()) == 1 and not value.is_graph_output())
    if node is None or not inner or not _is(node, "Add", "Sub", "Neg"):
        yield _Term(value, sign)
        return
    for index, operand in enumerate(node.inputs):
        if operand is not None:
            negated = node.op_type == "Neg" or (node.op_type == "Sub" and index == 1)
            yield from _terms(operand, -sign if negated else sign, top=False)


class _Norm:
    """One mean and what is made of it."""

    def __init__(self, names: GraphNames, node: ir.Node, x: ir.Value, mean: ir.Value) -> None:
        self._names, self._node, self._x, self._mean = names, node, x, mean
        self._difference: ir.Value | None = None

    def gather(self) -> None:
        negated = [r.outputs[0] for r, _ in self._mean.uses() if _is(r, "Neg")]
        for value, sign in [(self._mean, 1), *((v, -1) for v in negated)]:
            for reader, _ in tuple(value.uses()):
                if _square_of(reader, self._mean):
                    self._variances(reader)
                elif _is(reader, "Mul") and len(reader.outputs[0].uses()) == 1:
                    self._product(reader, value, sign)
        for reader, index in tuple(self._mean.uses()):
            if _is(reader, "Sub") and index == 0 and reader.inputs[1] is self._x and _only_squared(reader.outputs[0]):
                self._replace(reader, self._centred())
        for product, scale in _scaled(self._x, self._mean):
            self._finish(product, scale, [])

    def _centred(self) -> ir.Value:
        """x - mean(x), right behind the mean."""
        if self._difference is None:
            found = [r for r, i in self._mean.uses() if _is(r, "Sub") and i == 1 and r.inputs[0] is self._x]
            graph = self._names.graph
            if found:
                graph.remove(found[0])
                graph.insert_after(self._node, found[0])
                self._difference = found[0].outputs[0]
            else:
                self._difference = self._made("Sub", [self._x, self._mean], "centred", behind=self._node)
        return self._difference

    def _variances(self, square: ir.Node) -> None:
        """mean(x^2) - mean(x)^2 as the mean of (x - mean(x))^2."""
        for reader, index in tuple(square.outputs[0].uses()):
            of_squares = reader.inputs[0].producer() if _is(reader, "Sub") and index == 1 and reader.inputs[0] else None
            if of_squares is None or not self._is_mean_alike(of_squares):
                continue
            squared = of_squares.inputs[0]
            if squared is None or not _square_of(squared.producer(), self._x):
                continue
            centred = self._centred()
            again = self._made("Mul", [centred, centred], "squares", before=reader)
            mean = ir.node("ReduceMean", [again, *of_squares.inputs[1:]], of_squares.attributes)
            self._place(mean, "variance", before=reader)
            self._replace(reader, mean.outputs[0])

    def _is_mean_alike(self, node: ir.Node) -> bool:
        def axes(n: ir.Node) -> tuple[object, ...]:
            given = constant(n.inputs[1]) if len(n.inputs) > 1 else None
            told = n.attributes.get_ints("axes", ()) or ()
            return (*told, *(() if given is None else given.numpy().ravel().tolist()))

        same_mode = node.attributes.get_int("keepdims", 1) == 1 and len(node.inputs) == len(self._node.inputs)
        return _is(node, "ReduceMean") and same_mode and axes(node) == axes(self._node)

    def _product(self, product: ir.Node, value: ir.Value, sign: int) -> None:
        """mean(x) s, somewhere in a sum that has x s with the other sign."""
        scale, total = _other(product, value), product.outputs[0]
        while scale is not None and len(total.uses()) == 1 and not total.is_graph_output():
            reader = next(iter(total.uses())).node
            if not _is(reader, "Add", "Sub", "Neg"):
                return
            total = reader.outputs[0]
            terms = list(_terms(total))
            mine = next((t for t in terms if t.value is product.outputs[0]), None)
            if mine is None or mine.sign * sign > 0:
                continue
            for term in terms:
                made = term.value.producer()
                if term.sign > 0 and made is not None and _is(made, "Mul") and _other(made, self._x) is scale:
                    self._finish(reader, scale, [t for t in terms if t is not mine and t is not term])
                    return

    def _finish(self, node: ir.Node, scale: ir.Value, rest: Sequence[_Term]) -> None:
        """(x - mean(x)) times the factors of ``scale``, constants last, and the rest of a sum, in place of ``node``."""
        value = self._centred()
        for factor in _parts(scale) or (scale,):
            value = self._made("Mul", [value, factor], "scaled", before=node)
        for term in rest:
            value = self._made("Add" if term.sign > 0 else "Sub", [value, term.value], "shifted", before=node)
        self._replace(node, value)

    def _made(self, op_type: str, inputs: Sequence[ir.Value], name: str, *, before: ir.Node | None = None,
              behind: ir.Node | None = None) -> ir.Value:  # fmt: skip
        return self._place(ir.node(op_type, inputs), name, before=before, behind=behind)

    def _place(self, node: ir.Node, name: str, *, before: ir.Node | None = None,
               behind: ir.Node | None = None) -> ir.Value:  # fmt: skip
        out = node.outputs[0]
        out.name = node.name = self._names.unique(f"{self._mean.name}.{name}")
        out.type = self._x.type or self._mean.type
        if before is not None:
            self._names.graph.insert_before(before, node)
        elif behind is not None:
            self._names.graph.insert_after(behind, node)
        return out

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        """``value`` instead of what ``node`` makes; it goes, and what only it read."""
        old = node.outputs[0]
        if value is self._difference:
            old.replace_all_uses_with(value)
        else:
            take_over(old, value)
        self._drop(node)

    def _drop(self, node: ir.Node) -> None:
        sources = [v.producer() for v in node.inputs if v is not None]
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            return
        self._names.graph.remove(node, safe=True)
        for source in dict.fromkeys(s for s in sources if s is not None):
            self._drop(source)
