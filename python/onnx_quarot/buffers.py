"""Large arrays that follow one another in the same memory.

An operating system clears every page it gives out, and large arrays go back to it as soon as they are dropped: for
weights that are computed and written one after the other this takes as long as computing them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_LARGE_BYTES = 1 << 22  # smaller arrays stay with the process anyway
_KEPT = 5


class _Pool:
    """Blocks of memory, each free as soon as nobody but this list refers to it: every array that uses it does."""

    def __init__(self) -> None:
        self._blocks: list[Array] = []

    def take(self, size: int) -> Array:
        fitting = [i for i in self._free() if self._blocks[i].size >= size]
        if fitting:
            return self._blocks[min(fitting, key=lambda i: self._blocks[i].size)]
        for index in reversed(self._free()):  # too small, all of them
            if len(self._blocks) >= _KEPT:
                del self._blocks[index]
        block = np.empty(size, np.uint8)
        if len(self._blocks) < _KEPT:
            self._blocks.append(block)
        return block

    def _free(self) -> list[int]:
        return [i for i in range(len(self._blocks)) if sys.getrefcount(self._blocks[i]) <= _UNUSED]


def _unused() -> int:
    only = [np.empty(1)]
    return sys.getrefcount(only[0])


_UNUSED = _unused()
_pool: _Pool | None = None


@contextmanager
def reused_memory() -> Iterator[None]:
    """Inside, arrays of :func:`empty` get the memory of earlier ones that are gone. Not for several threads at once."""
    global _pool
    before, _pool = _pool, _Pool()
    try:
        yield
    finally:
        _pool = before


def empty(shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
    """An array of this shape and type, its values whatever they are."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if _pool is None or size < _LARGE_BYTES:
        return np.empty(shape, dtype)
    return _pool.take(size)[:size].view(dtype).reshape(shape)
