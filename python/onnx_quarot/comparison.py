"""Distances between two models' outputs, summed batch by batch: nothing but the sums is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_quarot.data import Batch
from onnx_quarot.errors import DataError

Array = npt.NDArray[Any]

# Rows of logits turned into exponentials at a time: a vocabulary is long, a window of it is 100 MB.
_ROWS = 64


class Comparison:
    """Sums over all batches for one candidate beside its reference."""

    def __init__(self) -> None:
        self.predictions = 0
        self.divergence = 0.0
        self.agreeing = 0
        self.cosines: dict[str, tuple[float, int]] = {}
        self.squares: dict[str, tuple[float, float]] = {}

    def add_outputs(self, name: str, reference: Array, candidate: Array) -> None:
        if reference.shape != candidate.shape:
            raise DataError(f"output {name}: shape {candidate.shape} of the candidate, {reference.shape} expected")
        a = np.atleast_1d(reference).astype(np.float64)
        b = np.atleast_1d(candidate).astype(np.float64)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        # a zero vector has no direction: it agrees with itself and with nothing else
        same = np.all(a == b, axis=-1)
        cosines = np.where(same, 1.0, np.sum(a * b, axis=-1) / np.where(lengths == 0, np.inf, lengths))
        total, count = self.cosines.get(name, (0.0, 0))
        self.cosines[name] = (total + float(cosines.sum()), count + cosines.size)
        error, scale = self.squares.get(name, (0.0, 0.0))
        self.squares[name] = (error + float(np.sum((a - b) ** 2)), scale + float(np.sum(a**2)))

    def add_logits(self, reference: Array, candidate: Array, rows: Array, targets: Array) -> float:
        """Count `rows` of logits [n, vocabulary] against what came, `targets`; return the candidate's loss."""
        if reference.shape != candidate.shape:
            found, expected = candidate.shape[-1], reference.shape[-1]
            raise DataError(f"logits: the vocabulary of the candidate is {found}, {expected} expected")
        loss = 0.0
        for (part, p), (_, q) in zip(log_softmax(reference, rows), log_softmax(candidate, rows), strict=True):
            loss += _loss(q, targets[part])
            self.divergence += float(np.sum(np.exp(p) * (p - q), dtype=np.float64))
            self.agreeing += int(np.count_nonzero(p.argmax(-1) == q.argmax(-1)))
        self.predictions += len(targets)
        return loss

    def cosine(self) -> dict[str, float]:
        """Mean cosine of the vectors along the last axis, per output."""
        return {name: total / count for name, (total, count) in self.cosines.items()}

    def relative_error(self) -> dict[str, float]:
        """||candidate - reference|| / ||reference|| over everything, per output."""
        return {
            name: float(np.sqrt(error / scale)) if scale else float(error > 0)
            for name, (error, scale) in self.squares.items()
        }


def summed_loss(logits: Array, rows: Array, targets: Array) -> float:
    """Cross entropy in nats summed over `rows` of logits [n, vocabulary], each against its target."""
    return sum(_loss(found, targets[part]) for part, found in log_softmax(logits, rows))


def _loss(log_probabilities: Array, targets: Array) -> float:
    return -float(np.sum(log_probabilities[np.arange(len(targets)), targets], dtype=np.float64))


def log_softmax(logits: Array, rows: Array) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Log-probabilities of `rows` of logits [n, vocabulary], a few at a time: (slice of `rows`, their values).

    Sums of exponentials are float64. Only the few rows in hand are copied.
    """
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        shifted = logits[rows[part]].astype(np.float32, copy=False)
        shifted -= shifted.max(-1, keepdims=True)
        total = np.exp(shifted).sum(-1, dtype=np.float64, keepdims=True)
        shifted -= np.log(total).astype(np.float32)
        yield part, shifted


def real_tokens(batch: Batch) -> npt.NDArray[np.bool_]:
    """Which of a batch's input_ids [batch, tokens] are text and not padding, by its attention mask."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.shape[1] < ids.shape[1]:
        return np.ones(ids.shape, np.bool_)
    # with a filled cache the mask also covers what came before
    return np.asarray(mask[:, -ids.shape[1] :] > 0)
