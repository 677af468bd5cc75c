"""Discovery: from a graph to a plan. ``prepare -> shapes -> rules (typing) -> labels -> plan``.

Nothing of the model's function is modified. Names of nodes and tensors are hints for people here, never for decisions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import onnx_ir as ir

from onnx_quarot.discovery.builder import Builder
from onnx_quarot.discovery.constants import root_tensor, tensor_shape
from onnx_quarot.discovery.labels import Labels, Worth
from onnx_quarot.discovery.prepare import prepare
from onnx_quarot.discovery.rope import fused_keys
from onnx_quarot.discovery.rules import apply_rules
from onnx_quarot.discovery.shapes import Shapes
from onnx_quarot.discovery.tied import TiedHead, agree, keep_basis, share_basis, tied_heads
from onnx_quarot.discovery.typing import Slot, Typing
from onnx_quarot.editing import has_subgraphs, numbered
from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.plan import DEFAULT_ROTATIONS, ROTATIONS, Plan
from onnx_quarot.sites import linear_sites, why_no_layers
from onnx_quarot.transform import has_order

__all__ = ["discover_model", "fingerprint"]

_QUANTIZED = frozenset(
    (
        "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv",
        "MatMulNBits", "MatMulBnb4", "QMoE", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QAttention",
        "DynamicQuantizeLSTM", "QLinearAdd", "GatherBlockQuantized", "QLinear",
    )
)  # fmt: skip


def discover_model(
    model: ir.Model,
    *,
    rotations: Iterable[str] = DEFAULT_ROTATIONS,
    block_size: int | None = None,
    seed: int | None = None,
    tied: bool = False,
    keys: bool = False,
    convolutions: bool = True,
    left: Iterable[str] = (),
) -> Plan:
    """Decide what is rotated in ``model`` and how. The model is brought into a form that can be rotated (see
    :mod:`prepare`), which does not change its function.

    rotations: which of R1 (the residual stream), R2 (attention values, a rotation a head), R3 (queries and keys) and R4
    (everything else, usually online in front of the down projection) may be used. block_size: rotate in blocks of this
    many features instead of whole axes where it divides them. seed: random signs in front of every rotation, drawn in
    the order of the graph; None for plain Hadamard matrices. tied: an embedding table that is also a linear layer's
    weight stays one matrix, at the price of one or two online transforms (see :mod:`tied`). keys: take RoPE, and norms
    in front of it, out of attention even where R3 is not asked for, for a cache that needs keys as they are compared.
    convolutions: they are worth a transform too; False where they stay in floating point anyway. left: names of linear
    layers that do.

    Raises ModelError when the model holds no linear layer, ConfigError for an unknown rotation or an impossible size.
    """
    wanted, worth = frozenset(rotations), Worth(convolutions, frozenset(left))
    if unknown := wanted - set(ROTATIONS):
        raise ConfigError(f"rotations: {sorted(unknown)} unknown; choose among {', '.join(ROTATIONS)}")
    if block_size is not None and not has_order(block_size):
        raise ConfigError(
            f"block_size: no Hadamard matrix of {block_size} is available; use a power of two, 12, 20, ..."
        )
    quantized = sorted({n.op_type for n in model.graph if n.op_type in _QUANTIZED})
    keys = keys or "R3" in wanted
    prepare(model, keys=keys)
    typing = _typed(model)
    nothing = not typing.reads and not typing.unknown
    if nothing and not linear_sites(model):
        if quantized:
            raise ModelError(
                f"the model is already quantized ({', '.join(quantized)}) and has no linear layer left in floating "
                "point: rotate the model it was made from"
            )
        raise ModelError(
            "the model has no linear layer (MatMul or Gemm with a constant matrix): nothing to rotate"
            f"{why_no_layers(model)}"
        )
    labels, heads = _labels(typing, wanted, tied, worth)
    if torn := labels.torn():
        typing = _typed(model, torn)
        labels, heads = _labels(typing, wanted, tied, worth)
    if not agree(typing, labels, heads):
        typing = _typed(model, torn)
        labels, heads = _labels(typing, wanted, tied, worth, apart=True)
    builder = Builder(model, typing, labels, block_size, seed)
    if quantized:
        builder.note(
            f"the model is already quantized in part ({', '.join(quantized)}): what is quantized keeps its basis; "
            "better rotate the model it was made from"
        )
    if nothing:
        builder.note("nothing is rotated: all linear layers multiply vectors, or activations that they transpose")
    if any(map(has_subgraphs, model.graph)):
        builder.note("subgraphs (If, Loop, Scan) are left alone, with everything they read")
    if keys and (why := fused_keys(model)) is not None:
        builder.note(why)
    for head in heads:
        basis = "rotated" if labels.any_rotated(head.weight, head.read.slot.axis) else "in its own basis"
        builder.note(f"{head.name} stays tied: the table and the layer keep one matrix, {basis}")
    return builder.plan(wanted, fingerprint(model), keys=keys)


def _typed(model: ir.Model, apart: frozenset[Slot] = frozenset()) -> Typing:
    typing = Typing(model.graph, Shapes(model), apart=apart)
    apply_rules(typing)
    return typing


def _labels(
    typing: Typing, wanted: frozenset[str], tied: bool, worth: Worth, *, apart: bool = False
) -> tuple[Labels, list[TiedHead]]:
    heads = tied_heads(typing) if tied else []
    (keep_basis if apart else share_basis)(typing, heads)
    return Labels(typing, wanted, worth), heads


def fingerprint(model: ir.Model) -> str:
    """Identifies the graph (not the weights' values): operators, wiring, and the shapes of constants."""
    digest = hashlib.sha256()
    for node in numbered(model.graph):
        names = [v.name if v is not None else "" for v in node.inputs]
        digest.update(repr((node.domain, node.op_type, names, [v.name for v in node.outputs])).encode())
    for name, value in sorted(model.graph.initializers.items()):
        tensor = root_tensor(value)
        digest.update(repr((name, int(tensor.dtype), tensor_shape(tensor))).encode())
    return digest.hexdigest()[:16]
