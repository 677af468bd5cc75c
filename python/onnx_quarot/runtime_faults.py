"""Models that an old ONNX Runtime accepts and then runs wrongly, or dies of: refused by name before they are opened."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime as ort

from onnx_quarot.errors import ModelError

_FLAWLESS = (1, 32)  # from here on nothing is refused


def any_known() -> bool:
    """Whether this ONNX Runtime has faults that :func:`refuse` knows, so that it is worth reading a model for it."""
    return version() < _FLAWLESS


def refuse(model: ir.Model, name: str) -> None:
    """ModelError if this ONNX Runtime fails with `model`, called `name`, in a way that it does not report."""
    if version() < (1, 27):
        _overloads(model, name)
    if version() < (1, 32):
        _attention_without_bias(model, name)


def _overloads(model: ir.Model, name: str) -> None:
    # Functions are known by domain and name alone: of several overloads one is run for all, and where their types and
    # inputs agree the result is wrong without a word.
    functions = [(domain, function) for domain, function, _ in model.functions]
    for domain, function in functions:
        if functions.count((domain, function)) > 1:
            raise ModelError(
                f"{name} holds several overloads of the function {domain}::{function}, which onnxruntime "
                f"{ort.__version__} does not tell apart: onnxruntime 1.27 or later is needed"
            )


def _attention_without_bias(model: ir.Model, name: str) -> None:
    # The bias is optional, but the CPU kernel reads it whether it is there or not (microsoft/onnxruntime#25005).
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for graph in graphs for node in graph.all_nodes()):
        if (node.domain, node.op_type) == ("com.microsoft", "Attention") and node.inputs[2:3] in ((), (None,)):
            raise ModelError(
                f"{name}: Attention node {node.name!r} has no bias, which ends a process in onnxruntime "
                f"{ort.__version__}: onnxruntime 1.32 or later is needed, or a bias of zeros"
            )


def version() -> tuple[int, ...]:
    """The major and minor version of ONNX Runtime."""
    return tuple(int(part) for part in ort.__version__.split(".")[:2])
