"""Which axes are rotated: a minimum cut.

Every linear layer with a constant weight pays for being read in a rotated basis, an axis an operator blocks keeps its
own, and an activation may change basis on its way from producer to consumer for the price of one online transform
(n log n a row). The source side of the minimum cut is what is rotated; of all minimum cuts the one with the smallest
source side is taken, so that nothing is rotated that no linear layer gains from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2, prod

import networkx as nx
import onnx_ir as ir
from networkx.algorithms.flow import preflow_push

from onnx_quarot.discovery.basis import DisjointSets, Segment
from onnx_quarot.discovery.centre import Centring
from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.rules.readers import is_convolution, is_matmul
from onnx_quarot.discovery.typing import Def, Out, Port, Slot, Typing, Use

Variable = tuple[Port, int, Segment]
_REWARD = 1 << 70  # of a rotated linear layer or key cache: any number of online transforms in front of it is worth it
_COPY = 1 << 50  # of a weight that layers share: dearer than online transforms, cheaper than leaving a layer alone
_TOKEN = 1  # of keys that are not cached, of narrow layers: less than a transform costs, so only where it is free
_MIN_LEAF = 4  # a rotation of fewer features spreads nothing
_MIN_ONLINE = 16  # one of fewer spreads too little for a transform, which takes about as long as so small a layer


@dataclass(frozen=True)
class Worth:
    """Which layers are worth a transform: not those that stay in floating point."""

    convolutions: bool = True
    left: frozenset[str] = frozenset()

    def refusal(self, node: ir.Node) -> str | None:
        """Why a layer is not worth one; None for one that is."""
        if not self.convolutions and is_convolution(node):
            return "a convolution stays in floating point"
        return "it stays in floating point" if (node.name or node.outputs[0].name) in self.left else None


class Labels:
    """The decision: :meth:`rotated` for every port, axis and leaf; :meth:`why` for what was declined."""

    def __init__(self, typing: Typing, rotations: frozenset[str], worth: Worth) -> None:
        self.typing = typing
        self._worth = worth
        self._sets = DisjointSets()
        self._leaves: dict[tuple[ir.Value, int], list[Segment]] = {}
        self._reasons: dict[object, str] = {}
        self.kind_of: dict[Segment, str] = {}
        for segment, kind in typing.kinds:
            for leaf in segment.leaves():
                self.kind_of[leaf] = min(kind, self.kind_of.get(leaf, kind))
        self._enabled = rotations
        self._centring = Centring(typing, self.leaves)
        for use, axis, why in self._centring.refused:
            typing.block(use, axis, f"{use.node.op_type} {use.node.name!r}: {why}")
        self._collect()
        self._source_side = self._cut()

    # -- asking --------------------------------------------------------------------------------------------------------
    def leaves(self, value: ir.Value, axis: int) -> list[Segment]:
        """The leaves of an axis from left to right; empty where no rotation can live."""
        key = (value, axis)
        if key not in self._leaves:
            segment = self.typing.segments.get(key)
            self._leaves[key] = [] if segment is None else segment.leaves()
        return self._leaves[key]

    def spans(self, port: Port, axis: int) -> Iterator[tuple[int, Segment, bool]]:
        """(offset, leaf, rotated) along an axis of a port."""
        offset = 0
        for leaf in self.leaves(port.value, axis):
            yield offset, leaf, self.rotated(port, axis, leaf)
            offset += leaf.length

    def rotated(self, port: Port, axis: int, leaf: Segment) -> bool:
        return self._sets.find((port, axis, leaf)) in self._source_side

    def centred(self, port: Port, axis: int) -> bool:
        """Whether what is rotated along this axis also loses its mean."""
        return any(self._centring.centred(port, axis, leaf) for leaf in self.leaves(port.value, axis))

    def any_rotated(self, port: Port, axis: int) -> bool:
        return any(on for _, _, on in self.spans(port, axis))

    def kind(self, leaf: Segment) -> str:
        return self.kind_of.get(leaf, "R4")

    def why(self, port: Port, axis: int) -> str:
        """Why this axis was left alone."""
        if isinstance(port, Use) and (reason := self._worth.refusal(port.node)) is not None:
            return reason
        leaves = self.leaves(port.value, axis)
        for leaf in leaves:
            if (kind := self.kind(leaf)) not in self._enabled:
                return f"{kind} was not asked for"
        place = ""
        if axis % self.typing.rank(port) != self.typing.rank(port) - 1:
            place = "online rotations need the last axis"
        for leaf in leaves:
            if (reason := self._reasons.get(self._sets.find((port, axis, leaf)))) is not None:
                return f"{reason}; {place}" if place else reason
        if place:
            return place
        if (few := next((leaf.length for leaf in leaves if not _pays(leaf.length)), None)) is not None:
            return f"{few} features are too few for an online rotation"
        return "no online rotation is possible here"

    def boundaries(self) -> Iterator[tuple[ir.Value, int, Def, list[Use | Out]]]:
        """Every activation axis with its producer's and its consumers' ports."""
        outputs = set(self.typing.graph.outputs)
        for value, axis in list(self.typing.segments):
            if constant(value) is None:
                ends: list[Use | Out] = [Use(u.node, u.idx) for u in value.uses()]
                if value in outputs:
                    ends.append(Out(value))
                yield value, axis, Def(value), ends

    def torn(self) -> frozenset[Slot]:
        """Linear layers left alone whose input comes in pieces that cannot be rotated one by one, but could be all
        together, by one transform in front of the layer.
        """
        t, found = self.typing, []
        if "R4" not in self._enabled:
            return frozenset()
        for read in t.reads:
            slot, port = read.slot, read.port
            width = t.size(port, read.axis)
            if read.axis != t.rank(port) - 1 or not _pays(width) or not is_matmul(slot.node):
                continue
            pieces = set(self.leaves(port.value, read.axis))
            small = len(pieces) > 1 or not _pays(next(iter(pieces)).length)
            alone = len(Use(slot.node, slot.weight).value.uses()) == 1
            if small and alone and not self.any_rotated(port, read.axis):
                found.append(slot)
        return frozenset(found)

    # -- building ------------------------------------------------------------------------------------------------------
    def _of(self, port: Port, axis: int) -> dict[Segment, Variable]:
        axis %= self.typing.rank(port)
        return {leaf: (port, axis, leaf) for leaf in self.leaves(port.value, axis)}

    def _collect(self) -> None:
        """Hard ties become classes; blocks become reasons."""
        t = self.typing
        for tie in t.ties:
            left, right = self._of(tie.a, tie.axis_a), self._of(tie.b, tie.axis_b)
            for leaf in left.keys() & right.keys():
                self._sets.union(left[leaf], right[leaf])
        self._state = {s.past for s in t.states} | {s.present for s in t.states}
        for s in t.states:
            past, present = self._of(Def(s.past), s.axis), self._of(Out(s.present), s.axis)
            for leaf in past.keys() & present.keys():
                self._sets.union(past[leaf], present[leaf])
        self._soft: list[tuple[ir.Value, int, Segment, Def, list[Use | Out]]] = []
        for value, axis, source, ends in self.boundaries():
            distinct = set(self.leaves(value, axis))
            leaf = next(iter(distinct))
            if len(distinct) == 1 and self._may_be_online(value, axis, leaf):
                self._soft.append((value, axis, leaf, source, ends))
                continue
            for end in ends:
                for leaf in distinct:
                    self._sets.union((source, axis, leaf), (end, axis, leaf))
        for block in t.blocks:
            inside = None if block.segment is None else set(block.segment.leaves())
            for leaf, variable in self._of(block.port, block.axis).items():
                if inside is None or leaf in inside:
                    self._reasons.setdefault(self._sets.find(variable), block.reason)
        for value in t.graph.inputs:
            if value not in self._state:
                self._block_all(Def(value), f"{value.name!r} is an input of the graph")
        for value in t.graph.outputs:
            if value not in self._state:
                self._block_all(Out(value), f"{value.name!r} is an output of the graph")
        for value, axis in t.segments:
            for leaf in set(self.leaves(value, axis)):
                reason = self._unavailable(leaf)
                if reason is not None:
                    for port in (Def(value), *(Use(u.node, u.idx) for u in value.uses())):
                        self._reasons.setdefault(self._sets.find((port, axis, leaf)), reason)

    def _may_be_online(self, value: ir.Value, axis: int, leaf: Segment) -> bool:
        """The transform works on the last axis; a cache is never rotated on its way in or out."""
        if value in self._state or axis != len(self.typing.shapes.shape[value]) - 1:
            return False
        return self.kind(leaf) in self._enabled

    def _cost(self, value: ir.Value, leaf: Segment) -> int:
        """Of a transform, in additions, for one row of every axis whose length is not fixed: a head of many is one row
        of as many, and a cache of keys and values is two.
        """
        shapes = self.typing.shapes
        fixed = (size for size, same in zip(shapes.shape[value], shapes.static[value], strict=True) if same)
        return max(1, int(prod(fixed) * log2(leaf.length)))

    def _unavailable(self, leaf: Segment) -> str | None:
        if leaf.length < _MIN_LEAF:
            return f"only {leaf.length} features travel together"
        if leaf.length % _MIN_LEAF:
            return f"{leaf.length} features have no Hadamard matrix, nor have blocks of {_MIN_LEAF} or more of them"
        kind = self.kind(leaf)
        if kind not in self._enabled and kind != "R4":
            return f"{kind} was not asked for"
        return None

    def _block_all(self, port: Port, reason: str) -> None:
        if self.typing.known(port):
            for axis in range(self.typing.rank(port)):
                for variable in self._of(port, axis).values():
                    self._reasons.setdefault(self._sets.find(variable), reason)

    def _keys(self) -> dict[object, int]:
        """What rotating keys is worth (R3), where it was asked for: much for those that are cached."""
        rewards: dict[object, int] = {}
        if "R3" not in self._enabled:
            return rewards
        for _, axis, source, _ in self.boundaries():
            for variable in self._of(source, axis).values():
                if self.kind(variable[2]) == "R3":
                    rewards.setdefault(self._sets.find(variable), _TOKEN)
        for state in self.typing.states:
            for variable in self._of(Def(state.past), state.axis).values():
                if self.kind(variable[2]) == "R3":
                    rewards[self._sets.find(variable)] = _REWARD
        return rewards

    def _shared(self) -> dict[ir.Value, list[Use]]:
        """Weights of several linear layers: they stay one matrix if all of them read it in the same basis."""
        uses: dict[ir.Value, list[Use]] = {}
        for read in self.typing.reads:
            use = Use(read.slot.node, read.slot.weight)
            uses.setdefault(use.value, []).append(use)
        return {value: found for value, found in uses.items() if len(found) > 1}

    def _cut(self) -> set[object]:
        graph = nx.DiGraph()
        numbers: dict[object, int] = {}

        def node(key: object) -> int:
            return numbers.setdefault(key, len(numbers))

        def add(a: int | str, b: int | str, capacity: float | None) -> None:
            if capacity is None:
                graph.add_edge(a, b)  # no capacity means infinite
            elif graph.has_edge(a, b):
                if "capacity" in graph[a][b]:
                    graph[a][b]["capacity"] += capacity
            else:
                graph.add_edge(a, b, capacity=capacity)

        graph.add_nodes_from(("source", "sink"))
        for root in self._reasons:
            add(node(self._sets.find(root)), "sink", None)
        for read in self.typing.reads:
            if self._worth.refusal(read.slot.node) is not None:
                continue
            for leaf, variable in self._of(read.port, read.axis).items():
                add("source", node(self._sets.find(variable)), _REWARD if _pays(leaf.length) else _TOKEN)
        for slot in self.typing.apart:
            for variable in self._of(Use(slot.node, slot.weight), slot.axis).values():
                add("source", node(self._sets.find(variable)), _REWARD)
        for root, reward in self._keys().items():
            add("source", node(root), reward)
        for value, axis, leaf, source, ends in self._soft:
            cost = self._cost(value, leaf)
            producer = node(self._sets.find((source, axis, leaf)))
            consumers = [node(self._sets.find((end, axis, leaf))) for end in ends]
            if len(consumers) == 1:
                add(producer, consumers[0], cost)
                add(consumers[0], producer, cost)
            elif consumers:
                # All consumers share one transform: it is paid once if any of them differs from the producer.
                some, every = node(("some", value, axis)), node(("every", value, axis))
                for consumer in consumers:
                    add(consumer, some, None)
                    add(every, consumer, None)
                add(some, producer, cost)
                add(producer, every, cost)
        for value, uses in self._shared().items():
            for axis in range(self.typing.rank(uses[0])):
                for leaf in set(self.leaves(value, axis)):
                    one = node(("one matrix", value, axis, leaf))
                    for use in uses:
                        number = node(self._sets.find((use, axis, leaf)))
                        add(number, one, _COPY)
                        add(one, number, _COPY)
        residual = preflow_push(graph, "source", "sink")
        residual.remove_edges_from([(a, b) for a, b, d in residual.edges(data=True) if d["flow"] >= d["capacity"]])
        reached = set(nx.single_source_shortest_path_length(residual, "source"))
        return {key for key, number in numbers.items() if number in reached}


def _pays(features: int) -> bool:
    """Whether a transform of so many features is worth having: neither few, nor in very small blocks."""
    return features >= _MIN_ONLINE and features % _MIN_LEAF == 0
