"""A small Llama, data for it, and how far a quantized one is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import onnx_quarot as oq
import small_llama


def batches(config: small_llama.Config, count: int = 4, length: int = 48) -> list[dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    return [small_llama.decoder_feeds(config, rng, length) for _ in range(count)]


def error(config: small_llama.Config, reference: Path, candidate: Path) -> float:
    """The relative distance of logits, on data that follows that of `batches`."""
    feeds = batches(config, 5)[-1]
    a, b = (oq.session(path).run(["logits"], feeds)[0] for path in (reference, candidate))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))
