"""Reading a model: lazily, checked, with every constant as an initializer."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from onnx_quarot.errors import ModelError

_TWO_GIB = 1 << 31


def load(path: str | Path) -> ir.Model:
    """The model at ``path`` with its external data memory-mapped on demand.

    Constant nodes become initializers, so that weights look alike wherever an exporter put them. Raises ModelError, in
    one line, for a missing file, a file that is not an ONNX model, and external data that is missing or too short.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"model: {str(path)!r} {what}; give the path of an .onnx file")
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise ModelError(f"model: {str(path)!r} is not a readable ONNX model ({_first_line(error)})") from error
    if not model.graph.outputs:
        raise ModelError(f"model: {str(path)!r} is not an ONNX model, or its graph has no outputs")
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _resolve_external_data(model, path.parent)
    return model


def _resolve_external_data(model: ir.Model, folder: Path) -> None:
    """Check every external tensor against its file, so that a broken file is found before any work is done."""
    sizes: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"model: initializer {name!r} has no data")
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = str(tensor.path)
        if file not in sizes:
            try:
                sizes[file] = Path(file).stat().st_size
            except OSError as error:
                raise ModelError(
                    f"model: external data {str(tensor.location)!r} of {name!r} cannot be read ({error.strerror})"
                ) from error
        end = (tensor.offset or 0) + tensor.nbytes
        if sizes[file] < end:
            raise ModelError(
                f"model: external data {str(tensor.location)!r} is truncated: {name!r} needs bytes up to {end}, "
                f"the file has {sizes[file]}"
            )


def external_files(model: ir.Model) -> set[Path]:
    """The files that hold the model's weights."""
    return {
        Path(t.path) for v in model.graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)
    }


def total_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
