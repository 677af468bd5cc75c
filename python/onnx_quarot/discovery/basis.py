"""The structure of an axis: which of its features may share a basis. Pure data, no graph.

Every axis of every tensor has a :class:`Segment`. Axes that an operator ties together share one segment (union-find);
an operator that cuts an axis (packed q|k|v, heads) gives its segment parts. A leaf is the largest run of features that
always travels together: its length is the size of the rotation that can live there. The same leaf may occur several
times in one axis (a tile: one leaf a head), and then all occurrences are rotated alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from onnx_quarot.errors import ModelError


class Segment:
    """A run of ``length`` features; a node of the union-find forest, with parts once it was cut."""

    __slots__ = ("_parent", "_parts", "length")
    length: int
    _parent: Segment | None
    _parts: list[Segment] | None

    def __init__(self, length: int, parts: Sequence[Segment] | None = None) -> None:
        if parts is not None and sum(p.length for p in parts) != length:
            raise AssertionError(f"parts of a segment of {length} sum to {sum(p.length for p in parts)}")
        self.length = length
        self._parent = None
        self._parts = list(parts) if parts is not None else None

    @classmethod
    def tiled(cls, tile: Segment, count: int) -> Segment:
        """``count`` occurrences of the same segment, side by side."""
        return tile if count == 1 else cls(tile.length * count, [tile] * count)

    def root(self) -> Segment:
        """The representative of everything this segment was unified with."""
        node = self
        while node._parent is not None:
            node = node._parent
        return node

    def leaves(self) -> list[Segment]:
        """The uncut parts from left to right, each by its representative."""
        root = self.root()
        if root._parts is None:
            return [root]
        found: list[Segment] = []
        pending = root._parts[::-1]
        while pending:
            part = pending.pop().root()
            if part._parts is None:
                found.append(part)
            else:
                pending += part._parts[::-1]
        root._parts = found  # else parts would nest as deep as there are cuts, one behind the other
        return list(found)

    def spans(self) -> Iterator[tuple[int, Segment]]:
        """Pairs (offset, leaf)."""
        offset = 0
        for leaf in self.leaves():
            yield offset, leaf
            offset += leaf.length

    def _bounds(self) -> set[int]:
        return set(accumulate(leaf.length for leaf in self.leaves()))

    def cut(self, position: int) -> None:
        """Make ``position`` a boundary between leaves. Cutting a tile cuts every occurrence of it."""
        root = self.root()
        if position <= 0 or position >= root.length:
            return
        if root._parts is None:
            root._parts = [Segment(position), Segment(root.length - position)]
            return
        for offset, leaf in root.spans():
            if offset < position < offset + leaf.length:
                leaf.cut(position - offset)
                return

    def piece(self, low: int, high: int) -> Segment:
        """The features ``low`` to ``high`` as a segment of their own that shares its leaves with this one."""
        self.cut(low)
        self.cut(high)
        inside = [leaf for offset, leaf in self.spans() if low <= offset and offset + leaf.length <= high]
        return inside[0] if len(inside) == 1 else Segment(high - low, inside)

    def unify(self, other: Segment) -> None:
        """From now on both are one: the same leaves, hence the same basis."""
        a, b = self.root(), other.root()
        if a is b:
            return
        if a.length != b.length:
            raise ModelError(f"model: shapes disagree: {a.length} features are used as {b.length}")
        if a._parts is None:
            a._parent = b
            return
        if b._parts is None:
            b._parent = a
            return
        # A cut inside a tile shows up at every occurrence, so the two may need several rounds to agree.
        while (bounds_a := a._bounds()) != (bounds_b := b._bounds()):
            for position in bounds_b - bounds_a:
                a.cut(position)
            for position in bounds_a - bounds_b:
                b.cut(position)
        for leaf_a, leaf_b in zip(a.leaves(), b.leaves(), strict=True):
            leaf_a.unify(leaf_b)
        if a.root() is not b.root():
            a.root()._parent = b.root()


class DisjointSets:
    """Union-find over hashable keys."""

    def __init__(self) -> None:
        self._parent: dict[object, object] = {}

    def find(self, key: object) -> object:
        parent = self._parent.setdefault(key, key)
        while parent != (up := self._parent[parent]):
            self._parent[key] = up
            key, parent = parent, up
        return parent

    def union(self, a: object, b: object) -> None:
        self._parent[self.find(a)] = self.find(b)
