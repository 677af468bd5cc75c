"""Automatic mixed precision: the few linear layers that need 16-bit activations, found by measuring.

Most of what static 8-bit activations cost is often lost at a handful of layers (massive activations: one token
hundreds of times larger than the rest leaves no levels for them). Two measurements on calibration data find them: the
error each quantizer makes in its own tensor picks candidates; then the model is run once for each candidate, with that
quantizer alone at work, and what this changes in the model's outputs decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from .calibrate import Range, observe, open_model, run
from .errors import ConfigError, ModelError
from .progress import Progress
from .qparams import activation_parameters
from .scheme import TensorSpec
from .sites import LinearSite

Array = npt.NDArray[Any]

_FLAGS = "onnx_quarot.probe.flags"
_CANDIDATES = 3  # times the budget
_ENOUGH = 0.05  # of the error of all candidates together: what is left is not worth another site


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one activation, alone, does to the model's outputs.

    nodes: the linear layers that read it. error: relative squared error of the outputs, mean over rows of their last
    axis. chosen: whether it gets 16 bits.
    """

    activation: str
    nodes: tuple[str, ...]
    error: float
    chosen: bool


def find_sensitive(
    model_path: Path,
    sites: Sequence[LinearSite],
    ranges: Mapping[str, Range],
    spec: TensorSpec,
    batch: Mapping[str, Array],
    *,
    budget: float,
    progress: Progress,
    threads: int | None = None,
) -> list[Sensitivity]:
    """The candidates by falling error; `chosen` are those that 16 bits should go to.

    ranges, spec: how each activation of `sites` would be quantized. batch: one batch of calibration data. budget: the
    share of linear layers, of (0, 1], that may have 16-bit activations; at least one layer. The model is run as often
    as three times the budget has activations, in float, with weights mapped. ConfigError for a budget out of range,
    ModelError for a model without an output to judge by.
    """
    if not 0.0 < budget <= 1.0:
        raise ConfigError(f"mixed: a budget of {budget} is out of range; use a share of layers above 0 and at most 1")
    readers: dict[str, list[str]] = {}
    for site in sites:
        readers.setdefault(site.activation, []).append(site.node_name)
    allowed = max(1, int(budget * len(sites)))
    parameters = {name: activation_parameters(ranges[name], spec) for name in readers}
    candidates = _candidates(model_path, parameters, spec, batch, _CANDIDATES * allowed, threads)
    errors = _output_errors(model_path, candidates, parameters, spec, batch, progress, threads)
    order = sorted(candidates, key=lambda name: -errors[name])
    left, open_error = allowed, sum(errors.values())
    enough = _ENOUGH * open_error
    chosen: set[str] = set()
    for name in sorted(candidates, key=lambda name: -errors[name] / len(readers[name])):
        if open_error <= enough or errors[name] == 0.0:
            break
        if len(readers[name]) <= left:
            left -= len(readers[name])
            open_error -= errors[name]
            chosen.add(name)
    return [Sensitivity(name, tuple(readers[name]), errors[name], name in chosen) for name in order]


class _LocalError:
    """Relative squared error of a quantizer, token by token: the mean and the largest."""

    def __init__(self, scale: float, zero: int, spec: TensorSpec) -> None:
        self.scale, self.zero, self.bounds = scale, zero, spec.bounds
        self.total, self.count, self.worst = 0.0, 0, 0.0

    def update(self, values: Array) -> None:
        rows = values.reshape(-1, values.shape[-1] if values.ndim else 1).astype(np.float32, copy=False)
        first, last = self.bounds
        steps = np.clip(np.rint(rows / np.float32(self.scale)) + self.zero, first, last) - self.zero
        steps *= np.float32(self.scale)
        steps -= rows
        length = np.einsum("ij,ij->i", rows, rows)
        error = np.einsum("ij,ij->i", steps, steps)[length > 0] / length[length > 0]
        self.total += float(error.sum())
        self.count += len(error)
        self.worst = max(self.worst, float(error.max(initial=0.0)))


def _candidates(
    path: Path,
    parameters: Mapping[str, tuple[np.float32, int]],
    spec: TensorSpec,
    batch: Mapping[str, Array],
    count: int,
    threads: int | None,
) -> list[str]:
    """The activations whose quantizers err most: half by the mean over tokens, half by the worst token.

    The worst token counts because it may be one that all others attend to.
    """
    local = {name: _LocalError(float(scale), zero, spec) for name, (scale, zero) in parameters.items()}
    observe(path, local, [batch], threads=threads)
    by_mean = sorted(local, key=lambda name: -local[name].total / max(1, local[name].count))
    by_worst = sorted(local, key=lambda name: -local[name].worst)
    merged = [name for pair in zip(by_mean, by_worst, strict=True) for name in pair]
    return list(dict.fromkeys(merged))[:count]


def _output_errors(
    path: Path,
    names: Sequence[str],
    parameters: Mapping[str, tuple[np.float32, int]],
    spec: TensorSpec,
    batch: Mapping[str, Array],
    progress: Progress,
    threads: int | None,
) -> dict[str, float]:
    with ExitStack() as stack:
        model = ir.load(path)
        outputs = _keep_judged_outputs(model)
        _insert_switches(model, names, parameters, spec)
        session = open_model(model, path.parent, stack, threads)
        flags = np.zeros(len(names), np.bool_)
        errors: dict[str, float] = {}
        with progress.task("measuring sensitivity", len(names) + 1) as task:
            expected = _outputs(session, outputs, {**batch, _FLAGS: flags})
            task.advance()
            for index, name in enumerate(names):
                flags[:] = False
                flags[index] = True
                found = _outputs(session, outputs, {**batch, _FLAGS: flags})
                errors[name] = float(np.mean([_row_error(a, b) for a, b in zip(expected, found, strict=True)]))
                task.advance()
        return errors


def _outputs(session: ort.InferenceSession, names: list[str], feeds: Mapping[str, Array]) -> list[Array]:
    return [values for _, values in run(session, names, feeds)]


def _row_error(expected: Array, found: Array) -> float:
    width = expected.shape[-1] if expected.ndim else 1
    a, b = expected.reshape(-1, width).astype(np.float32), found.reshape(-1, width).astype(np.float32)
    size = np.einsum("ij,ij->i", a, a)
    b -= a
    return float(np.mean(np.divide(np.einsum("ij,ij->i", b, b), size, out=np.zeros_like(size), where=size > 0)))


def _keep_judged_outputs(model: ir.Model) -> list[str]:
    """Leave the graph the floating-point outputs that are results; a cache handed on to the next call is none."""
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    kept = [value for value in model.graph.outputs if value.dtype in floats and not _is_cache(value)]
    if not kept:
        raise ModelError("model: has no floating-point output to measure sensitivity by")
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    return [value.name or "" for value in kept]


def _is_cache(value: ir.Value) -> bool:
    """Whether the node that makes an output of rank 4 or more reads a graph input of the same rank: past, present."""
    node = value.producer()
    if node is None or value.shape is None or len(value.shape) < 4:
        return False
    rank = len(value.shape)
    return any(
        x is not None and x.is_graph_input() and x.shape is not None and len(x.shape) == rank for x in node.inputs
    )


def _insert_switches(
    model: ir.Model, names: Sequence[str], parameters: Mapping[str, tuple[np.float32, int]], spec: TensorSpec
) -> None:
    """Before all readers of each tensor, `If(flags[i])` it is quantized and dequantized."""
    graph = model.graph
    flags = ir.Value(name=_FLAGS, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([len(names)]))
    graph.inputs.append(flags)
    values = {value.name: value for value in graph.inputs}
    values |= {value.name: value for node in graph for value in node.outputs}
    for number, name in enumerate(names):
        value, uses = values[name], tuple(values[name].uses())
        prefix = f"onnx_quarot.probe.{number}"
        index = _constant(model, f"{prefix}.index", ir.Tensor(np.array(number, np.int64)))
        scale, zero = parameters[name]
        inputs = [
            _constant(model, f"{prefix}.scale", ir.Tensor(np.array(scale, np.float32))),
            _constant(model, f"{prefix}.zero", ir.Tensor(np.array(zero, spec.numpy_dtype), dtype=spec.dtype)),
        ]
        flag = ir.node("Gather", [flags, index], {"axis": 0}, name=f"{prefix}.Gather")
        flag.outputs[0].name = f"{prefix}.flag"
        quantize = ir.node("QuantizeLinear", [value, *inputs])
        quantize.outputs[0].name = f"{prefix}.quantized"
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *inputs])
        keep = ir.node("Identity", [value])
        branches = []
        for key, nodes in (("then", [quantize, dequantize]), ("else", [keep])):
            result = nodes[-1].outputs[0]
            result.name = f"{prefix}.{key}"
            result.type = ir.TensorType(ir.DataType.FLOAT)
            branches.append(ir.Graph([], [result], nodes=nodes, name=f"{prefix}.{key}_branch"))
        switch = ir.node("If", [flag.outputs[0]], {"then_branch": branches[0], "else_branch": branches[1]})
        switch.outputs[0].name = f"{prefix}.switched"
        switch.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        producer = value.producer()
        if producer is not None:
            graph.insert_after(producer, [flag, switch])
        else:
            graph.insert_before(next(iter(graph)), [flag, switch])
        for reader, position in uses:
            reader.replace_input_with(position, switch.outputs[0])


def _constant(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(list(tensor.shape.numpy())),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value
