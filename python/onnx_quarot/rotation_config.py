"""AMD Quark's ``rotation_config.json``: read and honoured in place of discovery for R1, and written from a plan.

The file is ``{"R1_pairs": [{"prev_nodes": [...], "norm_node": "...", "next_nodes": [...]}, ...]}``, every key optional:
the norm's scale is folded into the next nodes, the previous nodes' outputs (and biases) and the next nodes' inputs are
rotated. All pairs of one size share one matrix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery import discover_model, fingerprint
from onnx_quarot.discovery.constants import Constant, constant
from onnx_quarot.discovery.prepare import prepare
from onnx_quarot.discovery.rules import is_linear
from onnx_quarot.errors import ConfigError
from onnx_quarot.plan import AxisChange, Placement, Plan, Rebase
from onnx_quarot.transform import Rotation, largest_block

_NORM_SCALE = {
    "SimplifiedLayerNormalization": 1,
    "RMSNormalization": 1,
    "SkipSimplifiedLayerNormalization": 2,
}


@dataclass(frozen=True)
class Pair:
    """Names of nodes: the stream's writers, the norm after it, the readers of the norm."""

    prev_nodes: tuple[str, ...]
    norm_node: str | None
    next_nodes: tuple[str, ...]


def read_rotation_config(path: str | Path) -> tuple[Pair, ...]:
    """The R1 pairs in the file. Raises ConfigError for a file that is missing, not JSON, or of another form."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"rotation config: {str(path)!r} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"rotation config: {str(path)!r} is not JSON ({error})") from error
    pairs = data.get("R1_pairs") if isinstance(data, dict) else None
    if not isinstance(pairs, list) or set(data) != {"R1_pairs"}:
        raise ConfigError(f'rotation config: {str(path)!r} must be an object with the one key "R1_pairs", a list')
    return tuple(_pair(p, i) for i, p in enumerate(pairs))


def _pair(data: Any, number: int) -> Pair:
    where = f"rotation config: R1_pairs[{number}]"
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be an object, found {type(data).__name__}")
    if unknown := set(data) - {"prev_nodes", "norm_node", "next_nodes"}:
        raise ConfigError(f"{where} has the unknown key {sorted(unknown)[0]!r}")
    names = []
    for key in ("prev_nodes", "next_nodes"):
        value = data.get(key) or []
        if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
            raise ConfigError(f"{where}: {key} must be a list of node names")
        names.append(tuple(value))
    norm = data.get("norm_node")
    if norm is not None and not isinstance(norm, str):
        raise ConfigError(f"{where}: norm_node must be a node name")
    return Pair(names[0], norm or None, names[1])


def plan_from_config(
    model: ir.Model,
    pairs: Iterable[Pair],
    *,
    rotations: Iterable[str],
    block_size: int | None = None,
    seed: int | None = None,
    keys: bool = False,
    convolutions: bool = True,
    left: Iterable[str] = (),
) -> Plan:
    """R1 exactly as ``pairs`` say; the other rotations as discovered. The result is proven like any other plan."""
    others = discover_model(
        model,
        rotations=set(rotations) - {"R1"},
        block_size=block_size,
        seed=seed,
        keys=keys,
        convolutions=convolutions,
        left=left,
    )
    return _ConfigPlan(model, others, block_size, seed).build(tuple(pairs))


class _ConfigPlan:
    def __init__(self, model: ir.Model, others: Plan, block_size: int | None, seed: int | None) -> None:
        self.nodes = {str(n.name): n for n in model.graph}
        self.index = {n: i for i, n in enumerate(model.graph)}
        self.model, self.others, self.block_size = model, others, block_size
        # Not the stream of numbers the other rotations were drawn from.
        self.rng = None if seed is None else np.random.default_rng((seed, 1))
        self.rotations: dict[int, str] = {}
        self.made: dict[str, Rotation] = {}
        self.jobs: dict[tuple[int, int], Rebase] = {(r.node, r.input): r for r in others.rebases}
        self.seen: set[tuple[int, int, int]] = set()
        self.ones: set[tuple[int, int]] = set(others.ones)

    def build(self, pairs: tuple[Pair, ...]) -> Plan:
        readers: set[int] = set()
        for number, pair in enumerate(pairs):
            where = f"rotation config: R1_pairs[{number}]"
            fold = None if pair.norm_node is None else self._norm(pair.norm_node, where)
            for name in pair.prev_nodes:
                self._rotate_output(self._node(name, where), where)
            for name in pair.next_nodes:
                readers.add(self._rotate_input(self._node(name, where), fold, where))
            if fold is not None:
                self.ones.add(fold)
        sites = tuple(
            replace(s, how="offline", rotation=self.rotations[s.inputs], reason=None) if s.node in readers else s
            for s in self.others.sites
        )
        return replace(
            self.others,
            fingerprint=fingerprint(self.model),
            rotations={**self.made, **self.others.rotations},
            kinds={**dict.fromkeys(self.made, "R1"), **self.others.kinds},
            sites=sites,
            rebases=tuple(self.jobs[key] for key in sorted(self.jobs)),
            ones=tuple(sorted(self.ones)),
            notes=(*self.others.notes, "R1 as the rotation config says"),
        )

    def _node(self, name: str, where: str) -> ir.Node:
        if name not in self.nodes:
            raise ConfigError(f"{where}: the model has no node named {name!r}")
        return self.nodes[name]

    def _norm(self, name: str, where: str) -> tuple[int, int]:
        node = self._node(name, where)
        if node.op_type not in _NORM_SCALE:
            raise ConfigError(f"{where}: norm_node {name!r} is a {node.op_type}; an RMS norm is needed")
        return self.index[node], _NORM_SCALE[node.op_type]

    def _rotation(self, size: int) -> str:
        if size not in self.rotations:
            name = f"R1.{len(self.rotations)}"
            block = self.block_size if self.block_size and size % self.block_size == 0 else largest_block(size)
            self.rotations[size] = name
            self.made[name] = Rotation.make(size, block_size=block, rng=self.rng)
        return self.rotations[size]

    def _change(self, node: ir.Node, index: int, axis: int, view: Constant) -> None:
        """Rotate one axis of a constant operand, once however many pairs name it."""
        axis %= len(view.shape)
        number = self.index[node]
        if (number, index, axis) in self.seen:
            return
        self.seen.add((number, index, axis))
        size = view.shape[axis]
        change = AxisChange(axis, (Placement(0, size, self._rotation(size)),))
        job = self.jobs.get((number, index), Rebase(number, index))
        self.jobs[number, index] = replace(job, changes=(*job.changes, change))

    def _rotate_output(self, node: ir.Node, where: str) -> None:
        table = constant(node.inputs[0]) if node.op_type == "Gather" else None
        if table is not None:
            self._change(node, 0, -1, table)
            return
        weight = self._weight(node, where)
        self._change(node, 1, 0 if node.attributes.get_int("transB", 0) else 1, weight)
        if len(node.inputs) > 2 and (bias := constant(node.inputs[2])) is not None:
            self._change(node, 2, -1, bias)
        for use in node.outputs[0].uses():
            if use.node.op_type == "Add" and (bias := constant(use.node.inputs[1 - use.idx])) is not None:
                self._change(use.node, 1 - use.idx, -1, bias)

    def _rotate_input(self, node: ir.Node, fold: tuple[int, int] | None, where: str) -> int:
        weight = self._weight(node, where)
        axis = 1 if node.attributes.get_int("transB", 0) else 0
        self._change(node, 1, axis, weight)
        number = self.index[node]
        job = self.jobs[number, 1]
        if fold is not None and (axis, fold) not in job.scales:
            self.jobs[number, 1] = replace(job, scales=(*job.scales, (axis, fold)))
        return number

    def _weight(self, node: ir.Node, where: str) -> Constant:
        weight = constant(node.inputs[1]) if is_linear(node) else None
        if weight is None:
            raise ConfigError(f"{where}: {node.name!r} is a {node.op_type} without a constant matrix")
        return weight


def write_rotation_config(model: ir.Model, plan: Plan) -> dict[str, Any]:
    """The R1 part of a plan in Quark's form: one pair a norm (and one more for the last writers, if any).

    ``model``: the one the plan was made from; it is brought into the form the plan speaks of.
    """
    prepare(model, keys=plan.keys)
    nodes = list(model.graph)
    r1 = {name for name, kind in plan.kinds.items() if kind == "R1"}
    writers = []
    for job in plan.rebases:
        node = nodes[job.node]
        axes = {c.axis % 2 for c in job.changes if any(p.rotation in r1 for p in c.placements)}
        if (node.op_type == "Gather" and job.input == 0 and axes) or (
            is_linear(node) and job.input == 1 and (0 if node.attributes.get_int("transB", 0) else 1) in axes
        ):
            writers.append(str(node.name))
    pairs: dict[str, list[str]] = {}
    for job in plan.rebases:
        for _, (norm, _index) in job.scales:
            pairs.setdefault(str(nodes[norm].name), []).append(str(nodes[job.node].name))
    order = {str(n.name): i for i, n in enumerate(nodes)}
    result: list[dict[str, Any]] = []
    waiting = list(writers)
    for name, readers in sorted(pairs.items(), key=lambda item: order[item[0]]):
        before = [w for w in waiting if order[w] < order[name]]
        waiting = [w for w in waiting if order[w] > order[name]]
        result.append({"prev_nodes": before, "norm_node": name, "next_nodes": readers})
    if waiting:
        result.append({"prev_nodes": waiting, "next_nodes": []})
    return {"R1_pairs": result}
