"""Executing a plan: constants get lazy tensors in their new basis, activations get online transforms.

All weight algebra is in float64, on slices, with the fast transform; a rewritten weight is computed when it is saved
and then dropped, so that memory stays bounded by the largest tensor whatever the model's size.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnx_quarot import _core
from onnx_quarot.buffers import empty
from onnx_quarot.custom_op import add_hadamard
from onnx_quarot.discovery import fingerprint
from onnx_quarot.discovery.constants import Constant, constant, root_tensor
from onnx_quarot.discovery.prepare import prepare
from onnx_quarot.discovery.shapes import FLOATS
from onnx_quarot.editing import GraphNames, numbered
from onnx_quarot.errors import ConfigError
from onnx_quarot.load import unmap
from onnx_quarot.nodes import add_behind, bypass, subtract_mean, to_rms_norm
from onnx_quarot.plan import Addition, AxisChange, NewBias, Online, Placement, Plan, Rebase
from onnx_quarot.transform import Rotation, hadamard
from onnx_quarot.wide_products import HALVES

Array = np.ndarray[Any, Any]
_FLOATS = frozenset(kind.numpy() for kind in FLOATS)
_SLICE_ELEMENTS = 1 << 17  # of a weight, converted to float64 at a time: 1 MB, which stays in the cache
_SLICE_WIDTH = 32  # at least: narrower columns of a matrix would read every cache line several times
_THREADS = min(4, os.cpu_count() or 1)
_COMPUTING = threading.Lock()


def rotate_model(model: ir.Model, plan: Plan, *, unrounded: bool = False) -> None:
    """Apply ``plan`` to ``model`` in place. Raises ConfigError if the plan was made for another graph.

    unrounded: rewritten constants of half precision become float32. No runtime takes such a graph as it is, but
    :mod:`segments`, which computes in float32, can: for a proof in which their rounding has no part.
    """
    prepare(model, keys=plan.keys)
    if plan.fingerprint != fingerprint(model):
        raise ConfigError("plan: it was made for another model (the graphs differ)")
    nodes = numbered(model.graph)
    weights = _Weights(model, plan, nodes, unrounded)
    biases = weights.rewrite()
    for number, online in enumerate(plan.online):
        _insert_online(model, weights.names, plan.rotations[online.rotation], online, nodes, number)
    # Whatever was put behind a value so far reads the value with its bias.
    for node, bias in biases:
        add_behind(weights.names, node, bias)
    for index in plan.norms:
        to_rms_norm(model, nodes[index])
    for index, which in plan.bypassed:
        bypass(model, nodes[index], which)
    RemoveUnusedNodesPass()(model)


# ---------------------------------------------------------------------------------------------------------------------
# Constants.


class _Weights:
    """Rewrites constants: in place if all their uses agree, else as one clone a different use."""

    def __init__(self, model: ir.Model, plan: Plan, nodes: Sequence[ir.Node], unrounded: bool) -> None:
        self.names, self.plan, self.nodes, self.unrounded = GraphNames(model.graph), plan, nodes, unrounded

    def _stored(self, dtype: ir.DataType) -> ir.DataType:
        return ir.DataType.FLOAT if self.unrounded and dtype in HALVES else dtype

    def rewrite(self) -> list[tuple[ir.Node, ir.Value]]:
        """Returns the new biases: (node, constant to add behind it)."""
        by_root: dict[ir.Value, list[tuple[Rebase, Constant]]] = defaultdict(list)
        for job in self.plan.rebases:
            view = constant(self.nodes[job.node].inputs[job.input])
            if view is None:
                raise ConfigError(f"plan: input {job.input} of node {job.node} is not a constant")
            by_root[view.root].append((job, view))
        folded = _Folded(self.plan, self.nodes)
        biases = [(self.nodes[new.node], self._new_bias(new, folded)) for new in self.plan.biases]
        for root, jobs in by_root.items():
            self._rewrite_root(root, jobs, folded)
        self._set_ones()
        return biases

    def _new_bias(self, new: NewBias, folded: _Folded) -> ir.Value:
        weight = constant(self.nodes[new.node].inputs[new.adds[0].matrix[1]])
        assert weight is not None
        width = weight.shape[1 - new.adds[0].axis]
        changes = (AxisChange(0, new.placements, new.centre),) if new.placements else ()
        job = Rebase(new.node, -1, changes, new.scales, adds=new.adds)
        name = f"{self.nodes[new.node].outputs[0].name}.bias"
        recipe = _Recipe(job, self.plan.rotations, folded, None)
        zeros = ir.tensor(np.zeros(width, weight.dtype.numpy()))
        return self.names.initializer(recipe.lazy(zeros, self._stored(weight.dtype), (width,)), name)

    def _rewrite_root(self, root: ir.Value, jobs: list[tuple[Rebase, Constant]], folded: _Folded) -> None:
        signatures = {self._root_signature(job, view) for job, view in jobs}
        covered = {(self.nodes[job.node], job.input) for job, _ in jobs}
        if len(signatures) == 1 and None not in signatures and covered == set(_terminal_uses(root)):
            job, view = jobs[0]
            inverse = {axis: i for i, axis in enumerate(view.permutation)}
            recipe = _Recipe(job, self.plan.rotations, folded, tuple(inverse[a] for a in range(len(inverse))))
            source = root_tensor(root)
            root.const_value = recipe.lazy(source, self._stored(source.dtype), view.shape, name=str(root.name))
            return
        clones: dict[Any, ir.Value] = {}
        for job, view in jobs:
            key = (job.changes, *self._folds(job, range(len(view.shape))), job.expand, view.permutation, view.dtype)
            if key not in clones:
                recipe = _Recipe(job, self.plan.rotations, folded, None)
                source = root_tensor(root)
                tensor = recipe.lazy(source, self._stored(view.dtype), view.shape, view.permutation)
                clones[key] = self.names.initializer(tensor, f"{root.name}.{len(clones)}")
            self.nodes[job.node].replace_input_with(job.input, clones[key])

    def _root_signature(self, job: Rebase, view: Constant) -> Any:
        """What a job does to the stored tensor, in whatever view; None if it cannot be done in place."""
        if job.expand is not None or view.dtype != root_tensor(view.root).dtype:
            return None
        if job.adds and view.is_view:
            return None
        changes = frozenset((view.permutation[c.axis], c.placements, c.centre) for c in job.changes)
        return changes, *self._folds(job, view.permutation)

    def _folds(self, job: Rebase, axes: Sequence[int]) -> tuple[frozenset[Any], frozenset[Any]]:
        """What becomes part of the constant: the same for two uses that take over the same constants, as layers do that
        share their weights and their norms.
        """
        scales = Counter((axes[axis], _view(self.nodes, source)) for axis, source in job.scales)
        adds = Counter((_view(self.nodes, a.vector), _view(self.nodes, a.matrix), a.axis, a.factor) for a in job.adds)
        return frozenset(scales.items()), frozenset(adds.items())

    def _set_ones(self) -> None:
        """Scales that were folded away become ones, one tensor a size and type."""
        made: dict[tuple[ir.DataType, tuple[int, ...]], ir.Value] = {}
        for number, index in self.plan.ones:
            view = constant(self.nodes[number].inputs[index])
            assert view is not None
            key = (view.dtype, view.shape)
            if key not in made:
                tensor = ir.tensor(np.ones(view.shape, view.dtype.numpy()))
                made[key] = self.names.initializer(tensor, f"norm.ones.{'x'.join(map(str, view.shape))}")
            self.nodes[number].replace_input_with(index, made[key])


def _terminal_uses(value: ir.Value) -> Iterator[tuple[ir.Node | None, int]]:
    """Every use of a constant that is not itself a view of it; as an output of the graph it has no node."""
    if value.is_graph_output():
        yield None, 0
    for use in value.uses():
        views = [v for v in use.node.outputs if constant(v) is not None]
        if views:
            for view in views:
                yield from _terminal_uses(view)
        else:
            yield use.node, use.idx


class _Folded:
    """The constants that are folded into others, as they were before anything changed."""

    def __init__(self, plan: Plan, nodes: Sequence[ir.Node]) -> None:
        self.factors: dict[tuple[int, int], Array] = {}
        self._matrices: dict[tuple[int, int], tuple[ir.TensorProtocol, tuple[int, ...]]] = {}
        additions = [a for job in plan.rebases for a in job.adds] + [a for new in plan.biases for a in new.adds]
        scales = [*(job.scales for job in plan.rebases), *(new.scales for new in plan.biases)]
        vectors = [source for pairs in scales for _, source in pairs]
        for source in [*vectors, *(a.vector for a in additions)]:
            self.factors[source] = _view(nodes, source).float64().ravel()
        for source in (a.matrix for a in additions):
            view = _view(nodes, source)
            self._matrices[source] = (root_tensor(view.root), view.permutation)

    def product(self, addition: Addition) -> Array:
        """factor x vector @ matrix in float64, a slice of the matrix at a time."""
        tensor, permutation = self._matrices[addition.matrix]
        matrix = tensor.numpy().transpose(permutation)
        matrix = matrix.T if addition.axis == 1 else matrix
        vector, total = self.factors[addition.vector], np.zeros(matrix.shape[1])
        step = max(1, _SLICE_ELEMENTS // max(1, matrix.shape[1]))
        for start in range(0, len(vector), step):
            total += vector[start : start + step] @ matrix[start : start + step].astype(np.float64)
        return total * addition.factor


def _view(nodes: Sequence[ir.Node], source: tuple[int, int]) -> Constant:
    view = constant(nodes[source[0]].inputs[source[1]])
    if view is None:
        raise ConfigError(f"plan: input {source[1]} of node {source[0]} is not a constant")
    return view


class _Recipe:
    """One rebased constant, computed when asked. ``back`` maps the use's layout back to the stored one."""

    def __init__(
        self,
        job: Rebase,
        rotations: dict[str, Rotation],
        folded: _Folded,
        back: tuple[int, ...] | None,
    ) -> None:
        self.job, self.back = job, back
        self.rotations, self.folded = rotations, folded
        self.factors = [(axis, folded.factors[source]) for axis, source in job.scales]

    def lazy(
        self,
        source: ir.TensorProtocol,
        dtype: ir.DataType,
        shape: Sequence[int],
        permutation: tuple[int, ...] | None = None,
        *,
        name: str = "",
    ) -> ir.LazyTensor:
        out_shape = self._expanded(tuple(shape))
        back = self.back
        stored = out_shape if back is None else tuple(out_shape[a] for a in back)
        # In place, the use's layout is a view of the stored one; a clone is stored in the use's layout.
        forward = permutation if back is None else _inverse(back)

        def evaluate() -> ir.TensorProtocol:
            # One at a time: each uses all cores, and constants may share a source.
            with _COMPUTING:
                result = self._from(source, forward, out_shape, dtype.numpy())
                unmap(source)
            return ir.tensor(np.ascontiguousarray(result if back is None else result.transpose(back)), dtype, name=name)

        return ir.LazyTensor(evaluate, dtype, ir.Shape(stored), name=name)

    def _expanded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.job.expand is None:
            return shape
        axis, length = self.job.expand
        full = [1] * max(0, -axis - len(shape)) + list(shape)
        full[axis] = length
        return tuple(full)

    def _from(
        self,
        source: ir.TensorProtocol,
        permutation: tuple[int, ...] | None,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> Array:
        x = source.numpy()
        if permutation is not None:
            x = x.transpose(permutation)
        if self.job.adds:  # a bias, which is small
            x = x.astype(np.float64) + sum(self.folded.product(a) for a in self.job.adds)
        return self.compute(x, shape, dtype)

    def compute(self, x: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The constant in its new basis: float64 inside, one axis at a time, in slices that fit in the cache."""
        x = np.broadcast_to(x, shape)
        changes = self.job.changes or (AxisChange(0, ()),)
        scratch = threading.local()
        # Between two changes of basis nothing is rounded: intermediate results are float64.
        for number, todo in enumerate(changes):
            axis, last = todo.axis % len(shape), number == len(changes) - 1
            out = empty(shape, dtype if last else np.float64)

            def change(
                index: tuple[slice, ...],
                x: Array = x,
                out: Array = out,
                first: bool = number == 0,
                axis: int = axis,
                todo: AxisChange = todo,
            ) -> None:
                source = np.moveaxis(x[index], axis, -1)
                if not hasattr(scratch, "part") or scratch.part.size < source.size:
                    scratch.part = np.empty(source.size)
                part = scratch.part[: source.size].reshape(source.shape)
                _copy(source, part)
                if first:
                    self._scale(part, index, axis)
                _rotate_features(part, todo.placements, self.rotations, inverse=False, centre=todo.centre)
                _copy(part, np.moveaxis(out[index], axis, -1))

            # Slices do not depend on each other, and everything costly in them releases the interpreter's lock.
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(change, _slices(shape, axis)):
                    pass
            x = out
        return x

    def _scale(self, part: Array, index: tuple[slice, ...], last: int) -> None:
        """Multiply a slice, whose axis ``last`` was moved to the end, by the folded factors."""
        for axis, factor in self.factors:
            place = part.ndim - 1 if axis == last else axis - (axis > last)
            part *= factor[index[axis]].reshape([-1 if a == place else 1 for a in range(part.ndim)])


def _copy(source: Array, target: Array) -> None:
    """target[...] = source, one of them float64; matrices by the compiled copy, which is faster at turning them."""
    floats = source.dtype in _FLOATS and target.dtype in _FLOATS  # not integers behind a Cast
    if floats and source.ndim == 2 and source.flags.aligned and target.flags.aligned:
        _core.convert(source, target)
    else:
        target[...] = source


def _slices(shape: tuple[int, ...], whole: int) -> Iterator[tuple[slice, ...]]:
    """Pieces of about ``_SLICE_ELEMENTS`` that leave axis ``whole`` in one: cut along the longest of the others."""
    others = [axis for axis in range(len(shape)) if axis != whole]
    along = max(others, key=lambda axis: shape[axis]) if others else whole
    step = max(_SLICE_WIDTH, _SLICE_ELEMENTS * shape[along] // max(1, math.prod(shape))) if others else shape[along]
    for start in range(0, shape[along], max(1, step)):
        yield tuple(slice(start, start + step) if a == along else slice(None) for a in range(len(shape)))


def change_basis(
    x: Array,
    axis: int,
    placements: Sequence[Placement],
    rotations: dict[str, Rotation],
    *,
    inverse: bool = False,
) -> Array:
    """``x`` with the features along ``axis`` rotated where ``placements`` say so; the rest is copied."""
    moved = np.array(np.moveaxis(x, axis, -1), order="C")
    _rotate_features(moved, placements, rotations, inverse=inverse)
    return np.moveaxis(moved, -1, axis)


def _rotate_features(
    x: Array, placements: Sequence[Placement], rotations: dict[str, Rotation], *, inverse: bool, centre: bool = False
) -> None:
    """Rotate parts of the last axis of a contiguous array in place; ``centre`` subtracts their mean first."""
    for p in placements:
        rotation = rotations[p.rotation]
        features = x[..., p.offset : p.offset + p.length]
        tiles = features.reshape(-1, rotation.size)
        if centre:
            tiles = tiles - tiles.mean(-1, keepdims=True)
        turned = hadamard(tiles, block_size=rotation.block_size, signs=rotation.signs, transpose=inverse, out=tiles)
        if not np.shares_memory(turned, x):
            features[...] = turned.reshape(features.shape)


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(a) for a in np.argsort(permutation))


# ---------------------------------------------------------------------------------------------------------------------
# Activations.


def _insert_online(
    model: ir.Model, names: GraphNames, rotation: Rotation, online: Online, nodes: Sequence[ir.Node], number: int
) -> None:
    """Put one transform behind the producer of a value, in front of the consumers the plan names."""
    graph = model.graph
    value = _produced(graph, nodes, online)
    if value.dtype is None:  # few exporters annotate inner values; discovery inferred it
        value.dtype = ir.DataType[online.dtype]
    before = value.producer()
    if online.centre:
        value = subtract_mean(names, value)
        before = value.producer()
    node = add_hadamard(
        model,
        value,
        size=online.width,
        block_size=rotation.block_size,
        signs=None if rotation.signs is None else np.tile(rotation.signs, online.width // rotation.size),
        transpose=online.inverse,
        name=names.unique(f"{value.name}/Hadamard_{number}"),
    )
    node.outputs[0].name = names.unique(str(node.outputs[0].name))
    if before is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(before, node)
    result = node.outputs[0]
    for consumer, index in online.consumers:
        if consumer >= 0:
            nodes[consumer].replace_input_with(index, result)
        else:  # the graph's output keeps its name
            name = value.name
            value.name, result.name = names.unique(f"{name}.rotated"), name
            graph.outputs[index] = result


def _produced(graph: ir.Graph, nodes: Sequence[ir.Node], online: Online) -> ir.Value:
    consumer, index = online.consumers[0]
    value = graph.outputs[index] if consumer < 0 else nodes[consumer].inputs[index]
    if value is None:
        raise ConfigError(f"plan: input {index} of node {consumer} is absent")
    return value
