"""Linear layers that quantize their activations per token, as QLinear: one compiled operator.

Layers that read one value become one operator, with an output for each, and what stands around them becomes part of it:
an online rotation that only they read; the gate of two of them, silu(a) * b; then what
:mod:`onnx_quarot.fused_neighbours` finds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .blocks import BlockWeight
from .custom_op import DOMAIN
from .custom_op import OP_TYPE as HADAMARD
from .editing import GraphNames, take_over
from .errors import ConfigError, ModelError
from .fused_neighbours import absorb_neighbours
from .portable import Transform
from .qdq import SiteReport, check_replaceable
from .qlinear import (
    MAX_DEPTH,
    MOST_OUTPUTS,
    OP_TYPE,
    PANEL,
    QLinearSpec,
    add_qlinear,
    pack,
    pack_scales,
    pack_zero_points,
)
from .qparams import Array, QuantizedWeight, SolvedWeight, lazy
from .scheme import FUSED_BLOCKS, Scheme
from .sites import LinearSite, WeightSource, drop_unused, readers
from .stand_in import add_bias
from .tied_tables import Layout, SharedWeight


@dataclass(frozen=True)
class _Part:
    """A layer's weight, evaluated when it is written: integers [depth, channels], scales and zero points [blocks,
    channels], of which only 4 bits have any."""

    codes: Callable[[], Array]
    scales: Callable[[], Array]
    zeros: Callable[[], Array] | None = None


@dataclass(frozen=True)
class _Kind:
    """What layers share that become one operator, their input aside."""

    block: int | None
    has_zeros: bool
    contrib: bool

    @staticmethod
    def of(scheme: Scheme) -> _Kind:
        block = None if scheme.weight.bits == 8 else scheme.block
        return _Kind(block, not scheme.weight.symmetric, scheme.form != "fused")


def takes_blocks(scheme: Scheme) -> bool:
    """Whether the operator can do what MatMulNBits does for a scheme of the form block."""
    return scheme.form == "block" and scheme.weight.bits == 4 and scheme.block in FUSED_BLOCKS


def quantize_fused(
    model: ir.Model,
    sites: Sequence[LinearSite],
    schemes: Mapping[str, Scheme],
    solved: Mapping[str, SolvedWeight],
    tied: Collection[ir.Value] = (),
) -> tuple[list[SiteReport], list[SharedWeight]]:
    """Replace `sites` in place by QLinear; a report for each, and the 8-bit weights of roots in `tied`.

    schemes: by node name, of the form fused: 8-bit weights with a scale a channel, or 4-bit ones in blocks; or of
    another form, with such weights: then the function is that form's operator. solved: integers found in advance, by
    node name. Everything is checked first: ModelError for a weight that is not float32, a Gemm that transposes its
    activations, or too old an opset, ConfigError for weights the operator does not take.
    """
    for site in sites:
        scheme = schemes[site.node_name]
        check_replaceable(model, site, scheme)
        if site.depth > MAX_DEPTH:
            raise ModelError(f"node {site.node_name!r}: has {site.depth} input features; {OP_TYPE} takes {MAX_DEPTH}")
        weight = scheme.weight
        if weight.bits != 4 and not (weight.bits == 8 and weight.signed and weight.symmetric):
            raise ConfigError(f"weight: {scheme.name} takes weights of 4 bits, or signed symmetric ones of 8")
    groups: dict[tuple[ir.Value, _Kind], list[LinearSite]] = {}
    for site in sites:
        groups.setdefault((site.input, _Kind.of(schemes[site.node_name])), []).append(site)
    names = GraphNames(model.graph)
    stored: dict[tuple[object, ...], list[ir.Value]] = {}
    shared: list[SharedWeight] = []
    made: dict[ir.Node, QLinearSpec] = {}
    for (_, kind), readers_of_one in groups.items():
        gate = _gate(readers_of_one)
        group = readers_of_one if gate is None else gate.sites
        key = (kind.block, kind.has_zeros, gate is None, *(site.weight_key() for site in group))
        if key not in stored:
            stored[key] = _store(names, group, kind, schemes, solved, gate is not None)
        made |= _replace(model, names, group, kind, stored[key], gate)
        site = group[0]
        if site.root in tied and len(group) == 1 and kind.block is None:
            codes, scales = stored[key]
            shared.append(SharedWeight(site, codes, scales, zero=128, layout=Layout.PANELS))
    absorb_neighbours(model, made)
    return [_report(site, schemes[site.node_name]) for site in sites], shared


@dataclass(frozen=True)
class _Gate:
    """Two layers, a and b, of which only silu(a) * b is used, and the nodes that make it."""

    sites: list[LinearSite]
    nodes: list[ir.Node]


def _gate(sites: Sequence[LinearSite]) -> _Gate | None:
    """The gate of two layers of one width, of whole panels and without a bias, in whichever order they come."""
    if len(sites) != 2 or any(len(site.node.inputs) > 2 for site in sites):
        return None
    if sites[0].channels != sites[1].channels or sites[0].channels % PANEL:
        return None
    for first, second in (tuple(sites), tuple(reversed(sites))):
        a, b = first.node.outputs[0], second.node.outputs[0]
        sigmoids = [node for node in readers(a) if (node.domain, node.op_type) == ("", "Sigmoid")]
        if len(sigmoids) != 1:
            continue
        inner = _only_product(sigmoids[0].outputs[0], a)
        outer = None if inner is None else _only_product(inner.outputs[0], b)
        if inner is None or outer is None or set(readers(a)) != {sigmoids[0], inner} or a.is_graph_output():
            continue
        if set(readers(b)) == {outer} and not b.is_graph_output():
            return _Gate([first, second], [outer, inner, sigmoids[0]])
    return None


def _only_product(value: ir.Value, other: ir.Value) -> ir.Node | None:
    """The Mul by `other` that is all that reads a value."""
    found = list(readers(value))
    if len(found) != 1 or value.is_graph_output() or (found[0].domain, found[0].op_type) != ("", "Mul"):
        return None
    return found[0] if set(found[0].inputs) == {value, other} else None


def _store(
    names: GraphNames,
    group: Sequence[LinearSite],
    kind: _Kind,
    schemes: Mapping[str, Scheme],
    solved: Mapping[str, SolvedWeight],
    gated: bool,
) -> list[ir.Value]:
    """Packed weights, scales, and zero points if there are any."""
    block = kind.block
    parts = [_part(site, schemes[site.node_name], block, solved.get(site.node_name)) for site in group]
    depth, columns = group[0].depth, sum(site.channels for site in group)
    panels, blocks = -(-columns // PANEL), 1 if block is None else -(-depth // block)
    steps = -(-depth // 4) if block is None else blocks * block // 8

    def side_by_side(arrays: list[Array]) -> Array:
        if gated:  # panels take turns
            arrays = [np.stack([array.reshape(len(array), -1, PANEL) for array in arrays], axis=2)]
        return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)

    def packed() -> Array:
        codes: Array = pack(side_by_side([part.codes() for part in parts]), block)
        return codes

    def scales() -> Array:
        joined = side_by_side([part.scales() for part in parts])
        return pack_scales(joined) if block is not None else joined[0].astype(np.float32)

    def zeros() -> Array:
        codes: Array = pack_zero_points(side_by_side([part.zeros() for part in parts if part.zeros is not None]))
        return codes

    scale_shape = [columns] if block is None else [panels, blocks, PANEL]
    name = group[0].weight
    made = [
        names.initializer(lazy(packed, ir.DataType.UINT8, [panels, steps, PANEL, 4], ""), f"{name}_packed"),
        names.initializer(lazy(scales, ir.DataType.FLOAT, scale_shape, ""), f"{name}_scales"),
    ]
    if kind.has_zeros:
        points = lazy(zeros, ir.DataType.UINT8, [panels, blocks, PANEL // 2], "")
        made.append(names.initializer(points, f"{name}_zero_points"))
    return made


def _part(site: LinearSite, scheme: Scheme, block: int | None, solved: SolvedWeight | None) -> _Part:
    if block is not None:
        weight = BlockWeight(WeightSource(site), scheme.weight, block, solved)
        codes, factors, zeros = weight.plain_tensors()

        def filled() -> Array:
            """-8 to 7; what fills the last block means zero."""
            rows, last = (tensor.numpy().astype(np.int8) for tensor in (codes, zeros))
            ends: Array = np.repeat(last[-1:], weight.blocks * block - site.depth, axis=0)
            whole: Array = np.concatenate([rows, ends]) + np.int8(weight.offset - 8)
            return whole

        return _Part(filled, factors.numpy, lambda: zeros.numpy().astype(np.uint8) + np.uint8(weight.offset))
    source, shape = WeightSource(site), (site.depth, site.channels)
    whole = QuantizedWeight(site.weight, shape, scheme.weight, 1, source.read, source.close, solved=solved)
    return _Part(whole.tensor("").numpy, lambda: whole.scale()[None])


def _replace(
    model: ir.Model,
    names: GraphNames,
    group: Sequence[LinearSite],
    kind: _Kind,
    weights: Sequence[ir.Value],
    gate: _Gate | None,
) -> dict[ir.Node, QLinearSpec]:
    graph, first = model.graph, group[0].node
    x = group[0].input
    columns = sum(site.channels for site in group)
    sizes = [site.channels for site in group]
    splits = tuple(sizes) if gate is None and _splits(sizes) else ()
    spec = QLinearSpec(group[0].depth, columns, kind.block, splits=splits, gated=gate is not None)
    spec = replace(spec, zero_points=kind.has_zeros, contrib=kind.contrib)
    signs: ir.Value | None = None
    rotation = x.producer()
    inside = rotation is not None and (rotation.domain, rotation.op_type) == (DOMAIN, HADAMARD)
    inside = inside and set(readers(x)) == {site.node for site in group} and not x.is_graph_output()
    if inside:
        assert rotation is not None
        assert rotation.inputs[0] is not None
        signs = rotation.inputs[1] if len(rotation.inputs) > 1 else None
        spec = replace(spec, rotation=Transform.of(rotation, spec.depth, signs))
        x = rotation.inputs[0]
    codes, scales, *zeros = weights
    node = add_qlinear(model, spec, [x, codes, scales, None, signs, *zeros], first.name or names.unique("QLinear"))
    added = [node]
    products = list(node.outputs)
    if gate is not None:
        take_over(gate.nodes[0].outputs[0], products[0])
    elif len(products) < len(group):
        joined = products[0]
        joined.name = names.unique(f"{first.outputs[0].name}_joined")
        parts = names.initializer(ir.Tensor(np.array(sizes)), f"{joined.name}_sizes")
        split = ir.node("Split", [joined, parts], {"axis": -1}, num_outputs=len(group), name=names.unique("Split"))
        added.append(split)
        products = list(split.outputs)
    graph.insert_before(first, added)
    if gate is not None:
        graph.remove(gate.nodes, safe=True)
    for site, product in zip(group, products if gate is None else [], strict=gate is None):
        if product.name is None:
            product.name = names.unique(f"{site.node.outputs[0].name}_part")
            product.type = ir.TensorType(ir.DataType.FLOAT)
        bias = add_bias(names, site, product)
        graph.insert_before(site.node, bias)
        take_over(site.node.outputs[0], bias[-1].outputs[0] if bias else product)
    for site in group:
        operands = [value for value in site.node.inputs[1:] if value is not None]
        graph.remove(site.node, safe=True)
        for operand in dict.fromkeys(operands):
            drop_unused(graph, operand)
    if inside:
        assert rotation is not None
        graph.remove(rotation, safe=True)
    return {node: spec}


def _splits(sizes: Sequence[int]) -> bool:
    """Whether one operator can have an output for each of several layers."""
    return 1 < len(sizes) <= MOST_OUTPUTS and not any(size % PANEL for size in sizes[:-1])


def _report(site: LinearSite, scheme: Scheme) -> SiteReport:
    bits, count = scheme.weight.bits, site.depth * site.channels
    block = _Kind.of(scheme).block
    return SiteReport(
        site.node_name,
        OP_TYPE,
        site.activation,
        site.weight,
        activation_scale=0.0,
        activation_zero_point=0,
        float_bytes=4 * count,
        quantized_bytes=count * bits // 8,
        weight_bits=bits,
        note="" if block is None else f"blocks of {block}",
    )
