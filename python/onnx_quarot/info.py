"""Facts about this installation, and about a model file, as plain values."""

from __future__ import annotations

import os
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .resources import cpu_name

if TYPE_CHECKING:
    from .evaluation import Metrics

PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "ml_dtypes")
QUANTIZED_OPS = (
    "QuantizeLinear",
    "DequantizeLinear",
    "MatMulNBits",
    "QLinear",
    "QMoE",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
)


def installation() -> dict[str, Any]:
    """Versions, the processor, which kernels it can run and which one is in use, where the operator library is."""
    from . import _core
    from .custom_op import custom_op_library

    return {
        "onnx_quarot": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": _core.isa(),
        "isas": list(_core.isas()),
        "custom_op_library": custom_op_library(),
    }


def model_facts(path: str | Path) -> dict[str, Any]:
    """What is in a model file; only its structure is read. Errors: ModelError."""
    import onnx_ir as ir

    from .custom_op import DOMAIN, OP_TYPE
    from .load import load, model_size
    from .sites import linear_sites

    path = Path(path)
    model = load(path)
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    linear = [site for site in linear_sites(model) if site.operand.dtype in (None, site.dtype)]
    quantized = Counter(node.op_type for node in model.graph if node.op_type in QUANTIZED_OPS)
    ours = [node for node in model.graph if node.domain == DOMAIN]
    online = [node for node in ours if node.op_type == OP_TYPE or node.attributes.get_int("rotate", 0) != 0]
    return {
        "path": str(path),
        "bytes": model_size(path),
        "parameters": sum(weight.size for weight in _once(ir, weights) if weight.dtype in _weight_types(ir)),
        "ir_version": model.ir_version,
        "opsets": {domain or "ai.onnx": number for domain, number in sorted(model.opset_imports.items())},
        "nodes": len(model.graph),
        "inputs": [_value(value) for value in model.graph.inputs],
        "outputs": [_value(value) for value in model.graph.outputs],
        "linear_layers": len(linear),
        "quantization": dict(quantized),
        "online_rotations": len(online),
    }


def _once(ir: Any, tensors: list[Any]) -> list[Any]:
    """Of those that are the same bytes of a file, one."""
    return list({(t.path, t.offset) if isinstance(t, ir.ExternalTensor) else id(t): t for t in tensors}.values())


def _weight_types(ir: Any) -> set[Any]:
    kinds = ir.DataType
    floats = {kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE}
    return floats | {kinds.INT8, kinds.UINT8, kinds.INT4, kinds.UINT4}


def _value(value: Any) -> str:
    shape = "?" if value.shape is None else ", ".join(str(d) for d in value.shape)
    return f"{value.name}: {'?' if value.dtype is None else value.dtype.name.lower()}[{shape}]"


def facts_table(facts: dict[str, dict[str, Any]]) -> Any:
    """`{"installation": ..., "model": ...}` for a terminal: one line a fact."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for number, (title, part) in enumerate(facts.items()):
        if number:
            table.add_section()
            table.add_row("", "")
        table.add_row(title, "")
        for key, value in part.items():
            table.add_row(f"  {key.replace('_', ' ')}", _text(key, value))
    return table


def _text(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        shown = value if len(value) <= 6 else [*value[:4], f"... {len(value) - 5} more ...", value[-1]]
        return (", " if key == "isas" else "\n").join(shown)
    if key == "bytes":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,}" if isinstance(value, int) else str(value)


def metrics_table(metrics: Metrics) -> Any:
    """`evaluate`'s result for a terminal: the two models side by side, then how far apart they are."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for title in ("reference", "candidate", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    pairs = (
        ("size, MB", metrics.reference.size_bytes / 1e6, metrics.candidate.size_bytes / 1e6),
        ("perplexity", metrics.reference.perplexity, metrics.candidate.perplexity),
        (
            "prefill, tokens/s",
            metrics.reference.prefill_tokens_per_second,
            metrics.candidate.prefill_tokens_per_second,
        ),
        (
            "decode, tokens/s",
            metrics.reference.decode_tokens_per_second,
            metrics.candidate.decode_tokens_per_second,
        ),
    )
    for name, ours, theirs in pairs:
        if ours is not None and theirs is not None:
            table.add_row(name, f"{ours:,.2f}", f"{theirs:,.2f}", f"{theirs / ours:.3f}" if ours else "")
    if metrics.kl_divergence is not None:
        table.add_row("KL divergence, nats", "", f"{metrics.kl_divergence:.4f}", "")
    if metrics.top1_agreement is not None:
        table.add_row("same top-1 token", "", f"{100 * metrics.top1_agreement:.2f} %", "")
    for name, cosine in metrics.cosine.items():
        table.add_row(f"{name}: cosine", "", f"{cosine:.6f}", "")
        table.add_row(f"{name}: relative error", "", f"{metrics.relative_error[name]:.2e}", "")
    unit = f"{metrics.tokens:,} predictions" if metrics.tokens else f"{metrics.windows} batches"
    table.caption = f"over {unit}"
    table.caption_justify = "left"
    return table
