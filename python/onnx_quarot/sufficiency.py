"""Whether calibration data says enough: counted while it is read, remarked on in the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from .observers import Sink

Array = npt.NDArray[Any]

_FEW = 128  # rows, below which a range is a matter of chance


@dataclass(frozen=True)
class Seen:
    """How many rows there were, and whether all were the same."""

    rows: int
    constant: bool


class Watched:
    """Hands rows (of the last axis) on to another sink, and remembers how many there were and whether they differed."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._first: Array | None = None
        self._rows = 0
        self._constant = True

    def update(self, values: Array) -> None:
        """As of the sink."""
        rows = values.reshape(-1, values.shape[-1] if values.ndim else 1)
        if self._constant and len(rows):
            if self._first is None:
                self._first = rows[0].copy()
            self._constant = bool((rows == self._first).all())
        self._rows += len(rows)
        self._sink.update(values)

    def seen(self) -> Seen:
        """What there was so far."""
        return Seen(self._rows, self._constant)


def range_remarks(seen: Mapping[str, Seen], batches: int) -> list[str]:
    """What is wrong with data that ranges were taken from."""
    rows = max((found.rows for found in seen.values()), default=0)
    notes = []
    if 0 < rows < _FEW:
        notes.append(
            f"calibration saw only {_count(rows, 'token')} (rows of activations) in {_count(batches, 'batch', 'es')}: "
            "ranges from so few are a matter of chance; give some hundreds or more"
        )
    return [*notes, *_constant(seen)]


def hessian_remarks(seen: Mapping[str, Seen], features: Mapping[str, int]) -> list[str]:
    """What is wrong with data that Hessians of layers with so many input `features` were taken from."""
    short = [name for name, found in seen.items() if found.rows < features[name]]
    if not short:
        return _constant(seen)
    least = min(short, key=lambda name: seen[name].rows / features[name])
    return [
        f"gptq saw only {_count(seen[least].rows, 'token')} (rows of activations) at layers of {features[least]} input "
        "features: it gets better up to several times as many as features",
        *_constant(seen),
    ]


def _constant(seen: Mapping[str, Seen]) -> list[str]:
    same = [name for name, found in seen.items() if found.constant and found.rows > 1]
    if not same:
        return []
    return [
        f"{len(same)} of {_count(len(seen), 'activation')} had the same values in all {seen[same[0]].rows} rows of the "
        f"calibration data ({same[0]} is the first): it is constant there; give data that varies as it will in use"
    ]


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else plural}"


def watch(sinks: Mapping[str, Sink]) -> dict[str, Watched]:
    """Each of them watched."""
    return {name: Watched(sink) for name, sink in sinks.items()}
