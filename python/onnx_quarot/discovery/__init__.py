"""Discovery: from a graph to a plan. ``shapes -> rules (typing) -> labels -> plan``; nothing is modified.

Names of nodes and tensors are hints for people here, never for decisions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.basis import Segment
from onnx_quarot.discovery.constants import constant, root_tensor, tensor_shape, uniform
from onnx_quarot.discovery.labels import Labels
from onnx_quarot.discovery.rules import apply_rules
from onnx_quarot.discovery.shapes import Shapes
from onnx_quarot.discovery.tied import keep_tied
from onnx_quarot.discovery.typing import Def, Expansion, Out, Port, Typing, Use
from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.plan import ROTATIONS, AxisChange, Online, Placement, Plan, Rebase, Site, State
from onnx_quarot.transform import Rotation, has_order, largest_block

__all__ = ["discover_model", "fingerprint"]


def discover_model(
    model: ir.Model,
    *,
    rotations: Iterable[str] = ROTATIONS,
    block_size: int | None = None,
    seed: int | None = None,
    tied: bool = False,
) -> Plan:
    """Decide what is rotated in ``model`` and how.

    rotations: which of R1 (the residual stream), R2 (attention values, a rotation a head), R3 (queries and keys) and R4
    (everything else, usually online in front of the down projection) may be used. block_size: rotate in blocks of this
    many features instead of whole axes where it divides them. seed: random signs in front of every rotation, drawn in
    the order of the graph; None for plain Hadamard matrices. tied: leave an embedding table that is also a linear
    layer's weight in its basis, so that it stays one matrix (see :mod:`tied`).

    Raises ModelError when the model holds no linear layer, ConfigError for an unknown rotation or an impossible size.
    """
    wanted = frozenset(rotations)
    if unknown := wanted - set(ROTATIONS):
        raise ConfigError(f"rotations: {sorted(unknown)} unknown; choose among {', '.join(ROTATIONS)}")
    if block_size is not None and not has_order(block_size):
        raise ConfigError(
            f"block_size: no Hadamard matrix of {block_size} is available; use a power of two, 12, 20, ..."
        )
    typing = Typing(model.graph, Shapes(model))
    apply_rules(typing)
    kept = keep_tied(typing) if tied else []
    if not typing.reads:
        raise ModelError("the model has no linear layer (MatMul or Gemm with a constant matrix): nothing to rotate")
    plan = _Builder(model, typing, Labels(typing, wanted), block_size, seed).plan(wanted)
    notes = [f"{name} stays tied: the table and the layer keep one matrix, in its own basis" for name in kept]
    return replace(plan, notes=(*plan.notes, *notes))


def fingerprint(model: ir.Model) -> str:
    """Identifies the graph (not the weights' values): operators, wiring, and the shapes of constants."""
    digest = hashlib.sha256()
    for node in model.graph:
        names = [v.name if v is not None else "" for v in node.inputs]
        digest.update(repr((node.domain, node.op_type, names, [v.name for v in node.outputs])).encode())
    for name, value in sorted(model.graph.initializers.items()):
        tensor = root_tensor(value)
        digest.update(repr((name, int(tensor.dtype), tensor_shape(tensor))).encode())
    return digest.hexdigest()[:16]


class _Builder:
    """Turns labels into the flat lists of a plan."""

    def __init__(
        self, model: ir.Model, typing: Typing, labels: Labels, block_size: int | None, seed: int | None
    ) -> None:
        self.model, self.t, self.labels = model, typing, labels
        self.block_size = block_size
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.index = {node: i for i, node in enumerate(model.graph)}
        self.ids: dict[Segment, str] = {}
        self.rotations: dict[str, Rotation] = {}
        self.kinds: dict[str, str] = {}
        self.notes: list[str] = []

    def plan(self, wanted: frozenset[str]) -> Plan:
        self._name_rotations()
        folds, ones = self._folds()
        online = self._online()
        if "R3" in wanted:
            self.notes.append("R3 was left out: it only pays with a quantized key cache")
        return Plan(
            fingerprint=fingerprint(self.model),
            rotations=self.rotations,
            kinds=self.kinds,
            sites=self._sites(online),
            rebases=self._rebases(folds),
            ones=ones,
            online=online,
            states=self._states(),
            bases=self._bases(),
            notes=tuple(self.notes),
        )

    # -- rotations -----------------------------------------------------------------------------------------------------
    def _name_rotations(self) -> None:
        """One rotation a leaf that is rotated anywhere, in the order of the graph."""
        counts: dict[str, int] = {}
        for (value, axis), _ in self.t.segments.items():
            ports: list[Port] = [Def(value), *(Use(u.node, u.idx) for u in value.uses())]
            for leaf in dict.fromkeys(self.labels.leaves(value, axis)):
                if leaf in self.ids or not any(self.labels.rotated(p, axis, leaf) for p in ports):
                    continue
                kind = self.labels.kind(leaf)
                name = f"{kind}.{counts.setdefault(kind, 0)}"
                counts[kind] += 1
                self.ids[leaf] = name
                self.kinds[name] = kind
                self.rotations[name] = self._rotation(leaf, name)

    def _rotation(self, leaf: Segment, name: str) -> Rotation:
        block = largest_block(leaf.length)
        if self.block_size is not None:
            if leaf.length % self.block_size == 0:
                block = self.block_size
            else:
                self._note(f"block_size: {self.block_size} does not divide {leaf.length}, rotated in blocks of {block}")
        elif block != leaf.length:
            self._note(f"{leaf.length} has no Hadamard matrix: rotated in blocks of {block}")
        return Rotation.make(leaf.length, block_size=block, rng=self.rng)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _placements(self, port: Port, axis: int) -> tuple[Placement, ...]:
        """Runs of equal rotations along an axis."""
        runs: list[Placement] = []
        for offset, leaf, on in self.labels.spans(port, axis):
            if not on:
                continue
            name = self.ids[leaf]
            if runs and runs[-1].rotation == name and runs[-1].offset + runs[-1].length == offset:
                runs[-1] = Placement(runs[-1].offset, runs[-1].length + leaf.length, name)
            else:
                runs.append(Placement(offset, leaf.length, name))
        return tuple(runs)

    # -- lists ---------------------------------------------------------------------------------------------------------
    def _folds(self) -> tuple[dict[ir.Node, list[tuple[int, int]]], tuple[tuple[int, int], ...]]:
        """Norm scales that must leave: which readers absorb which, and the inputs that become ones."""
        folds: dict[ir.Node, list[tuple[int, int]]] = {}
        ones = []
        for scale in self.t.scales:
            if not self.labels.any_rotated(scale.out, self.t.rank(scale.out) - 1):
                continue
            view = constant(scale.node.inputs[scale.index])
            if view is None or uniform(view):
                continue  # commutes as it is, and a tied table can stay tied
            source = (self.index[scale.node], scale.index)
            ones.append(source)
            for reader in scale.readers:
                folds.setdefault(reader, []).append(source)
        return folds, tuple(ones)

    def _rebases(self, folds: dict[ir.Node, list[tuple[int, int]]]) -> tuple[Rebase, ...]:
        expansions = {e.port: e for e in self.t.expansions}
        result = []
        for node, number in self.index.items():
            for i, value in enumerate(node.inputs):
                if value is None or constant(value) is None or not self.t.known(Use(node, i)):
                    continue
                port = Use(node, i)
                axes = range(self.t.rank(port))
                found = [(axis, self._placements(port, axis)) for axis in axes]
                changes = [AxisChange(axis, placements) for axis, placements in found if placements]
                scales: tuple[tuple[int, tuple[int, int]], ...] = ()
                if i == 1 and node in folds:
                    axis = 1 if node.attributes.get_int("transB", 0) else 0
                    scales = tuple((axis, source) for source in folds[node])
                expand = None
                if (e := expansions.get(port)) is not None:
                    expand = self._expansion(e, changes)
                if changes or scales:
                    result.append(Rebase(number, i, tuple(changes), scales, expand))
        return tuple(result)

    def _expansion(self, e: Expansion, changes: list[AxisChange]) -> tuple[int, int] | None:
        placements = self._placements(e.out, e.axis)
        if not placements:
            return None
        axis = e.axis - self.t.rank(e.out)
        changes.append(AxisChange(axis, placements))
        return axis, self.t.size(e.out, e.axis)

    def _online(self) -> tuple[Online, ...]:
        jobs: dict[tuple[ir.Value, bool], list[tuple[int, int]]] = {}
        leaf_of: dict[ir.Value, Segment] = {}
        for value, axis, source, ends in self.labels.boundaries():
            for leaf in set(self.labels.leaves(value, axis)):
                before = self.labels.rotated(source, axis, leaf)
                for end in ends:
                    if self.labels.rotated(end, axis, leaf) != before:
                        leaf_of[value] = leaf
                        jobs.setdefault((value, before), []).append(self._consumer(end))
        return tuple(
            Online(
                value=str(value.name),
                rotation=self.ids[leaf_of[value]],
                inverse=inverse,
                consumers=tuple(ends),
                width=self.t.size(Def(value), -1),
                dtype=self.t.shapes.dtype[value].name,
            )
            for (value, inverse), ends in jobs.items()
        )

    def _consumer(self, end: Use | Out) -> tuple[int, int]:
        if isinstance(end, Out):
            return -1, list(self.model.graph.outputs).index(end.value)
        return self.index[end.node], end.index

    def _sites(self, online: tuple[Online, ...]) -> tuple[Site, ...]:
        paid = {consumer for o in online for consumer in o.consumers}
        sites = []
        for read in self.t.reads:
            node, number = read.port.node, self.index[read.port.node]
            weight = constant(node.inputs[1])
            assert weight is not None
            rows, columns = weight.shape[::-1] if node.attributes.get_int("transB", 0) else weight.shape
            placements = self._placements(read.port, read.axis)
            how = "none" if not placements else "online" if (number, read.port.index) in paid else "offline"
            sites.append(
                Site(
                    node=number,
                    name=node.name or str(node.outputs[0].name),
                    op_type=node.op_type,
                    inputs=rows,
                    outputs=columns,
                    how=how,
                    rotation=placements[0].rotation if placements else None,
                    reason=None if placements else self.labels.why(read.port, read.axis),
                )
            )
        return tuple(sites)

    def _states(self) -> tuple[State, ...]:
        found = []
        for s in self.t.states:
            if placements := self._placements(Def(s.past), s.axis):
                found.append(State(str(s.past.name), str(s.present.name), placements[0].rotation))
        return tuple(found)

    def _bases(self) -> dict[str, tuple[Placement, ...]]:
        bases = {}
        for value, axis, source, _ in self.labels.boundaries():
            if axis == self.t.rank(source) - 1 and (placements := self._placements(source, axis)):
                bases[str(value.name)] = placements
        return bases
