"""Products of large matrices on all cores, and the same to the last bit on any number of them.

A BLAS splits a product among its threads, and where it splits decides how sums are rounded. Here the pieces have one
size everywhere, and each is multiplied in one thread.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Array = npt.NDArray[Any]
P = ParamSpec("P")
R = TypeVar("R")

_COLUMNS = 256


def reproducible(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with numpy's BLAS in one thread, in the whole process; :func:`product` uses more."""

    @functools.wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        with threadpool_limits(1, user_api="blas"):
            return function(*args, **kwargs)

    return limited


def product(a: Array, b: Array) -> Array:
    """``a @ b`` of matrices [m, k] and [k, n]."""
    result = np.empty((a.shape[0], b.shape[1]), np.result_type(a, b))

    def piece(start: int) -> None:
        columns = slice(start, start + _COLUMNS)
        np.matmul(a, b[:, columns], out=result[:, columns])

    _each(piece, range(0, b.shape[1], _COLUMNS))
    return result


def gram(x: Array) -> Array:
    """``x.T @ x``, of which each half is computed once."""
    size = x.shape[1]
    result = np.empty((size, size), x.dtype)

    def piece(start: int) -> None:
        columns, below = slice(start, start + _COLUMNS), slice(start, None)
        np.matmul(x[:, below].T, x[:, columns], out=result[below, columns])
        rest = slice(start + _COLUMNS, None)
        result[columns, rest] = result[rest, columns].T

    _each(piece, range(0, size, _COLUMNS))
    return result


def _each(piece: Callable[[int], None], starts: range) -> None:
    workers = min(_cores(), len(starts))
    if workers < 2:
        for start in starts:
            piece(start)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(piece, starts))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
