"""How far tensors of a model and of its rotated form are apart, each in its own basis, and where that begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.prepare import prepare
from onnx_quarot.errors import ModelError
from onnx_quarot.load import load
from onnx_quarot.plan import Placement, Plan
from onnx_quarot.rewrite import change_basis
from onnx_quarot.segments import run_in_segments
from onnx_quarot.widen import widen_alike

Array = np.ndarray[Any, Any]


def relative_error(a: Array, b: Array) -> float:
    """max |a - b| / max |a|; inf for different shapes or values that are not finite in one only. Where both are
    infinite alike (masks), the rest is compared.
    """
    if a.shape != b.shape:
        return float("inf")
    if a.size == 0:
        return 0.0
    if a.dtype.kind in "OSU":  # text
        return 0.0 if np.array_equal(a, b) else float("inf")
    x, y = a.astype(np.float64), b.astype(np.float64)
    if np.array_equal(x, y, equal_nan=True):
        return 0.0
    finite = np.isfinite(x)
    if np.isnan(x).any() or not np.array_equal(x[~finite], y[~finite]) or not np.isfinite(y[finite]).all():
        return float("inf")
    x, y = x[finite], y[finite]
    return float(np.abs(x - y).max() / max(np.abs(x).max(), np.finfo(np.float64).tiny))


def into_basis(feeds: Mapping[str, Array], plan: Plan) -> dict[str, Array]:
    """What the rotated model is to be fed: caches in their new basis."""
    changed = dict(feeds)
    for state in plan.states:
        x = feeds[state.past]
        changed[state.past] = _changed(x, [_whole(x, state.rotation)], plan, inverse=False)
    return changed


def out_of_basis(name: str, x: Array, plan: Plan) -> Array:
    """Output ``name`` of the rotated model as the model as given would say it."""
    for state in plan.states:
        if state.present == name:
            return _changed(x, [_whole(x, state.rotation)], plan, inverse=True)
    return x


def _whole(x: Array, rotation: str) -> Placement:
    return Placement(0, x.shape[-1], rotation)


def _changed(x: Array, placements: Iterable[Placement], plan: Plan, *, inverse: bool) -> Array:
    rotated = change_basis(x.astype(np.float64), x.ndim - 1, list(placements), plan.rotations, inverse=inverse)
    return rotated.astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------


# What is made of a tensor without changing a number.
_VIEWS = frozenset(("Cast", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"))
_INNER = 0.1  # of what an output may differ by: softer nodes than the one at fault may hide most of it


class _Verdict(Enum):
    SAME = 0
    OTHER = 1
    UNKNOWN = 2  # other numbers, perhaps rightly: in another basis, or without a factor or bias that was moved


def first_difference(
    original: Path, candidate: Path, feeds: Mapping[str, Array], plan: Plan, output: str, allowed: float
) -> str:
    """The tensor where the error of ``output`` begins.

    Looked for from the output backwards, past tensors that agree: many in a rotated model differ rightly, and what is
    made of them agrees again.
    """
    model, rotated = load(original), load(candidate)
    there = _made(model) & _made(rotated)
    widen_alike(model, rotated)  # from here on it is the graph that the plan was made for
    prepare(model, keys=plan.keys)
    graph_outputs = set(model.graph.outputs)
    names = [
        str(v.name)
        for node in model.graph
        for v in node.outputs
        if v.name in there and v not in graph_outputs and v.name
    ]
    try:
        before = run_in_segments(original, feeds, names)
        after = run_in_segments(candidate, into_basis(feeds, plan), names)
    except ModelError as error:  # the verdict stands without it
        return f"a tensor that could not be found ({error})"
    moved = _moved(list(model.graph), plan)
    verdicts = {
        name: _verdict(x, y, plan.bases.get(name), plan, _INNER * allowed)
        for name, x, y in zip(names, before, after, strict=True)
        if name not in moved
    }
    reached = {v for v in graph_outputs if v.name == output}
    pending = list(reached)
    while pending:
        node = pending.pop().producer()
        for value in node.inputs if node is not None else ():
            if value is not None and value not in reached and verdicts.get(str(value.name)) is not _Verdict.SAME:
                reached.add(value)
                pending.append(value)
    for node in model.graph:
        for value in node.outputs:
            if value in reached and verdicts.get(str(value.name)) is _Verdict.OTHER:
                return f"{str(value.name)!r} (made by {node.op_type} {node.name!r})"
    return "the output itself"


def _made(model: ir.Model) -> set[str]:
    return {str(v.name) for node in model.graph for v in node.outputs}


def _moved(nodes: list[ir.Node], plan: Plan) -> set[str]:
    """Tensors that lost a scale or bias on purpose: norms, and what a factor or bias behind it was taken over by."""
    moved = {
        str(nodes[number].outputs[0].name)
        for number in (
            *(n for n, _ in plan.ones),
            *(n for n, _ in plan.bypassed),
            *plan.norms,
            *(b.node for b in plan.biases),
        )
    }
    pending = [nodes[number].inputs[index] for number, index in plan.bypassed]
    pending += [value for job in plan.rebases if job.adds for value in nodes[job.node].inputs]
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if value is not None and node is not None:
            moved.add(str(value.name))
            if node.op_type == "Add":
                pending += node.inputs
    for node in nodes:
        if node.op_type in _VIEWS and str(node.inputs[0].name if node.inputs[0] else "") in moved:
            moved |= {str(v.name) for v in node.outputs}
    return moved


def _verdict(x: Array, y: Array, placements: Iterable[Placement] | None, plan: Plan, allowed: float) -> _Verdict:
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):  # sequences
        return _Verdict.UNKNOWN
    if x.dtype.kind != "f":
        return _Verdict.SAME if np.array_equal(x, y) else _Verdict.OTHER
    if placements is not None:
        known = _changed(y, placements, plan, inverse=True)
        centred = x - x.mean(-1, keepdims=True)  # a stream that LayerNorms read may have lost its mean
        close = min(relative_error(x, known), relative_error(centred, known)) <= allowed
        return _Verdict.SAME if close else _Verdict.OTHER
    if x.shape == y.shape:
        apart = x != y  # beside a mask's huge numbers, which are equal, nothing else would count
        if relative_error(x[apart], y[apart]) <= allowed:
            return _Verdict.SAME
    return _Verdict.UNKNOWN if x.shape == y.shape and _perhaps_turned(x, y, allowed) else _Verdict.OTHER


def _perhaps_turned(x: Array, y: Array, allowed: float) -> bool:
    """Whether lengths along some axis agree, or sums along the last: another basis, or squares inside a norm."""
    wide = x.astype(np.float64), y.astype(np.float64)
    for axis in (axis for axis in range(x.ndim) if x.shape[axis] > 1):
        for a, b in (wide, tuple(v - v.mean(axis, keepdims=True) for v in wide)):
            if relative_error(np.linalg.norm(a, axis=axis), np.linalg.norm(b, axis=axis)) <= allowed:
                return True
    return x.ndim > 0 and relative_error(wide[0].sum(-1), wide[1].sum(-1)) <= allowed
