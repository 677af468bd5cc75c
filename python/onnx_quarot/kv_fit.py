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
    """What is taken from every key or value, [heads * size], and scales, the same length or [1]; float32."""

    offset: Array
    scale: Array


@dataclass(frozen=True)
class Scores:
    """How one attention compares: [heads] queries share [kv_heads] keys; the factor, cap and window of its scores."""

    heads: int
    kv_heads: int
    factor: float | None = None
    softcap: float = 0.0
    window: int = -1


def row_weights(query: Array, key: Array, value: Array, scores: Scores) -> tuple[Array, Array]:
    """How much errors of each key and of each value matter to the output, [tokens, kv_heads] each.

    query: [tokens, heads * size]; key and value: [tokens (with the past's), kv_heads, size]. An error e of a value
    moves the output by p e, where p is its attention; one of a score by about p |value - output| e.
    """
    total, kv_heads, size = key.shape
    queries = query.reshape(len(query), scores.heads, size)[::_QUERY_STEP]
    positions = np.arange(total - len(query), total)[::_QUERY_STEP, None]
    behind = positions - np.arange(total)[None, :]
    hidden = (behind < 0) | (behind >= scores.window if scores.window >= 0 else False)
    of_keys, of_values = np.zeros((total, kv_heads)), np.zeros((total, kv_heads))
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
        of_keys[:, head // group] += (p * np.maximum(distance, 0)).sum(axis=0)
    return of_keys, of_values


class WeightedSample:
    """Rows of keys or values with their weights: at most 1,024, drawn by priority (Duffield et al.,
    arXiv:cs/0509026), so that weighted sums over them estimate those over all.
    """

    def __init__(self, heads: int, size: int) -> None:
        width = heads * size
        self.heads, self.size = heads, size
        self._rows, self._weights, self._chance = np.zeros((0, width), np.float32), np.zeros((0, heads)), np.zeros(0)
        self._threshold = 0.0  # the largest chance that was not enough
        self._unit: Array | None = None
        self._low, self._high = np.full(width, np.inf), np.full(width, -np.inf)
        self._rng = np.random.default_rng(0)

    def update(self, rows: Array, weights: Array) -> None:
        """rows: [tokens, heads * size]; weights: [tokens, heads]."""
        self._low, self._high = np.minimum(self._low, rows.min(axis=0)), np.maximum(self._high, rows.max(axis=0))
        weights = weights + _EVEN_SHARE * weights.mean(axis=0) + np.finfo(np.float32).tiny
        if self._unit is None:
            self._unit = weights.sum(axis=0)
        weights = weights / self._unit
        self._rows = np.concatenate([self._rows, rows])
        self._weights = np.concatenate([self._weights, weights])
        self._chance = np.concatenate([self._chance, weights.sum(axis=1) / self._rng.uniform(size=len(rows))])
        if len(self._rows) > _KEPT_ROWS:
            order = np.argsort(-self._chance)
            kept = order[:_KEPT_ROWS]
            self._threshold = max(self._threshold, float(self._chance[order[_KEPT_ROWS]]))
            self._rows, self._weights, self._chance = self._rows[kept], self._weights[kept], self._chance[kept]

    def fit(self, bits: int, *, per_channel: bool, centred: bool) -> CacheFit:
        """Offset and scale of least weighted squared error. centred: False for an offset of zero."""
        lowest, highest = -(1 << bits - 1), (1 << bits - 1) - 1
        importance = self._weights.sum(axis=1)
        # A row that stayed although its weight is small stands for those that went.
        weights = self._weights * (np.maximum(importance, self._threshold) / importance)[:, None]
        weights /= weights.sum(axis=0)
        weights = np.repeat(weights, self.size, axis=1)
        x = self._rows.astype(np.float64)
        middle = (self._low + self._high) / 2
        centres = [middle + t * ((x * weights).sum(axis=0) - middle) for t in _CENTRES] if centred else [0 * middle]
        best, offset, scale = np.full(x.shape[1], np.inf), centres[0], np.ones(x.shape[1])
        for centre in centres:
            half = np.maximum(self._high - centre, centre - self._low)
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
        return CacheFit(offset.astype(np.float32), (scale if per_channel else scale[:1]).astype(np.float32))
