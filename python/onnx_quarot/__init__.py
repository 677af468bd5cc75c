"""Rotation-based quantization for ONNX: Hadamard rotations spread activation outliers before they are quantized."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_quarot.custom_op import custom_op_library, register, session
    from onnx_quarot.errors import (
        ConfigError,
        DataError,
        ModelError,
        OnnxQuarotError,
        OrderError,
        SaveError,
        VerificationError,
    )
    from onnx_quarot.evaluation import evaluate
    from onnx_quarot.pipeline import discover, quantize, rotate
    from onnx_quarot.plan import Plan
    from onnx_quarot.quantization.quantizer import ModelQuantizer
    from onnx_quarot.report import Report
    from onnx_quarot.transform import Rotation, hadamard, hadamard_dynamic_quantize, hadamard_matrix, hadamard_quantize

__version__ = "0.1.0"

# Public names and where they live. They are imported on first use: the transform alone must not cost the second that
# importing onnx_ir and onnxruntime takes.
_HOME = {
    "custom_op_library": "custom_op",
    "register": "custom_op",
    "session": "custom_op",
    "ConfigError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "OnnxQuarotError": "errors",
    "OrderError": "errors",
    "SaveError": "errors",
    "VerificationError": "errors",
    "evaluate": "evaluation",
    "discover": "pipeline",
    "quantize": "pipeline",
    "rotate": "pipeline",
    "Plan": "plan",
    "ModelQuantizer": "quantization.quantizer",
    "Report": "report",
    "Rotation": "transform",
    "hadamard": "transform",
    "hadamard_dynamic_quantize": "transform",
    "hadamard_matrix": "transform",
    "hadamard_quantize": "transform",
}

__all__ = [
    "ConfigError",
    "DataError",
    "ModelError",
    "ModelQuantizer",
    "OnnxQuarotError",
    "OrderError",
    "Plan",
    "Report",
    "Rotation",
    "SaveError",
    "VerificationError",
    "custom_op_library",
    "discover",
    "evaluate",
    "hadamard",
    "hadamard_dynamic_quantize",
    "hadamard_matrix",
    "hadamard_quantize",
    "quantize",
    "register",
    "rotate",
    "session",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
