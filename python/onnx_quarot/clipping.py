"""Ranges of weights by least squared error: clipping the few large values a little makes finer steps for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .scheme import TensorSpec

Array = npt.NDArray[Any]

_CHUNK = 2**18  # elements: a few temporaries of this size stay in a core's cache
_TINY = float(np.finfo(np.float32).tiny)
# How far ranges are narrowed: with more levels clipping costs more than it gains, so the search is shorter.
_NARROWEST = {4: 0.45, 8: 0.82, 16: 1.0}
_STEPS = {4: 16, 8: 7, 16: 1}


def fit_rows(rows: Array, spec: TensorSpec, importance: Array | None = None) -> tuple[Array, Array]:
    """Scale and zero point of each row: float32 [n] and int32 [n], of least squared error over candidates.

    rows: float32 [n, k], finite. A spec with the method mse searches; any other takes the full range. Symmetric types
    try the peak times a falling series of factors; others try both ends together, then each alone, and always keep
    zero inside. importance: weights of the k squared errors, [n, k] or [k] (a Hessian's diagonal). A row of zeros gets
    scale 1.
    """
    scales, zeros = np.empty(len(rows), np.float32), np.zeros(len(rows), np.int32)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        weight = importance if importance is None or importance.ndim == 1 else importance[part]
        block = np.ascontiguousarray(rows[part], np.float32)
        scales[part], zeros[part] = (_symmetric if spec.symmetric else _asymmetric)(block, spec, weight)
    return scales, zeros


def _symmetric(rows: Array, spec: TensorSpec, importance: Array | None) -> tuple[Array, Array]:
    first, last = spec.bounds
    middle = (first + last + 1) // 2 if first == 0 else 0
    half = last - middle if first == 0 else last
    peak = np.maximum(rows.max(axis=1, initial=0.0), -rows.min(axis=1, initial=0.0)).astype(np.float64)
    zeros = np.full(len(rows), middle, np.int32)
    best, least = _safe(peak / half), np.full(len(rows), np.inf)
    for factor in _factors(spec):
        scale = _safe(peak * factor / half)
        _keep_better(rows, scale, zeros, spec, importance, least, best, zeros)
    return best, zeros


def _asymmetric(rows: Array, spec: TensorSpec, importance: Array | None) -> tuple[Array, Array]:
    low = np.minimum(rows.min(axis=1, initial=0.0), 0.0).astype(np.float64)
    high = np.maximum(rows.max(axis=1, initial=0.0), 0.0).astype(np.float64)
    count = len(rows)
    scales, zeros, least = np.ones(count, np.float32), np.zeros(count, np.int32), np.full(count, np.inf)
    ends = [low.copy(), high.copy()]

    def attempt(a: Array, b: Array) -> None:
        scale, zero = _grid(a, b, spec)
        better = _keep_better(rows, scale, zero, spec, importance, least, scales, zeros)
        ends[0][better], ends[1][better] = a[better], b[better]

    for factor in _factors(spec):
        attempt(low * factor, high * factor)
    for side in (0, 1) if spec.method == "mse" else ():
        here = [end.copy() for end in ends]
        for factor in (0.7, 0.8, 0.9, 1.1, 1.2):
            moved = list(here)
            moved[side] = np.clip(here[side] * factor, low, high)
            attempt(*moved)
    return scales, zeros


def _factors(spec: TensorSpec) -> Array:
    if spec.method != "mse":
        return np.ones(1)
    return np.linspace(1.0, _NARROWEST[spec.bits], _STEPS[spec.bits])


def _grid(low: Array, high: Array, spec: TensorSpec) -> tuple[Array, Array]:
    first, last = spec.bounds
    scale = _safe((high - low) / (last - first))
    zero = np.clip(np.rint(first - low / scale), first, last).astype(np.int32)
    return scale, zero


def _safe(scale: Array) -> Array:
    return np.where(np.abs(scale) < _TINY, 1.0, scale).astype(np.float32)


def _keep_better(
    rows: Array,
    scale: Array,
    zero: Array,
    spec: TensorSpec,
    importance: Array | None,
    least: Array,
    scales: Array,
    zeros: Array,
) -> Array:
    """Put `scale` and `zero` in place where their error is less than `least`; which rows those are."""
    first, last = spec.bounds
    steps = rows / scale[:, None]
    np.rint(steps, out=steps)
    np.clip(steps, (first - zero)[:, None], (last - zero)[:, None], out=steps)
    steps *= scale[:, None]
    steps -= rows
    steps *= steps
    if importance is not None:
        steps *= importance
    error = steps.sum(axis=1, dtype=np.float64)
    better: Array = error < least
    least[better], scales[better], zeros[better] = error[better], scale[better], zero[better]
    return better
