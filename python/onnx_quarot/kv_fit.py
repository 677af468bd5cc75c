"""Four bits for keys and values: offsets and scales that spend them where attention looks.

A softmax does not change when one vector is taken from all keys, and weights that sum to one carry a vector taken from
all values to the output: so both can be centred, exactly, and a symmetric integer type covers an asymmetric range. How
much the error of a token's key or value matters is what attention makes of it. One token, mostly the first, gets most
of it (the attention sink) and must be kept well, although there are hundreds of others that outnumber it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_KEPT_ROWS = 1024
_QUERY_STEP = 4  # one query of so many is looked at
_EVEN_SHARE = 0.02  # of the weight, spread evenly: what calibration never attended to may matter later
_CENTRES = (0.0, 0.25, 0.5, 0.75, 1.0)  # from the middle of the range to the weighted mean
_FRACTIONS = np.linspace(0.2, 1.1, 28)  # of the whole range that are covered


@dataclass(frozen=True)
class CacheFit:
    """What is taken from every key or value, [heads * size], and scales, the same length or [1]; float32.

    basis: what keys or values are multiplied by first, float64 [heads, size, size].
    """

    offset: Array
    scale: Array
    basis: Array | None = None


@dataclass(frozen=True)
class Scores:
    """How one attention compares: [heads] queries share [kv_heads] keys; the factor, cap and window of its scores."""

    heads: int
    kv_heads: int
    factor: float | None = None
    softcap: float = 0.0
    window: int = -1


def row_weights(query: Array, key: Array, value: Array, scores: Scores) -> tuple[Array, Array, Array]:
    """How much errors of each key and of each value matter to the output, [tokens, kv_heads] each, and the second
    moments of the queries, which weigh as much as what they find, [kv_heads, size, size].

    query: [tokens, heads * size]; key and value: [tokens (with the past's), kv_heads, size]. An error e of a value
    moves the output by p e, where p is its attention; one of a score by about p |value - output| e. Queries in front of
    the first key, which a cache of a window has dropped, say nothing about those that are left.
    """
    total, kv_heads, size = key.shape
    first = max(0, len(query) - total)
    queries = query.reshape(len(query), scores.heads, size)[first::_QUERY_STEP]
    positions = np.arange(total - len(query) + first, total)[::_QUERY_STEP, None]
    behind = positions - np.arange(total)[None, :]
    hidden = (behind < 0) | (behind >= scores.window if scores.window >= 0 else False)
    of_keys, of_values = np.zeros((total, kv_heads)), np.zeros((total, kv_heads))
    moments = np.zeros((kv_heads, size, size))
    group = scores.heads // kv_heads
    factor = size**-0.5 if scores.factor is None else scores.factor
    for head in range(scores.heads):
        k, v = key[:, head // group], value[:, head // group]
        s = factor * (queries[:, head] @ k.T)
        if scores.softcap:
            s = scores.softcap * np.tanh(s / scores.softcap)
        s[hidden] = -np.inf
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        out = p @ v
        distance = (v**2).sum(axis=1) - 2 * out @ v.T + (out**2).sum(axis=1, keepdims=True)
        p **= 2
        of_values[:, head // group] += p.sum(axis=0)
        p *= np.maximum(distance, 0)
        of_keys[:, head // group] += p.sum(axis=0)
        moments[head // group] += (queries[:, head] * p.sum(axis=1)[:, None]).T @ queries[:, head]
    return of_keys, of_values, moments


class WeightedSample:
    """Rows of keys or values with their weights: at most 1,024 a head, drawn by priority (Duffield et al.,
    arXiv:cs/0509026), so that weighted sums over them estimate those over all; and the moments of all.
    """

    def __init__(self, heads: int, size: int) -> None:
        self.heads, self.size = heads, size
        self._rows, self._weights = np.zeros((heads, 0, size), np.float32), np.zeros((heads, 0))
        self._chance, self._threshold = np.zeros((heads, 0)), np.zeros(heads)  # the largest that was not enough
        self._total, self._sum, self._squares = np.zeros(heads), np.zeros((heads, size)), np.zeros((heads, size, size))
        self._low, self._high = np.full(heads * size, np.inf), np.full(heads * size, -np.inf)
        self._rng = np.random.default_rng(0)

    def update(self, rows: Array, weights: Array) -> None:
        """rows: [tokens, heads * size]; weights: [tokens, heads]."""
        self._low, self._high = np.minimum(self._low, rows.min(axis=0)), np.maximum(self._high, rows.max(axis=0))
        weights = (weights + _EVEN_SHARE * weights.mean(axis=0) + np.finfo(np.float32).tiny).T
        rows = rows.reshape(len(rows), self.heads, self.size).transpose(1, 0, 2)
        weighted = weights[:, :, None] * rows
        self._total += weights.sum(axis=1)
        self._sum += weighted.sum(axis=1)
        self._squares += weighted.transpose(0, 2, 1) @ rows
        self._rows = np.concatenate([self._rows, rows], axis=1)
        self._weights = np.concatenate([self._weights, weights], axis=1)
        self._chance = np.concatenate([self._chance, weights / self._rng.uniform(size=weights.shape)], axis=1)
        if self._rows.shape[1] > _KEPT_ROWS:
            order = np.argsort(-self._chance, axis=1)[:, : _KEPT_ROWS + 1]
            first_out = np.take_along_axis(self._chance, order[:, -1:], axis=1)[:, 0]
            self._threshold = np.maximum(self._threshold, first_out)
            kept = order[:, :-1]
            self._rows = np.take_along_axis(self._rows, kept[:, :, None], axis=1)
            self._weights = np.take_along_axis(self._weights, kept, axis=1)
            self._chance = np.take_along_axis(self._chance, kept, axis=1)

    def _shares(self) -> Array:
        """What each kept row weighs in its head, of 1: [rows, heads]."""
        # A row that stayed although its weight is small stands for those that went.
        weights = np.maximum(self._weights, self._threshold[:, None])
        shares: Array = (weights / weights.sum(axis=1, keepdims=True)).T
        return shares

    def covariance(self) -> Array:
        """Of all rows as they weigh, float64 [heads, size, size]."""
        mean = self._sum / self._total[:, None]
        covariance: Array = self._squares / self._total[:, None, None] - mean[:, :, None] * mean[:, None, :]
        return covariance

    def fit(self, bits: int, *, per_channel: bool, centred: bool, basis: Array | None = None) -> CacheFit:
        """Offset and scale of least weighted squared error of the rows, or of the rows times `basis`
        [heads, size, size]. centred: False for an offset of zero.
        """
        lowest, highest = -(1 << bits - 1), (1 << bits - 1) - 1
        weights = np.repeat(self._shares(), self.size, axis=1)
        rows, low, high = self._rows.astype(np.float64), self._low, self._high
        if basis is not None:
            rows = rows @ basis
            low, high = rows.min(axis=1).ravel(), rows.max(axis=1).ravel()
        x = rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)
        middle = (low + high) / 2
        centres = [middle + t * ((x * weights).sum(axis=0) - middle) for t in _CENTRES] if centred else [0 * middle]
        best, offset, scale = np.full(x.shape[1], np.inf), centres[0], np.ones(x.shape[1])
        for centre in centres:
            half = np.maximum(high - centre, centre - low)
            half = np.maximum(half if per_channel else half.max(), np.finfo(np.float32).tiny * 2**8)
            for fraction in _FRACTIONS:
                step = np.broadcast_to(fraction * half * 2 / (highest - lowest), best.shape)
                # The integers are not even around zero, an offset makes up for it.
                origin = centre - (lowest + highest) / 2 * step if centred else centre
                rounded = np.clip(np.round((x - origin) / step), lowest, highest) * step + origin
                error = (weights * (rounded - x) ** 2).sum(axis=0)
                better = error < best if per_channel else np.full(best.shape, error.sum() < best.sum())
                best, offset, scale = (
                    np.where(better, new, old) for new, old in ((error, best), (origin, offset), (step, scale))
                )
        return CacheFit(offset.astype(np.float32), (scale if per_channel else scale[:1]).astype(np.float32), basis)
