"""Mixtures of experts: MoE becomes QMoE, ONNX Runtime's operator for experts whose matrices are integers in blocks.

    MoE(x, router, fc1, bias1, fc2, bias2, ...)  ->  QMoE(x, router, fc1 codes, scales, bias1, fc2 codes, scales, ...)

Its codes are unsigned, [expert, out, in * bits / 8], four-bit ones two a byte with the lower half first, with a scale
(and a zero point, where ranges are not symmetric) for each block of input features. Its kernel makes activations int8
in blocks of the same features, or multiplies in floating point where a row has one scale. Integers are rounded to the
nearest in ranges of least squared error, or found by GPTQ before (see :mod:`onnx_quarot.expert_hessians`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import onnx_ir as ir

from .blocks import BlockWeight
from .editing import GraphNames, take_over
from .load import unmap
from .qdq import SiteReport
from .qparams import Array, SolvedWeight, reshaped
from .runtime_faults import version
from .scheme import Scheme, TensorSpec
from .sites import constant_tensor, drop_unused

_MS = "com.microsoft"
ROUTER, LAST = 1, 4  # inputs of MoE: the router's logits, and the matrices whose results are summed
# Matrices: their input of MoE, before their bias; that of QMoE for codes, before scales and bias; and for zero points.
_MATRICES = ((2, 2, 11), (LAST, 5, 12), (6, 8, 13))
_ROUTER_WEIGHTS = 14
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
# Where a scheme has none of its own. Smaller blocks cost more memory than their accuracy is worth with 8 bits.
_BLOCKS = (128, 64, 32, 16)
_DEFAULT_BLOCK = 64
# The first ONNX Runtime whose QMoE can be told to multiply 4-bit weights by 8-bit activations, three times as fast.
_ACCURACY_LEVEL_SINCE = (1, 31)


@dataclass(frozen=True)
class ExpertMatrix:
    """Matrices [expert, channels, depth] of one MoE, a constant; slots: its own in MoE, of its codes, of its zeros."""

    root: ir.Value
    slots: tuple[int, int, int]
    experts: int
    channels: int
    depth: int


@dataclass(frozen=True)
class ExpertSite:
    """One mixture of experts, with the name and operator type that `layers` and `exclude` know it by."""

    node_name: str
    node: ir.Node = field(repr=False, compare=False)
    matrices: tuple[ExpertMatrix, ...]
    op_type: str = "MoE"

    @property
    def read(self) -> tuple[str, str]:
        """The values it reads: its rows, and the router's logits for them."""
        names = [value.name or "" for value in self.node.inputs[: ROUTER + 1] if value is not None]
        return names[0], names[ROUTER]

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.matrices[0].experts

    @property
    def depth(self) -> int:
        """Features of its rows."""
        return self.matrices[0].depth


@dataclass(frozen=True)
class StoredForm:
    """How the matrices of a mixture become integers. block: input features that share a scale, None for a row's."""

    spec: TensorSpec
    block: int | None

    @classmethod
    def of(cls, site: ExpertSite, scheme: Scheme) -> StoredForm | None:
        """Their form in a scheme; None if rows do not fill bytes."""
        if any(matrix.depth * scheme.weight.bits % 8 for matrix in site.matrices):
            return None
        block = _block(site, scheme)
        # With one scale a row, zero points would be packed over rows.
        return cls(scheme.weight if block is not None else replace(scheme.weight, signed=True, symmetric=True), block)


class _Rows:
    """Matrices of all experts as one [depth, experts * channels]; see :class:`onnx_quarot.blocks.Rows`."""

    def __init__(self, matrix: ExpertMatrix) -> None:
        tensor = constant_tensor(matrix.root)
        assert tensor is not None
        self._tensor, self.name = tensor, matrix.root.name or ""
        self.depth, self.channels = matrix.depth, matrix.experts * matrix.channels

    def read(self) -> Array:
        rows: Array = self._tensor.numpy().reshape(self.channels, self.depth).T
        return rows

    def close(self) -> None:
        unmap(self._tensor)


def expert_sites(model: ir.Model) -> list[ExpertSite]:
    """The mixtures of experts in the main graph whose matrices are constants."""
    return [site for node in model.graph if (site := _site(node)) is not None]


def _site(node: ir.Node) -> ExpertSite | None:
    if (node.domain, node.op_type) != (_MS, "MoE"):
        return None
    matrices = []
    for slots in _MATRICES:
        root = node.inputs[slots[0]] if slots[0] < len(node.inputs) else None
        if root is None:
            continue
        tensor = constant_tensor(root)
        if tensor is None or len(tensor.shape) != 3 or tensor.dtype not in _FLOATS or tensor.size == 0:
            return None
        matrices.append(ExpertMatrix(root, slots, *tensor.shape.numpy()))
    return ExpertSite(node.name or node.outputs[0].name or "", node, tuple(matrices)) if matrices else None


def quantize_experts(
    model: ir.Model,
    sites: Sequence[ExpertSite],
    schemes: Mapping[str, Scheme],
    solved: Mapping[str, Sequence[SolvedWeight]] | None = None,
) -> tuple[list[SiteReport], list[str]]:
    """Replace `sites` (`expert_sites` of this model) in place by QMoE; a report for each, and what there is to remark.

    schemes: by node name; their weights' bits and ranges are used, and their block, else 64 features, but one scale a
    row beside activations of more than 8 bits, which its kernels for blocks do not keep. solved: integers that were
    found before, by node name, for each matrix. Others are evaluated when the model is saved.
    """
    names, reports, notes = GraphNames(model.graph), [], []
    for site in sites:
        scheme = schemes[site.node_name]
        bits, form = scheme.weight.bits, StoredForm.of(site, scheme)
        if form is None:
            notes.append(
                f"experts of {site.node_name!r} keep floating point: their rows do not fill bytes of {bits} bits"
            )
            continue
        given = (solved or {}).get(site.node_name, [None] * len(site.matrices))
        reports.append(_report(site, bits, form.block, "gptq" if given[0] else "rounded to the nearest"))
        _replace(names, site, form, given)
    if any(report.weight_bits == 4 for report in reports) and _knows_accuracy_level():
        notes.append(
            "experts of 4 bits take 8-bit activations, which ONNX Runtime can do from 1.31 on: it has to be that"
        )
    if reports:
        model.opset_imports.setdefault(_MS, 1)
    return reports, notes


def _block(site: ExpertSite, scheme: Scheme) -> int | None:
    """Input features that share a scale; None: all of a row."""
    if scheme.activation.bits > 8:
        return None
    wanted = scheme.block or _DEFAULT_BLOCK
    fitting = (b for b in (wanted, *_BLOCKS) if b <= wanted and all(m.depth % b == 0 for m in site.matrices))
    return next(fitting, None)


def _replace(names: GraphNames, site: ExpertSite, form: StoredForm, solved: Sequence[SolvedWeight | None]) -> None:
    spec, block = form.spec, form.block
    node, made = site.node, site.node.outputs[0]
    inputs: list[ir.Value | None] = [*node.inputs[:2], *[None] * (_ROUTER_WEIGHTS - 1)]
    for matrix, integers in zip(site.matrices, solved, strict=True):
        own, codes, zeros = matrix.slots
        weight, base = BlockWeight(_Rows(matrix), spec, block or matrix.depth, integers), matrix.root.name
        inputs[codes] = names.initializer(_shaped(weight.codes_tensor(), matrix), f"{base}_quantized")
        inputs[codes + 1] = names.initializer(_shaped(weight.scales_tensor(), matrix, block is None), f"{base}_scales")
        inputs[codes + 2] = node.inputs[own + 1] if own + 1 < len(node.inputs) else None
        if weight.has_zeros:
            inputs[zeros] = names.initializer(_shaped(weight.zeros_tensor(), matrix), f"{base}_zero_points")
    added: list[ir.Node] = []
    if node.attributes.get_int("normalize_routing_weights", 0) == 0:
        # The kernel for integers divides by the sum of the chosen weights all the same, unless it is given the weights.
        added.append(ir.node("Softmax", [node.inputs[1]], {"axis": -1}, name=names.unique(f"{site.node_name}_Softmax")))
        added[0].outputs[0].name = names.unique(f"{made.name}_weights")
        inputs[_ROUTER_WEIGHTS] = added[0].outputs[0]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"expert_weight_bits": spec.bits, **({} if block is None else {"block_size": block})}
    if block is not None and spec.bits == 4 and _knows_accuracy_level():
        attributes["accuracy_level"] = 4
    everything = [*node.attributes.values(), *ir.convenience.convert_attributes(attributes)]
    added.append(ir.Node(_MS, "QMoE", inputs, everything, name=node.name))
    names.graph.insert_before(node, added)
    take_over(made, added[-1].outputs[0])
    names.graph.remove(node, safe=True)
    for matrix in site.matrices:
        drop_unused(names.graph, matrix.root)


def _shaped(tensor: ir.LazyTensor, matrix: ExpertMatrix, flat: bool = False) -> ir.LazyTensor:
    """[experts * channels, ...] as [experts, channels, ...], or without what follows where that is 1 long."""
    rows = [matrix.experts, matrix.channels]
    return reshaped(tensor, rows if flat else [*rows, tensor.size // prod(rows)])


def _report(site: ExpertSite, bits: int, block: int | None, how: str) -> SiteReport:
    elements = sum(m.experts * m.channels * m.depth for m in site.matrices)
    activation, dtype = site.node.inputs[0], site.matrices[0].root.dtype
    assert activation is not None
    assert dtype is not None
    return SiteReport(
        site.node_name,
        "QMoE",
        activation.name or "",
        ", ".join(m.root.name or "" for m in site.matrices),
        activation_scale=0.0,
        activation_zero_point=0,
        float_bytes=int(dtype.itemsize * elements),
        quantized_bytes=elements * bits // 8,
        weight_bits=bits,
        note=f"{'one scale a row' if block is None else f'blocks of {block}'}, {how}",
    )


def _knows_accuracy_level() -> bool:
    return version() >= _ACCURACY_LEVEL_SINCE
