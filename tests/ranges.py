"""The range of each tensor in one call, as the quantizer finds them together with much else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_quarot.calibrate import observe
from onnx_quarot.observers import Range, make_observer


def calibrate(
    model: Path,
    tensors: Sequence[str],
    batches: Iterable[Mapping[str, Any]],
    *,
    method: str = "minmax",
    percentile: float = 99.999,
    threads: int | None = None,
    progress: Any = None,
) -> dict[str, Range]:
    observers = {name: make_observer(method, percentile=percentile, bits=8, symmetric=False) for name in tensors}
    observe(model, observers, batches, threads=threads, progress=progress)
    return {name: observer.range() for name, observer in observers.items()}
