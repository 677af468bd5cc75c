"""Range observers: each reduces a stream of activations to the range a quantizer will use, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import ConfigError, DataError
from .scheme import METHODS

Array = npt.NDArray[Any]

_CHUNK = 2**20
_BINS = 2**16


@dataclass(frozen=True)
class Range:
    """A closed interval of real values; always contains zero, so that zero is representable exactly.

    normalized: it is of rows divided by their lengths.
    """

    low: float
    high: float
    normalized: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0.0 <= self.high):
            raise DataError(f"range: [{self.low}, {self.high}] must be finite and contain zero")


class Sink(Protocol):
    """Reduces a stream of arrays to something smaller."""

    def update(self, values: Array) -> None:
        """Take in one array of finite values, features last."""


class Observer(Sink, Protocol):
    """Reduces a stream of arrays to a range in bounded memory."""

    def range(self) -> Range:
        """The range of everything seen."""

    @property
    def extremes(self) -> MinMax:
        """The exact extremes of everything seen."""


def rows_and_lengths(values: Array) -> Iterator[tuple[Array, Array]]:
    """The rows of the last axis, float32 [n, k], some at a time, and their Euclidean lengths, float64 [n]."""
    if values.size == 0:
        return
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1] if values.ndim else 1)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        yield part, np.sqrt(np.einsum("ij,ij->i", part, part, dtype=np.float64))


class MinMax:
    """The exact extremes."""

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0

    def update(self, values: Array) -> None:
        self.low = min(self.low, float(values.min(initial=0.0)))
        self.high = max(self.high, float(values.max(initial=0.0)))

    def range(self) -> Range:
        return Range(self.low, self.high)

    @property
    def extremes(self) -> MinMax:
        return self


class Percentile:
    """The range that holds `percentile` per cent of the values, an equal share cut off at either end.

    Values are counted in 65,536 fixed bins, one for each setting of the upper 16 bits of a float32 (sign,
    exponent, 7 bits of mantissa): 512 KiB whatever the amount of data, no re-binning, and the same result in
    any order of batches. Between neighbouring order statistics numpy's linear interpolation is used, so
    against `np.percentile` of the kept data a bound is off by less than the width of its bin: 1/128 of its
    magnitude. The exact extremes are kept as well and never exceeded; percentile 100 is therefore exact.
    """

    def __init__(self, percentile: float = 99.999) -> None:
        if not 50.0 < percentile <= 100.0:
            raise ConfigError(f"percentile: {percentile} is out of range; use more than 50 and at most 100")
        self.percentile = percentile
        self.counts = np.zeros(_BINS, np.int64)
        self.extremes = MinMax()

    def update(self, values: Array) -> None:
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        self.extremes.update(flat)
        for start in range(0, flat.size, _CHUNK):
            bits = flat[start : start + _CHUNK].view(np.uint32) >> np.uint32(16)
            self.counts += np.bincount(bits, minlength=_BINS)

    def range(self) -> Range:
        cut = (100.0 - self.percentile) / 200.0
        low, high = self._quantile(cut), self._quantile(1.0 - cut)
        return Range(min(max(low, self.extremes.low), 0.0), max(min(high, self.extremes.high), 0.0))

    def _quantile(self, q: float) -> float:
        # Bins in increasing order of value: negative ones count down in bit pattern.
        ordered = np.concatenate([self.counts[:0x7FFF:-1], self.counts[:0x8000]])
        total = int(ordered.sum())
        if total == 0:
            return 0.0
        before = np.cumsum(ordered)
        rank = q * (total - 1)
        below = math.floor(rank)
        first, second = (self._order_statistic(ordered, before, k) for k in (below, min(below + 1, total - 1)))
        return first + (rank - below) * (second - first)

    @staticmethod
    def _order_statistic(ordered: Array, before: Array, k: int) -> float:
        position = int(np.searchsorted(before, k, side="right"))
        negative = position < 0x8000
        pattern = 0xFFFF - position if negative else position - 0x8000
        near, far = (np.array([b], np.uint32).view(np.float32)[0] for b in (pattern << 16, (pattern << 16) | 0xFFFF))
        left, right = (float(far), float(near)) if negative else (float(near), float(far))
        inside = k - int(before[position] - ordered[position])
        return left + (right - left) * (inside + 0.5) / int(ordered[position])


class TokenMSE:
    """The range that loses least to rounding and clipping, counted token by token.

    A token is a row of the last axis. Its squared error is divided by its length before tokens are added up: a plain
    sum would be ruled by the few massive tokens of a language model (attention sinks, hundreds of times longer than
    the rest), a relative one would give them up, though later layers depend on their direction. Values are counted in
    the bins of Percentile, so a candidate range costs one pass over at most 65,536 bins; candidates are the extremes
    scaled together by 60 factors from 1 to 0.01, then each end alone.
    """

    def __init__(self, bits: int = 8, symmetric: bool = False) -> None:
        self.levels = 2**bits - (2 if symmetric else 1)
        self.symmetric = symmetric
        self.weights = np.zeros(_BINS)
        self.extremes = MinMax()

    def update(self, values: Array) -> None:
        for rows, length in rows_and_lengths(values):
            self.extremes.update(rows)
            self.count(rows, np.divide(1.0, length, out=np.zeros_like(length), where=length > 0))

    def count(self, rows: Array, weights: Array) -> None:
        """Count the values of rows, float32 [n, k], whose squared errors have these weights, [n]."""
        bins = rows.view(np.uint32) >> np.uint32(16)
        self.weights += np.bincount(bins.ravel(), np.repeat(weights, rows.shape[1]), minlength=_BINS)

    def range(self) -> Range:
        return self.best()[0]

    def best(self) -> tuple[Range, float]:
        """The range, and what it loses."""
        low, high = self.extremes.low, self.extremes.high
        if self.symmetric:
            high = max(-low, high)
            low = -high
        used = np.flatnonzero(self.weights)
        if low == high or not len(used):
            return Range(low, high), 0.0
        centres = ((used.astype(np.uint32) << 16) | np.uint32(0x8000)).view(np.float32).astype(np.float64)
        weights = self.weights[used]

        def loss(ends: tuple[float, float]) -> float:
            step = (ends[1] - ends[0]) / self.levels
            grid = np.clip(np.round(centres / step), round(ends[0] / step), round(ends[1] / step))
            return float(np.dot(weights, np.square(grid * step - centres)))

        best = min(((low * f, high * f) for f in np.geomspace(1.0, 0.01, 60)), key=loss)
        if not self.symmetric:
            for _ in (1, 2):
                factors = np.linspace(0.5, 1.3, 17)
                best = min([best, *((max(best[0] * f, low), best[1]) for f in factors)], key=loss)
                best = min([best, *((best[0], min(best[1] * f, high)) for f in factors)], key=loss)
        return Range(float(best[0]), float(best[1])), loss(best)


class Entropy:
    """The range after which the distribution of values has changed least, by Kullback-Leibler divergence.

    For thresholds from the 128th to the last of 2,048 equal bins of the magnitude, the clipped histogram is compared
    with what half of the integer levels leave of it (Migacz, 8-bit inference with TensorRT, GTC 2017). The range is
    cut at the best threshold, on either side. Values are counted in the bins of Percentile; a linear histogram is
    made of them, each bin's values spread evenly, only when the range is asked for. It weighs every value alike, so
    it gives up what is rare, massive activations among them: for language models mse is the better choice.
    """

    _LINEAR = 2048
    _FIRST = 128

    def __init__(self, bits: int = 8, symmetric: bool = False) -> None:
        self.levels = min(2 ** (bits - 1), self._FIRST)
        self.symmetric = symmetric
        self.counter = Percentile(100.0)

    @property
    def extremes(self) -> MinMax:
        return self.counter.extremes

    def update(self, values: Array) -> None:
        self.counter.update(values)

    def range(self) -> Range:
        low, high = self.extremes.low, self.extremes.high
        peak = max(-low, high)
        if peak == 0.0:
            return Range(low, high)
        histogram = self._histogram(peak)
        edges = np.arange(self._FIRST, self._LINEAR + 1, 16)
        losses = [_divergence(histogram, int(edge), self.levels) for edge in edges]
        cut = peak * float(edges[int(np.argmin(losses))]) / self._LINEAR
        return Range(max(low, -cut), min(high, cut))

    def _histogram(self, peak: float) -> Array:
        magnitudes = self.counter.counts[:0x8000] + self.counter.counts[0x8000:]
        # The lower edges of the bins of finite magnitudes, and the end of the last.
        edges = (np.arange(0x7F80 + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
        below = np.concatenate([[0.0], np.cumsum(magnitudes[:0x7F80])])
        used = int(np.searchsorted(edges, peak, side="right")) + 1
        at = np.interp(np.linspace(0.0, peak, self._LINEAR + 1), edges[:used], below[:used])
        at[-1] = below[-1]
        # Exact zeros are exact in every grid: they would only hide what happens to the others.
        histogram: Array = np.diff(at)
        histogram[0] = max(histogram[0] - float(magnitudes[0]), 0.0)
        return histogram


def _divergence(histogram: Array, edge: int, levels: int) -> float:
    """KL(clipped histogram || what `levels` equal groups of its first `edge` bins leave of it)."""
    kept = histogram[:edge]
    reference = kept.copy()
    reference[-1] += histogram[edge:].sum()
    group = np.arange(edge) * levels // edge
    occupied = kept > 0
    mass = np.bincount(group, kept, minlength=levels)
    count = np.bincount(group, occupied, minlength=levels)
    model = np.where(occupied, (mass / np.maximum(count, 1))[group], 0.0)
    total, rest = reference.sum(), model.sum()
    if total == 0.0 or rest == 0.0:
        return math.inf
    p, q = reference / total, model / rest
    both = p > 0
    # Mass that was clipped into an empty bin has no counterpart: count it as against a vanishing share.
    return float(np.sum(p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))))


def make_observer(method: str, *, percentile: float, bits: int, symmetric: bool) -> Observer:
    """The observer called `method`; ConfigError for an unknown one."""
    if method == "minmax":
        return MinMax()
    if method == "percentile":
        return Percentile(percentile)
    if method == "mse":
        return TokenMSE(bits, symmetric)
    if method == "entropy":
        return Entropy(bits, symmetric)
    raise ConfigError(f"method: {method!r} is not supported; use one of {', '.join(METHODS)}")
