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

from .calibrate import observe, open_model, run_all
from .editing import GraphNames, insert_behind
from .errors import ConfigError
from .judged import keep_judged_outputs, squared_error
from .load import to_plain_form
from .observers import Range
from .progress import Progress
from .qparams import activation_parameters
from .scheme import TensorSpec
from .sites import LinearSite
from .switches import FLAGS, Switches

Array = npt.NDArray[Any]

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
        to_plain_form(model)
        outputs = keep_judged_outputs(model)
        _insert_switches(model, names, parameters, spec)
        session = open_model(model, path.parent, stack, threads)
        flags = np.zeros(len(names), np.bool_)
        errors: dict[str, float] = {}
        with progress.task("measuring sensitivity", len(names) + 1) as task:
            expected = run_all(session, outputs, {**batch, FLAGS: flags})
            task.advance()
            for index, name in enumerate(names):
                flags[:] = False
                flags[index] = True
                found = run_all(session, outputs, {**batch, FLAGS: flags})
                errors[name] = squared_error(expected, found)
                task.advance()
        return errors


def _insert_switches(
    model: ir.Model, names: Sequence[str], parameters: Mapping[str, tuple[np.float32, int]], spec: TensorSpec
) -> None:
    """Before all readers of each tensor, a switch to its quantized and dequantized form."""
    graph = model.graph
    values = {value.name: value for value in graph.inputs}
    values |= {value.name: value for node in graph for value in node.outputs}
    free = GraphNames(graph)
    switches = Switches(free, len(names))
    for number, name in enumerate(names):
        value, uses = values[name], tuple(values[name].uses())
        scale, zero = parameters[name]
        prefix = f"onnx_quarot.probe.{number}"
        inputs = [
            free.initializer(ir.Tensor(np.array(scale, np.float32)), f"{prefix}.scale"),
            free.initializer(ir.Tensor(np.array(zero, spec.numpy_dtype), dtype=spec.dtype), f"{prefix}.zero"),
        ]
        quantize = ir.node("QuantizeLinear", [value, *inputs])
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *inputs])
        keep = ir.node("Identity", [value])
        ends = dequantize.outputs[0], keep.outputs[0]
        for end in ends:
            end.type = ir.TensorType(ir.DataType.FLOAT)
        flag, switch = switches.nodes(number, [quantize, dequantize], [keep], ends)
        insert_behind(graph, value, [flag, switch])
        for reader, position in uses:
            reader.replace_input_with(position, switch.outputs[0])
