"""Ranges of activations, measured by running the float model on calibration data.

Only the part of the graph that the asked tensors depend on is run (a language model's logits are not
computed). Weights stay in their file, mapped and not repacked, and activations are reduced as they come and
dropped.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort

from . import _core, runtime_faults
from .errors import DataError, ModelError, first_line
from .load import to_plain_form
from .observers import Sink
from .partial import disposable
from .widen import widen_bfloat16

Array = npt.NDArray[Any]

_INLINE_LIMIT = 64 * 2**20


def observe(
    model_path: str | PathLike[str],
    observers: Mapping[str, Sink],
    batches: Iterable[Mapping[str, Array]],
    *,
    threads: int | None = None,
    progress: Any = None,
    task: str = "calibrating",
    readers: Mapping[str, str] | None = None,
) -> None:
    """Run the float model on `batches` and show each observer the tensor it is listed under, a value of the graph.

    threads: of the runtime, None for its default; what is seen does not depend on it beyond the rounding of the model
    itself. readers: for messages, a node that reads the tensor. Memory: the mapped weights that are used, the asked
    tensors of one batch, and the observers. Raises ModelError for a tensor the graph does not have or a model that does
    not run, DataError for a tensor with a value that is not finite and for data without a batch.
    """
    if not observers:
        return
    names = list(observers)
    seen = 0
    with _session(Path(model_path), names, threads) as (session, computed):
        for index, batch in enumerate(_tracked(batches, progress, task)):
            seen += 1
            for name in (name for name in names if name not in computed):
                _observe(observers[name], name, _fed(batch, name), index, readers)
            if session is not None:
                for name, values in run(session, computed, batch):
                    _observe(observers[name], name, values, index, readers)
    if not seen:
        raise DataError("data: holds no batch; at least one is needed")


def _observe(observer: Sink, name: str, values: Array, index: int, readers: Mapping[str, str] | None) -> None:
    values = values.astype(np.float32, copy=False)
    # One pass without a temporary: a sum of squares is finite only if every element is.
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.dot(flat, flat))
    if not math.isfinite(squares) and not bool(np.isfinite(flat).all()):
        kind = "NaN" if bool(np.isnan(flat).any()) else "Inf"
        at = "" if readers is None else f", the input of {readers[name]!r},"
        raise DataError(f"data: tensor {name!r}{at} holds {kind}, a value that is not finite, in batch {index}")
    observer.update(values)


def _tracked(batches: Iterable[Mapping[str, Array]], progress: Any, name: str) -> Iterator[Mapping[str, Array]]:
    if progress is None:
        yield from batches
        return
    total = len(batches) if isinstance(batches, Sequence) else None
    with progress.task(name, total) as task:
        for batch in batches:
            yield batch
            task.advance()


def run(session: ort.InferenceSession, names: list[str], batch: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Each of the outputs `names` in turn; one that was taken is held no longer here."""
    arrays = {value.name: _fed(batch, value.name) for value in session.get_inputs()}
    outputs: list[Any]
    try:
        if any(array.dtype.kind in "OSU" for array in arrays.values()):  # strings cannot be handed over as they are
            outputs = session.run(names, arrays)
        else:
            feeds = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
            outputs = session.run_with_ort_values(names, feeds)
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise ModelError(f"model: does not run on the calibration data: {first_line(error)}") from None
    outputs.reverse()
    for name in names:
        taken = outputs.pop()
        yield name, taken if isinstance(taken, np.ndarray) else taken.numpy()


def run_all(session: ort.InferenceSession, names: list[str], batch: Mapping[str, Array]) -> list[Array]:
    """The outputs `names` of :func:`run`, all held at once."""
    return [values for _, values in run(session, names, batch)]


def _fed(batch: Mapping[str, Array], name: str) -> Array:
    if name not in batch:
        raise DataError(f"data: a batch lacks input {name!r}")
    array = np.ascontiguousarray(batch[name])
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


@contextmanager
def _session(
    path: Path, names: list[str], threads: int | None
) -> Iterator[tuple[ort.InferenceSession | None, list[str]]]:
    """A session over the part of the graph that `names` need, and those of them that have to be computed.

    Graph inputs need not be; if nothing else is asked there is no session.
    """
    if not path.is_file():
        raise ModelError(f"model: no file at {path}")
    with ExitStack() as stack:
        model = ir.load(path)
        to_plain_form(model)
        computed = _prune(model, names)
        yield (open_model(model, path.parent, stack, threads) if computed else None), computed


def open_model(model: ir.Model, folder: Path, stack: ExitStack, threads: int | None = None) -> ort.InferenceSession:
    """A session of `model`, whose external data lies in `folder`, in little memory: weights mapped, not repacked.
    bfloat16, inputs and outputs of that type among it, becomes float32.

    What it needs on disk lives until `stack` is closed. ModelError if it cannot be run.
    """
    runtime_faults.refuse(model, "model")
    widen_bfloat16(model)  # which ONNX Runtime's CPU knows little of
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, with the same words
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    if not _core.has_vnni():  # values of a quantized model are those of exact sums, as in `custom_op.session`
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    _register_custom_ops(model, options)
    inline = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    )
    source: str | bytes
    if inline > _INLINE_LIMIT:
        # Weights inside the file would be held twice, as message and as tensors: map them from a file instead.
        scratch = stack.enter_context(disposable(Path(tempfile.mkdtemp(prefix="onnx-quarot-"))))
        source = str(scratch / "model.onnx")
        ir.save(model, source, external_data="model.onnx.data")
    else:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
        source = ir.to_proto(model).SerializeToString()
    del model
    gc.collect()
    try:
        # Folding constants would copy whole weights (a transposed embedding) into memory.
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise ModelError(f"model: {folder} cannot be run by ONNX Runtime: {first_line(error)}") from None


def _prune(model: ir.Model, names: list[str]) -> list[str]:
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    inputs = {value.name for value in graph.inputs}
    for name in names:
        if name not in values and name not in inputs:
            raise ModelError(f"tensor {name!r} is not in the model's graph")
    computed = [name for name in names if name not in inputs]
    graph.outputs.clear()
    graph.outputs.extend(values[name] for name in computed)
    passes.RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.initializers.values() if not v.uses()]:
        del graph.initializers[value.name or ""]
        if value.is_graph_input():  # which nobody has to give
            graph.inputs.remove(value)
    return computed


def _register_custom_ops(model: ir.Model, options: ort.SessionOptions) -> None:
    from . import custom_op

    if any(node.domain == custom_op.DOMAIN for node in model.graph.all_nodes()):
        custom_op.register(options)


def inner_values(path: Path, tensors: Iterable[str], batch: Mapping[str, Array]) -> dict[str, Array]:
    """The values `tensors` of the graph at `path` for one batch, all held at once."""
    names = list(dict.fromkeys(tensors))
    with _session(path, names, None) as (session, computed):
        values = {name: _fed(batch, name) for name in names if name not in computed}
        return values if session is None else values | dict(run(session, computed, batch))
