"""What one walk over the graph collects: which axes share a basis, and which cannot be rotated.

A *port* is one end of a tensor: where a node produced it (:class:`Def`), where a node uses it (:class:`Use`) or where
it leaves the graph (:class:`Out`). Structure (segments) belongs to the tensor and is shared by its ports; whether a
segment is rotated is decided for every port, so that an online rotation can stand between producer and consumer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import onnx_ir as ir

from onnx_quarot.discovery.basis import Segment
from onnx_quarot.discovery.constants import Constant, constant
from onnx_quarot.discovery.shapes import Shapes
from onnx_quarot.errors import ModelError


@dataclass(frozen=True)
class Def:
    """A tensor as its node (or the graph's input) produced it."""

    value: ir.Value


@dataclass(frozen=True)
class Use:
    """A tensor as input ``index`` of ``node``."""

    node: ir.Node
    index: int

    @property
    def value(self) -> ir.Value:
        value = self.node.inputs[self.index] if self.index < len(self.node.inputs) else None
        if value is None:
            raise ModelError(f"model: {self.node.op_type} {self.node.name!r} lacks its input {self.index}")
        return value


@dataclass(frozen=True)
class Out:
    """A tensor as an output of the graph."""

    value: ir.Value


Port = Def | Use | Out


class Kind(Enum):
    """What ties two axes."""

    LINEAR = "linear"  # y = x, or a sum: also keeps a zero mean zero
    CONTRACT = "contract"  # both are summed over, one against the other
    NORM = "norm"  # an RMS normalisation
    SCALE = "scale"  # a constant factor a feature, folded into the readers
    SHARED = "shared"  # one constant is read by both: the same basis, though the streams are others
    CENTRE = "centre"  # the mean is subtracted on the way; the same as LINEAR where it is zero already


@dataclass(frozen=True)
class Tie:
    a: Port
    axis_a: int
    b: Port
    axis_b: int
    kind: Kind


@dataclass(frozen=True)
class Block:
    """These features keep their basis. ``segment`` None means the whole axis."""

    port: Port
    axis: int
    reason: str
    segment: Segment | None = None


@dataclass(frozen=True)
class Slot:
    """Input ``input`` of ``node`` meets the constant matrix at input ``weight``, summed over its axis ``axis``."""

    node: ir.Node
    input: int
    weight: int
    axis: int


@dataclass(frozen=True)
class Read:
    """A linear layer that would gain from a rotated input: axis ``axis`` of ``slot``'s input."""

    slot: Slot
    axis: int

    @property
    def port(self) -> Use:
        return Use(self.slot.node, self.slot.input)


@dataclass(frozen=True)
class Scale:
    """A factor a feature (a constant) and a bias added behind it, which the ``readers`` of ``out`` take over.

    ``data`` is the other operand of a plain Mul, which is then left out (as is the bias' Add); None for the scale of a
    norm.
    """

    factor: Use
    out: Def
    readers: tuple[Slot, ...]
    bias: Use | None
    data: Use | None


@dataclass(frozen=True)
class Written:
    """A factor a feature behind a linear layer ``node``, which takes it over: into ``constants`` (use, axis), its
    weight and biases. ``data`` is the other operand of the Mul, which is then left out.
    """

    factor: Use
    out: Def
    data: Use
    node: ir.Node
    constants: tuple[tuple[Use, int], ...]


@dataclass(frozen=True)
class Expansion:
    """A constant that is broadcast over a feature axis: written out in full when that axis is rotated."""

    port: Use
    out: Def
    axis: int


@dataclass(frozen=True)
class StatePair:
    """A recurrent input and output (KV cache) that may both change basis: only this model reads what it wrote."""

    past: ir.Value
    present: ir.Value
    axis: int


@dataclass
class Typing:
    """The facts the rules state about one graph."""

    graph: ir.Graph
    shapes: Shapes
    segments: dict[tuple[ir.Value, int], Segment] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    expansions: list[Expansion] = field(default_factory=list)
    states: list[StatePair] = field(default_factory=list)
    renewed: set[ir.Value] = field(default_factory=set)  # caches that come out again, whatever their basis
    begun: ir.Value | None = None  # keys or values that another model writes, which may begin the caches too
    kinds: list[tuple[Segment, str]] = field(default_factory=list)
    packed: set[ir.Value] = field(default_factory=set)  # the last axis has a basis for every index of another
    squares: set[ir.Value] = field(default_factory=set)  # only their sum over the last axis is used
    centres: list[Use] = field(default_factory=list)  # where the mean over the last axis is subtracted
    converted: list[ir.Node] = field(default_factory=list)  # LayerNorms that become RMS norms where rotated
    folded_biases: set[ir.Node] = field(default_factory=set)  # Adds of a bias that a Scale folds
    unknown: list[Slot] = field(default_factory=list)  # linear layers of unknown shape
    _whole: dict[ir.Value, tuple[Use, int]] = field(default_factory=dict)
    apart: frozenset[Slot] = frozenset()  # linear layers to be read in a basis of their own, made in front of them

    # -- looking -----------------------------------------------------------------------------------------------------
    def rank(self, port: Port) -> int:
        return len(self.shapes.shape[port.value])

    def size(self, port: Port, axis: int) -> int:
        return self.shapes.shape[port.value][axis]

    def known(self, port: Port) -> bool:
        return self.shapes.known(port.value)

    def constant(self, port: Port) -> Constant | None:
        return constant(port.value)

    def segment(self, port: Port, axis: int) -> Segment | None:
        """The segment of an axis; None where no rotation can live (unknown, dynamic, length 1, not a float)."""
        value = port.value
        if not self.shapes.known(value) or not self.shapes.is_float(value) or value in self.squares:
            return None
        shape = self.shapes.shape[value]
        axis %= len(shape)
        if shape[axis] < 2 or not self.shapes.static[value][axis]:
            return None
        return self.segments.setdefault((value, axis), Segment(shape[axis]))

    # -- stating -----------------------------------------------------------------------------------------------------
    def tie(self, a: Port, axis_a: int, b: Port, axis_b: int, kind: Kind = Kind.LINEAR) -> None:
        """Both axes are one and the same, feature by feature."""
        x, y = self._pair(a, axis_a, b, axis_b)
        if x is not None and y is not None:
            x.unify(y)
            self._record(a, axis_a, b, axis_b, kind)

    def tie_tiled(self, a: Port, axis_a: int, b: Port, axis_b: int) -> None:
        """The longer axis is the shorter one, several times."""
        x, y = self._pair(a, axis_a, b, axis_b)
        if x is not None and y is not None:
            big, small = (x, y) if x.length >= y.length else (y, x)
            big.unify(Segment.tiled(small, big.length // small.length))
            self._record(a, axis_a, b, axis_b, Kind.LINEAR)

    def tie_piece(self, whole: Port, axis_whole: int, low: int, high: int, part: Port, axis_part: int) -> None:
        """Features ``low`` to ``high`` of one axis are the other axis."""
        x, y = self._pair(whole, axis_whole, part, axis_part)
        if x is not None and y is not None:
            x.piece(low, high).unify(y)
            self._record(whole, axis_whole, part, axis_part, Kind.LINEAR)

    def tie_leaves(self, a: Port, axis_a: int, b: Port, axis_b: int) -> None:
        """Wherever the two axes have a leaf in common, it has one basis (segments were unified before)."""
        self._record(a, axis_a, b, axis_b, Kind.LINEAR)

    def block(self, port: Port, axis: int, reason: str, segment: Segment | None = None) -> None:
        if self.known(port) and self.segment(port, axis) is not None:
            self.blocks.append(Block(port, axis % self.rank(port), reason, segment))

    def block_port(self, port: Port, reason: str, except_axes: Sequence[int] = ()) -> None:
        if self.known(port):
            keep = {a % self.rank(port) for a in except_axes}
            for axis in range(self.rank(port)):
                if axis not in keep:
                    self.block(port, axis, reason)

    def block_node(self, node: ir.Node, reason: str) -> None:
        for port in ports(node):
            self.block_port(port, reason)

    def contract(self, a: Use, axis_a: int, b: Use, axis_b: int, slot: Slot | None) -> None:
        """Both axes are summed over, one against the other; ``slot`` names the linear layer, if it is one."""
        if slot is not None and slot in self.apart:
            self.block(a, axis_a, "rotated in front of the layer, all features together")
            first, axis = self._whole.setdefault(a.value, (b, axis_b))  # layers share a transform
            self.tie(b, axis_b, first, axis, Kind.SHARED)
        else:
            self.tie(a, axis_a, b, axis_b, Kind.CONTRACT)

    def read(self, slot: Slot, axis: int) -> None:
        port = Use(slot.node, slot.input)
        if self.known(port) and self.size(port, axis) == 1:
            return  # a table of frequencies times positions, not a layer
        if self.segment(port, axis) is not None:
            self.reads.append(Read(slot, axis % self.rank(port)))
        else:
            self.unknown.append(slot)

    def mark(self, segment: Segment, kind: str) -> None:
        """Give the rotation that may live here its name in the literature: R1 (stream), R2 (values), R3 (queries,
        keys).
        """
        self.kinds.append((segment, kind))

    def _pair(self, a: Port, axis_a: int, b: Port, axis_b: int) -> tuple[Segment | None, Segment | None]:
        x = self.segment(a, axis_a) if self.known(a) else None
        y = self.segment(b, axis_b) if self.known(b) else None
        for port, axis, mine, other in ((a, axis_a, x, y), (b, axis_b, y, x)):
            if mine is not None and other is None:
                self.block(port, axis, "tied to an axis that has no basis")
        return x, y

    def _record(self, a: Port, axis_a: int, b: Port, axis_b: int, kind: Kind) -> None:
        self.ties.append(Tie(a, axis_a % self.rank(a), b, axis_b % self.rank(b), kind))


def uses(node: ir.Node) -> list[Use]:
    return [Use(node, i) for i, v in enumerate(node.inputs) if v is not None]


def defs(node: ir.Node) -> list[Def]:
    return [Def(v) for v in node.outputs if v.name]


def ports(node: ir.Node) -> list[Port]:
    """Everything a node touches."""
    return [*uses(node), *defs(node)]


def has_input(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def has_output(node: ir.Node, index: int) -> bool:
    """Whether an optional output is wanted: named and read by somebody."""
    return index < len(node.outputs) and bool(node.outputs[index].name)
