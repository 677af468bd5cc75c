"""The segment forest on its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_quarot.discovery.basis import DisjointSets, Segment
from onnx_quarot.errors import ModelError


def test_unified_segments_share_leaves() -> None:
    a, b = Segment(8), Segment(8)
    a.unify(b)
    assert a.leaves() == b.leaves()
    a.cut(3)
    assert [leaf.length for leaf in b.leaves()] == [3, 5]


def test_a_tile_is_one_leaf_several_times() -> None:
    head = Segment(4)
    row = Segment.tiled(head, 3)
    assert row.leaves() == [head, head, head]
    row.cut(5)  # inside the second head: every head is cut
    assert [leaf.length for leaf in row.leaves()] == [1, 3, 1, 3, 1, 3]


def test_packed_axis_meets_its_pieces() -> None:
    packed, head = Segment(12), Segment(2)
    packed.piece(8, 12).unify(Segment.tiled(head, 2))
    assert [leaf.length for leaf in packed.leaves()] == [8, 2, 2]
    assert packed.leaves()[1] is packed.leaves()[2] is head.root()


def test_lengths_must_agree() -> None:
    with pytest.raises(ModelError, match="4 features are used as 5"):
        Segment(4).unify(Segment(5))
    with pytest.raises(AssertionError, match="sum to 5"):
        Segment(4, [Segment(2), Segment(3)])


@given(st.lists(st.tuples(st.integers(1, 23), st.integers(1, 23)), max_size=8))
def test_cuts_of_either_side_end_up_in_both(cuts: list[tuple[int, int]]) -> None:
    a, b = Segment(24), Segment(24)
    for x, y in cuts:
        a.cut(x)
        b.cut(y)
    a.unify(b)
    assert a.leaves() == b.leaves()
    assert sum(leaf.length for leaf in a.leaves()) == 24
    bounds = {offset for offset, _ in a.spans()}
    assert bounds == {0} | {p for pair in cuts for p in pair}


def test_disjoint_sets() -> None:
    sets = DisjointSets()
    sets.union("a", "b")
    sets.union("c", "d")
    assert sets.find("a") == sets.find("b") != sets.find("c")
    sets.union("b", "c")
    assert sets.find("a") == sets.find("d")
