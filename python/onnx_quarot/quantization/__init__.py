"""The names an AMD Quark user already has, on top of `onnx_quarot.quantize`."""

from __future__ import annotations

from .quantizer import ModelQuantizer

__all__ = ["ModelQuantizer"]
