"""Arrays share memory only with arrays that are gone."""

from __future__ import annotations

import numpy as np

from onnx_quarot import buffers

SHAPE = (1 << 11, 1 << 10)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_nobody_has_it() -> None:
    with buffers.reused_memory():
        first = buffers.empty(SHAPE, np.float64)
        place = address(first)
        view = first.T[:4]
        del first
        other = buffers.empty(SHAPE, np.float32)  # the view still needs the first
        assert not np.shares_memory(view, other)
        del view
        again = buffers.empty(SHAPE, np.float64)
        assert address(again) == place
        assert not np.shares_memory(again, other)
        del other, again
        smaller, larger = buffers.empty(SHAPE, np.float32), buffers.empty(SHAPE, np.float64)
        assert not np.shares_memory(smaller, larger)
        assert address(larger) == place  # each takes what fits it best


def test_many_at_a_time_are_all_distinct() -> None:
    with buffers.reused_memory():
        arrays = [buffers.empty(SHAPE, np.float16) for _ in range(12)]
        for number, array in enumerate(arrays):
            array[...] = number
        assert [array[5, 7] for array in arrays] == list(range(12))
        larger = [buffers.empty(SHAPE, np.float64) for _ in range(7)]
        assert not any(np.shares_memory(a, b) for a in arrays for b in larger)


def test_outside_and_for_small_arrays_nothing_is_kept() -> None:
    assert buffers.empty((2, 3), np.float16).base is None
    with buffers.reused_memory():
        assert buffers.empty((2, 3), np.float16).base is None
    assert buffers.empty(SHAPE, np.float64).base is None
