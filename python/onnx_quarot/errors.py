"""What can go wrong, one class a cause. Every message is one line: the argument, the value found, the rule."""

from __future__ import annotations


class OnnxQuarotError(ValueError):
    """Base of all errors this package raises on purpose."""


class ModelError(OnnxQuarotError):
    """A model file that is missing, broken, or holds nothing this package can work on."""


class DataError(OnnxQuarotError):
    """Calibration or evaluation data that does not fit the model."""


class OrderError(OnnxQuarotError):
    """A size for which no Hadamard matrix is available."""


class ConfigError(OnnxQuarotError):
    """An option that is unknown, unsupported, or contradicts the model or another option."""


class VerificationError(OnnxQuarotError):
    """A rewritten model whose outputs differ from the original's by more than rounding."""


class SaveError(OnnxQuarotError):
    """An output that cannot be written."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says, its first line, or the name of its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
