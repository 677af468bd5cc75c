"""Streams that can be kept at zero mean, so that a LayerNorm on them is an RMS norm, which commutes with a rotation.

A stream is everything that sums tie together. Whatever writes it can be centred for nothing if it is a constant (a
weight, a bias, a table: W C with C = I - 11^T / n), or by subtracting the mean where an activation enters it together
with an online rotation. That changes its values, so all of its readers must be LayerNorms, which subtract the mean
themselves (SliceGPT, arXiv:2401.15024). RMS norms do not, and their streams are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnx_quarot.discovery.basis import DisjointSets, Segment
from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.typing import Def, Kind, Out, Port, Typing, Use

Leaves = Callable[[ir.Value, int], "list[Segment]"]


class Centring:
    """:meth:`centred` says which features lose their mean; ``refused`` which LayerNorms keep their basis, and why."""

    def __init__(self, t: Typing, leaves: Leaves) -> None:
        self._groups = DisjointSets()
        self._legal: set[object] = set()
        self.refused: list[tuple[Use, int, str]] = []
        if not t.centres:
            return
        self._t, self._leaves = t, leaves
        bad: dict[object, str] = {}
        self._join()
        self._collect_reasons(bad)
        for use in t.centres:
            axis = t.rank(use) - 1
            found = leaves(use.value, axis)
            roots = {self._groups.find((use, axis, leaf)) for leaf in found}
            why = next((bad[root] for root in roots if root in bad), None)
            if why is None and len(found) == 1:
                self._legal |= roots
            elif found:
                self.refused.append((use, axis, f"its stream cannot be centred: {why or 'it comes in pieces'}"))

    def centred(self, port: Port, axis: int, leaf: Segment) -> bool:
        return bool(self._legal) and self._groups.find((port, axis, leaf)) in self._legal

    def _join(self) -> None:
        t = self._t
        for tie in t.ties:
            if tie.kind is Kind.LINEAR:
                common = set(self._leaves(tie.a.value, tie.axis_a)) & set(self._leaves(tie.b.value, tie.axis_b))
                for leaf in common:
                    self._groups.union((tie.a, tie.axis_a, leaf), (tie.b, tie.axis_b, leaf))
        outputs = set(t.graph.outputs)
        # What keeps its basis where it is made enters every stream by an online rotation, or is read as it is: the mean
        # may be subtracted for one reader and not for another.
        kept = {(b.port.value, b.axis) for b in t.blocks if isinstance(b.port, Def) and b.segment is None}
        for value, axis in t.segments:
            if constant(value) is not None or (value, axis) in kept:
                continue
            ends: list[Port] = [Use(u.node, u.idx) for u in value.uses()]
            if value in outputs:
                ends.append(Out(value))
            for leaf in set(self._leaves(value, axis)):
                for end in ends:
                    self._groups.union((Def(value), axis, leaf), (end, axis, leaf))

    def _collect_reasons(self, bad: dict[object, str]) -> None:
        t = self._t

        def mark(port: Port, axis: int, why: str, inside: Segment | None = None) -> None:
            within = None if inside is None else set(inside.leaves())
            for leaf in set(self._leaves(port.value, axis)):
                if within is None or leaf in within:
                    bad.setdefault(self._groups.find((port, axis, leaf)), why)

        readers = {use.node for use in t.centres}
        for tie in t.ties:
            if tie.kind in (Kind.CONTRACT, Kind.SCALE, Kind.NORM):
                what = {Kind.CONTRACT: "a product", Kind.SCALE: "a scale", Kind.NORM: "an RMS norm"}[tie.kind]
                for port, axis in ((tie.a, tie.axis_a), (tie.b, tie.axis_b)):
                    where = port.node.name if isinstance(port, Use) else port.value.name
                    mark(port, axis, f"{what} at {where!r} reads it as it is")
        for block in t.blocks:
            port = block.port
            if isinstance(port, Use) and port.node not in readers and constant(port.value) is None:
                mark(port, block.axis, block.reason, block.segment)
        for value in t.graph.outputs:
            if t.shapes.known(value):
                for axis in range(len(t.shapes.shape[value])):
                    mark(Out(value), axis, f"{value.name!r} is an output of the graph")
        for state in t.states:
            mark(Def(state.past), state.axis, f"{state.past.name!r} is a cache")
        for value, axis in t.segments:
            if len(self._leaves(value, axis)) > 1:
                mark(Def(value), axis, f"{value.name!r} holds it in pieces")
