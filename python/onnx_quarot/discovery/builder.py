"""From labels to the flat lists of a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.basis import Segment
from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.folds import Folds
from onnx_quarot.discovery.labels import Labels
from onnx_quarot.discovery.rules.readers import is_convolution
from onnx_quarot.discovery.typing import Def, Expansion, Out, Port, Read, Slot, Typing, Use
from onnx_quarot.editing import numbered
from onnx_quarot.plan import AxisChange, NewBias, Online, Placement, Plan, Rebase, Site, State
from onnx_quarot.transform import Rotation, largest_block


class Builder:
    """Names the rotations, and says for every constant and every edge what they mean for it."""

    def __init__(
        self, model: ir.Model, typing: Typing, labels: Labels, block_size: int | None, seed: int | None
    ) -> None:
        self.model, self.t, self.labels = model, typing, labels
        self.block_size = block_size
        self.rng = None if seed is None else np.random.default_rng(seed)
        nodes = numbered(model.graph)
        self.index = {node: i for i, node in enumerate(model.graph)}
        self._inner = {node: i for i, node in enumerate(nodes) if i >= len(self.index)}
        self.ids: dict[Segment, str] = {}
        self.rotations: dict[str, Rotation] = {}
        self.kinds: dict[str, str] = {}
        self.notes: list[str] = []

    def plan(self, wanted: frozenset[str], fingerprint: str, *, keys: bool) -> Plan:
        self._name_rotations()
        folds = Folds(self.t, self.labels, self.index)
        online = self._online()
        self._warn_of_uneven_scales(folds.uneven)
        if "R3" in wanted and "R3" not in self.kinds.values():
            self.note("R3 was left out: no keys are cached that could be rotated, and none can be rotated for nothing")
        return Plan(
            fingerprint=fingerprint,
            rotations=self.rotations,
            kinds=self.kinds,
            sites=self._sites(online),
            rebases=self._rebases(folds),
            ones=tuple(folds.ones),
            norms=tuple(folds.norms),
            bypassed=tuple(folds.bypassed),
            biases=self._biases(folds),
            online=online,
            states=self._states(),
            bases=self._bases(),
            keys=keys,
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
                self.rotations[name] = self._rotation(leaf, kind)

    def _rotation(self, leaf: Segment, kind: str) -> Rotation:
        block = largest_block(leaf.length)
        if self.block_size is not None:
            if leaf.length % self.block_size == 0:
                block = self.block_size
            else:
                self.note(f"block_size: {self.block_size} does not divide {leaf.length}, rotated in blocks of {block}")
        elif block != leaf.length:
            self.note(f"{leaf.length} has no Hadamard matrix: rotated in blocks of {block}")
        rng = self.rng
        if rng is None and kind == "R4":
            # What activation functions and pooling make has a mean, which the matrix's row of ones would gather in a
            # single feature, an outlier where there was none. Signs, the same in every model, spread it.
            rng = np.random.default_rng(leaf.length)
        return Rotation.make(leaf.length, block_size=block, rng=rng)

    def _warn_of_uneven_scales(self, uneven: Mapping[str, float]) -> None:
        if uneven:
            worst = max(uneven, key=lambda name: uneven[name])
            self.note(
                f"{len(uneven)} norms scale a few features far more than others: rotated, the integer weights behind "
                f"{worst!r} have about {uneven[worst]:.0f} times the errors; compare with rotations=(), and with "
                "weights='gptq', which makes up for a part"
            )

    def note(self, text: str) -> None:
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
    def _rebases(self, folds: Folds) -> tuple[Rebase, ...]:
        expansions: dict[Use, list[Expansion]] = defaultdict(list)
        for e in self.t.expansions:
            expansions[e.port].append(e)
        result = []
        for node, number in self.index.items():
            for i, value in enumerate(node.inputs):
                if value is None or constant(value) is None or not self.t.known(Use(node, i)):
                    continue
                port = Use(node, i)
                found = [(axis, self._placements(port, axis)) for axis in range(self.t.rank(port))]
                changes = [
                    AxisChange(axis, placements, self.labels.centred(port, axis))
                    for axis, placements in found
                    if placements
                ]
                expand = None
                for e in expansions[port]:
                    expand = self._expansion(e, changes) or expand
                scales, adds = tuple(folds.scales[number, i]), tuple(folds.adds[number, i])
                if changes or scales or adds:
                    result.append(Rebase(number, i, tuple(changes), scales, expand, adds))
        return tuple(result)

    def _expansion(self, e: Expansion, changes: list[AxisChange]) -> tuple[int, int] | None:
        placements = self._placements(e.out, e.axis)
        if not placements:
            return None
        axis = e.axis - self.t.rank(e.out)
        changes.append(AxisChange(axis, placements, self.labels.centred(e.out, e.axis)))
        return axis, self.t.size(e.out, e.axis)

    def _biases(self, folds: Folds) -> tuple[NewBias, ...]:
        result = []
        for node, adds in folds.new_biases.items():
            out = Def(node.outputs[0])
            axis = self.t.rank(out) - 1
            scales = tuple((0, factor) for factor in folds.behind[node])
            placements, centre = self._placements(out, axis), self.labels.centred(out, axis)
            result.append(NewBias(self.index[node], tuple(adds), placements, centre, scales))
        return tuple(result)

    def _online(self) -> tuple[Online, ...]:
        jobs: dict[tuple[ir.Value, bool, Segment, bool], list[tuple[int, int]]] = {}
        for value, axis, source, ends in self.labels.boundaries():
            for leaf in set(self.labels.leaves(value, axis)):
                before = self.labels.rotated(source, axis, leaf)
                for end in ends:
                    if self.labels.rotated(end, axis, leaf) != before:
                        centre = not before and self.labels.centred(end, axis)
                        jobs.setdefault((value, before, leaf, centre), []).append(self._consumer(end))
        for read in self.t.reads:
            if read.slot in self.t.apart:
                (leaf,) = self.labels.leaves(self._basis(read)[0].value, self._basis(read)[1])
                jobs.setdefault((read.port.value, False, leaf, False), []).append(self._consumer(read.port))
        return tuple(
            Online(
                value=str(value.name),
                rotation=self.ids[leaf],
                inverse=inverse,
                consumers=tuple(ends),
                width=self.t.size(Def(value), -1),
                dtype=self.t.shapes.dtype[value].name,
                centre=centre,
            )
            for (value, inverse, leaf, centre), ends in jobs.items()
        )

    def _basis(self, read: Read) -> tuple[Use, int]:
        """Where the basis a layer reads shows: at its input, or at its weight if it has a transform of its own."""
        slot = read.slot
        return (Use(slot.node, slot.weight), slot.axis) if slot in self.t.apart else (read.port, read.axis)

    def _consumer(self, end: Use | Out) -> tuple[int, int]:
        if isinstance(end, Out):
            return -1, list(self.model.graph.outputs).index(end.value)
        number = self.index.get(end.node)
        return (self._inner[end.node] if number is None else number), end.index

    def _sites(self, online: tuple[Online, ...]) -> tuple[Site, ...]:
        paid = {consumer for o in online for consumer in o.consumers}
        sites = []
        for read in self.t.reads:
            placements = self._placements(*self._basis(read))
            spent = (self.index[read.slot.node], read.slot.input) in paid
            how = "none" if not placements else "online" if spent else "offline"
            reason = None if placements else self.labels.why(read.port, read.axis)
            sites.append(self._site(read.slot, how, placements[0].rotation if placements else None, reason))
        why = "the width of its input is unknown or not fixed"
        if any(v.shape is None or not v.shape.is_static() for v in self.model.graph.inputs):
            why += "; stating fixed shapes of the graph's inputs may settle it"  # a trace that only takes one length
        for slot in self.t.unknown:
            sites.append(self._site(slot, "none", None, why))
        return tuple(sorted(sites, key=lambda site: site.node))

    def _site(self, slot: Slot, how: str, rotation: str | None, reason: str | None) -> Site:
        node = slot.node
        weight = constant(node.inputs[slot.weight])
        assert weight is not None
        rank = len(weight.shape)
        convolves = is_convolution(node)
        columns = 0 if convolves or slot.axis == rank - 1 else rank - 1
        if slot.axis == rank - 1 and rank > 2 and not convolves:
            columns = rank - 2
        return Site(
            node=self.index[node],
            name=node.name or str(node.outputs[0].name),
            op_type=node.op_type,
            inputs=weight.shape[slot.axis],
            outputs=weight.size // weight.shape[slot.axis] if node.op_type == "Einsum" else weight.shape[columns],
            how=how,
            rotation=rotation,
            reason=reason,
        )

    def _states(self) -> tuple[State, ...]:
        found = []
        for s in self.t.states:
            if placements := self._placements(Def(s.past), s.axis):
                found.append(State(str(s.past.name), str(s.present.name), placements[0].rotation))
        if found:
            which = f"the cache {found[0].past!r} is" if len(found) == 1 else f"{len(found)} caches are"
            self.note(f"{which} in a new basis: begin empty, or with what this model wrote, not with another's")
        elif self.t.begun is not None:
            self.note(
                f"caches keep their basis: {self.t.begun.name!r} holds keys or values that this model never writes, "
                "and the model that does may begin the caches too"
            )
        return tuple(found)

    def _bases(self) -> dict[str, tuple[Placement, ...]]:
        """Produced values in a new basis; those that lost their mean on the way cannot be brought back."""
        bases = {}
        for value, axis, source, _ in self.labels.boundaries():
            if value in self.t.packed:
                continue
            if axis == self.t.rank(source) - 1 and (placements := self._placements(source, axis)):
                bases[str(value.name)] = placements
        return bases
