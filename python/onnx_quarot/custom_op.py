"""The operator ``onnx_quarot::Hadamard``: the library that runs it fast, and functions that run it anywhere.

A model that rotates activations carries, for each kind of transform in it, a model-local function of the
operator's name, written in standard ONNX operators. A runtime that knows nothing of us inlines that function;
ONNX Runtime with the library registered (:func:`register`, :func:`session`) runs the compiled operator and
ignores the function. Both compute ``(x * signs) @ H * scale`` on the last axis, as
:func:`onnx_quarot.transform.hadamard` does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnx_quarot import _core, runtime_faults
from onnx_quarot.errors import ModelError, OnnxQuarotError
from onnx_quarot.portable import DOMAIN, OPSET_VERSION, TYPE_SUFFIX, Transform, check_input

__all__ = ["DOMAIN", "OPSET_VERSION", "OP_TYPE", "add_hadamard", "custom_op_library", "register", "session"]

OP_TYPE = "Hadamard"

_REGISTERED = "onnx_quarot.registered"  # an entry that the library leaves in options (csrc/ort/ops.cc)


@functools.cache
def custom_op_library() -> str:
    """Path of the shared library of custom operators, for any binding of ONNX Runtime.

    Raises:
        OnnxQuarotError: the library is not installed beside the package's compiled module.
    """
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    folders = [Path(__file__).parent]
    # An editable installation keeps compiled files away from the sources.
    spec = importlib.util.find_spec("onnx_quarot._core")
    if spec is not None and spec.origin is not None:
        folders.insert(0, Path(spec.origin).parent)
    for folder in folders:
        path = folder / f"libonnx_quarot_ops.{suffix}"
        if path.is_file():
            return str(path)
    raise OnnxQuarotError(f"libonnx_quarot_ops.{suffix} is not in {folders[0]}: install onnx-quarot again")


def register(session_options: ort.SessionOptions) -> None:
    """Make the compiled operators known to sessions made from ``session_options``.

    Safe to repeat, also after ``register_custom_ops_library`` with this library or a copy of it.

    Raises:
        OnnxQuarotError: this ONNX Runtime cannot load the library.
    """
    library = custom_op_library()
    try:
        session_options.register_custom_ops_library(library)
    except Exception as error:
        raise OnnxQuarotError(f"{library} cannot be loaded: {_one_line(error)}") from error


def session(
    path: str | os.PathLike[str],
    *,
    session_options: ort.SessionOptions | None = None,
    providers: Sequence[str] | None = None,
    use_library: bool = True,
    exact: bool = True,
    threads: int | None = None,
) -> ort.InferenceSession:
    """An ``onnxruntime.InferenceSession`` for the model at ``path``.

    Args:
        path: an ONNX file.
        session_options: options to start from. They are changed.
        providers: execution providers, default ``["CPUExecutionProvider"]``.
        use_library: run online rotations in the compiled operator; False runs their portable functions.
        exact: on x86 CPUs without VNNI, run 8-bit products without saturating their sums in 16 bits (ONNX Runtime's
            ``session.x64quantprecision``; elsewhere they never saturate). False is faster there, loses a little on
            rotated models and everything on models with outliers.
        threads: threads within an operator; default: ONNX Runtime's choice, or that of ``session_options``.

    Raises:
        ModelError: the file is missing, or ONNX Runtime refuses it.
        OnnxQuarotError: the library cannot be loaded, or is not wanted and in ``session_options`` already.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"model is {str(file)!r}: there is no such file")
    _refuse_faults(file)
    options = ort.SessionOptions() if session_options is None else session_options
    if threads is not None:
        if threads < 1:
            raise OnnxQuarotError(f"threads is {threads}: it must be at least 1")
        options.intra_op_num_threads = threads
    if exact and not _core.has_vnni():
        # With VNNI nothing saturates, and this would halve the speed: it makes all weights uint8.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if use_library:
        register(options)
    elif _holds_library(options):
        raise OnnxQuarotError("use_library is False, but session_options have the library registered: give others")
    try:
        return ort.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"] if providers is None else list(providers)
        )
    except Exception as error:
        raise ModelError(f"{file} cannot be loaded by onnxruntime: {_one_line(error)}") from error


def add_hadamard(
    model: ir.Model,
    x: ir.Value,
    *,
    size: int,
    block_size: int | None = None,
    signs: npt.NDArray[Any] | None = None,
    transpose: bool = False,
    scale: float | None = None,
    name: str,
) -> ir.Node:
    """Make a node that transforms the last axis of ``x``, and what the model needs to hold for it.

    The caller places the node in a graph. The model gets the operator set import, the signs as an initializer
    (equal signs are shared), and the portable function, once for each distinct transform.

    Args:
        model: changed in place; its IR version becomes 10 at least.
        x: ``[..., size]``, float32, float16, bfloat16 or float64.
        size: length of the last axis of ``x``.
        block_size, signs, transpose, scale: as in :func:`onnx_quarot.transform.hadamard`. The scale is stored
            as a float32, whatever the type of ``x``.
        name: of the node; its output is called ``{name}_output``.

    Raises:
        OrderError: the block size does not divide ``size``, or has no Hadamard matrix.
        ModelError: the type or shape of ``x`` does not fit, or the signs do not.
    """
    dtype = check_input(x, size, name, tuple(TYPE_SUFFIX))
    transform = Transform.make(size, block_size, signs, transpose, scale, dtype)
    inputs = [x, *transform.prepare(model, signs)]
    overload = transform.overload()
    if (DOMAIN, OP_TYPE, overload) not in model.functions:
        model.functions[DOMAIN, OP_TYPE, overload] = transform.function(model.opset_imports[""])
    output = ir.Value(name=f"{name}_output", type=ir.TensorType(dtype), shape=x.shape)
    attributes = transform.attributes(size)
    return ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, overload=overload, outputs=[output], name=name)


def _refuse_faults(file: Path) -> None:
    if not runtime_faults.any_known():
        return
    try:
        model = ir.load(file)
    except Exception:
        return  # ONNX Runtime says what is wrong with the file
    runtime_faults.refuse(model, str(file))


def _holds_library(options: ort.SessionOptions) -> bool:
    try:
        options.get_session_config_entry(_REGISTERED)
    except RuntimeError:  # there is no such entry
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
