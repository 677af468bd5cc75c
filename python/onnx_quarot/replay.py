"""Calibration data that is read more than once: a reader may give its batches only once, so they are kept on disk."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Batch = Mapping[str, npt.NDArray[Any]]


class Replay(Sequence[Batch]):
    """The batches of an iterable, one in memory at a time, as often as needed. `folder` holds their files."""

    def __init__(self, batches: Iterable[Batch], folder: Path) -> None:
        self._folder = folder
        self._count = 0
        for self._count, batch in zip(itertools.count(1), batches, strict=False):
            with (folder / f"batch.{self._count - 1}").open("wb") as file:
                pickle.dump({name: np.asarray(array) for name, array in batch.items()}, file, protocol=5)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        with (self._folder / f"batch.{index % self._count}").open("rb") as file:
            batch: Batch = pickle.load(file)
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(self._count))
